"""What the languages share in which a block function is written out: expressions of Python, one line each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from struct import pack, unpack
from typing import Literal

from xdsl.dialects import arith, vector
from xdsl.dialects.builtin import (
    DenseIntOrFPElementsAttr,
    FloatAttr,
    IntegerAttr,
    VectorType,
    f32,
    f64,
    i32,
)
from xdsl.dialects.func import FuncOp, ReturnOp
from xdsl.ir import Attribute, Operation, SSAValue

from ....dialects.errors import MxloomError

INFIX: dict[type[Operation], str] = {
    arith.AddiOp: "+",
    arith.SubiOp: "-",
    arith.MuliOp: "*",
    arith.AndIOp: "&",
    arith.OrIOp: "|",
    arith.XOrIOp: "^",
    arith.ShLIOp: "<<",
    arith.ShRSIOp: ">>",
    arith.AddfOp: "+",
    arith.SubfOp: "-",
    arith.MulfOp: "*",
}

FLOAT_COMPARISONS = {1: "==", 2: ">", 3: ">=", 4: "<", 5: "<=", 13: "!="}
"""The predicates of arith.cmpf that Python's comparisons have, NaN included: oeq, ogt, oge, olt, ole, une."""

INTEGER_COMPARISONS = {0: "==", 1: "!=", 2: "<", 3: "<=", 4: ">", 5: ">="}
"""Those of arith.cmpi on signed integers: eq, ne, slt, sle, sgt, sge."""


@dataclass(frozen=True)
class Language:
    """How a language spells what is no infix operator; `{0}` and on are the operands.

    `constant` has the fields value and type, `bitcast` the field type. `calls` are the operations that are one
    expression each, `wide` those that are another one where they yield f64; `bounds` are the smaller and the larger of
    two f32, NaN where one of them is.
    """

    name: str
    constant: str
    bitcast: str
    types: Mapping[Attribute, str]
    calls: Mapping[type[Operation], str]
    wide: Mapping[type[Operation], str]
    bounds: Mapping[Literal["ogt", "olt"], str]


def function_text(function: FuncOp, language: Language, arguments: Sequence[str]) -> list[str]:
    """The lines of `def name(arguments)`: a function of arith, math and vector on floats and integers.

    A vector becomes a tensor whose last dimension are its lanes, a scalar one whose last dimension is 1, or a number;
    so no line tells how many lanes there are. Raises MxloomError for an operation that the language does not have.
    """
    block = function.body.block
    if len(block.args) != len(arguments):
        raise MxloomError(f"@{function.sym_name.data} takes {len(block.args)} arguments, not {', '.join(arguments)}")
    names: dict[SSAValue, str] = dict(zip(block.args, arguments, strict=True))
    constants: dict[str, str] = {}
    lines = [f"def {function.sym_name.data}({', '.join(arguments)}):"]
    for op in block.ops:
        operands = [names.get(operand, "") for operand in op.operands]
        if isinstance(op, ReturnOp):
            return [*lines, f"    return {', '.join(operands)}"]
        if isinstance(op, vector.BroadcastOp):  # a last dimension of 1 spreads by itself
            names[op.results[0]] = operands[0]
        elif not _only_bounds(op):
            text = _expression(op, operands, language)
            known = constants.get(text)  # the constant in every lane, and for itself
            if known is None:
                known = f"v{len(lines) - 1}"
                lines.append(f"    {known} = {text}")
            if isinstance(op, arith.ConstantOp):
                constants[text] = known
            names[op.results[0]] = known
    raise MxloomError(f"@{function.sym_name.data} returns nothing; this is a fault of mxloom")


def _expression(op: Operation, operands: Sequence[str], language: Language) -> str:
    if all(element_of(value.type) in language.types for value in (*op.operands, *op.results)):
        if (sign := _infix(op)) is not None:
            return f"{operands[0]} {sign} {operands[1]}"
        if (bound := _bound(op)) is not None:
            return language.bounds[bound].format(operands[2], operands[1])
        kind = language.types[element_of(op.results[0].type)]
        calls = {**language.calls, **language.wide} if element_of(op.results[0].type) == f64 else language.calls
        if type(op) in calls:
            return calls[type(op)].format(*operands)
        if isinstance(op, arith.ConstantOp):
            return _constant(_number(op.value), kind, language)
        if isinstance(op, arith.BitcastOp):
            return language.bitcast.format(*operands, type=kind)
    kinds = ", ".join(str(value.type) for value in (*op.operands, *op.results))
    raise MxloomError(f"{op.name} of {kinds} has no form in {language.name}")


def _constant(number: str, kind: str, language: Language) -> str:
    if number == "-0.0" and kind == language.types[f32]:  # Triton makes every zero the positive one
        bits = language.constant.format(value=-(1 << 31), type=language.types[i32])
        return language.bitcast.format(bits, type=kind)
    return language.constant.format(value=number, type=kind)


def _infix(op: Operation) -> str | None:
    if isinstance(op, arith.CmpfOp):
        return FLOAT_COMPARISONS.get(op.predicate.value.data)
    if isinstance(op, arith.CmpiOp):
        return INTEGER_COMPARISONS.get(op.predicate.value.data)
    return INFIX.get(type(op))


def _bound(op: Operation) -> Literal["ogt", "olt"] | None:
    """The comparison of `select (value > bound), bound, value` (or <), which is the smaller (larger) of both.

    The same bits for every value, NaN included, where the bound is a number other than zero, whose sign could differ.
    """
    if not isinstance(op, arith.SelectOp) or element_of(op.results[0].type) != f32:
        return None
    if not isinstance(compared := op.cond.owner, arith.CmpfOp):
        return None
    bound, value = op.lhs, op.rhs
    if (compared.lhs, compared.rhs) != (value, bound) or not isinstance(constant := bound.owner, arith.ConstantOp):
        return None
    number = float(_number(constant.value).removeprefix('float("').removesuffix('")'))
    if number == 0 or number != number:
        return None
    return {2: "ogt", 4: "olt"}.get(compared.predicate.value.data)  # pyright: ignore[reportReturnType]


def _only_bounds(op: Operation) -> bool:
    """Whether this is a comparison that serves nothing but bounds, which need none."""
    return isinstance(op, arith.CmpfOp) and all(_bound(use.operation) for use in op.results[0].uses)


def element_of(kind: Attribute) -> Attribute:
    """The type of a scalar, or of a vector's lanes."""
    return kind.element_type if isinstance(kind, VectorType) else kind


def _number(value: Attribute) -> str:
    """A constant, or the one number in all lanes, as Python writes it; an f32 as the f32 that it is."""
    if isinstance(value, DenseIntOrFPElementsAttr):
        (number,) = set(value.get_values())
        kind = value.get_element_type()
    else:
        assert isinstance(value, IntegerAttr | FloatAttr)
        number, kind = value.value.data, value.type
    if isinstance(number, int):
        return str(number)
    number = unpack("<f", pack("<f", number))[0] if kind == f32 else number
    text = repr(number)
    return text if text[-1].isdigit() else f'float("{text}")'
