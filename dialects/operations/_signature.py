"""Whether the arguments of an opaque operation are those that its torch operator or its function on sizes takes."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from typing import Any

from xdsl.dialects.builtin import ArrayAttr, FloatAttr, IntegerAttr, NoneType, StringAttr, TensorType, UnitAttr, i1
from xdsl.ir import Attribute, SSAValue

from ._values import DTYPE_NAMES

_NUMBERS = {"IntType", "SymIntType", "FloatType", "SymFloatType", "NumberType", "BoolType", "SymBoolType"}


@cache
def schema_of(target: str) -> Any:
    """The schema of a torch operator; MxloomError where it does not exist or may not stand in a module."""
    from ..torch_operators import operator

    return operator(target)._schema


def fault_of_arguments(target: str, arguments: Mapping[str, Attribute], operands: Iterator[SSAValue]) -> str | None:
    """What is wrong with the arguments of a torch operator; None where they are what its schema declares."""
    declared = {argument.name: argument for argument in schema_of(target).arguments}
    unknown = [name for name in arguments if name not in declared]
    if unknown:
        return f'"{target}" has no argument {", ".join(unknown)}; it has {", ".join(declared)}'
    for name, argument in declared.items():
        if name not in arguments:
            if not argument.has_default_value():
                return f'"{target}" needs the argument {name}'
        elif not _takes(argument.real_type, arguments[name], operands):
            return f'"{target}": its argument {name} is {argument.real_type}, got {_came(arguments[name])}'
    return _left_over(target, operands)


def fault_of_results(target: str, results: list[Attribute]) -> str | None:
    """What is wrong with the number or kind of a torch operator's results."""
    declared = [result.type.kind() for result in schema_of(target).returns]
    if "ListType" in declared:
        return None
    if len(declared) != len(results):
        return f'"{target}" has {len(declared)} results, got {len(results)}'
    for kind, result in zip(declared, results, strict=True):
        if (kind == "TensorType") != isinstance(result, TensorType):
            return f'"{target}": a result is {kind.removesuffix("Type")}, got {result}'
    return None


def fault_of_sizes(
    target: str, function: Callable[..., Any], arguments: Mapping[str, Attribute], operands: Iterator[SSAValue]
) -> str | None:
    """What is wrong with the arguments of arithmetic on sizes, which are called a0, a1, ... and are all numbers."""
    names = [f"a{place}" for place in range(len(arguments))]
    unknown = [name for name in arguments if name not in names]
    if unknown:
        return f'"{target}" has no argument {unknown[0]}; they are called a0, a1, ... without a gap'
    if not _accepts(function, len(names)):
        return f'"{target}" does not take {len(names)} arguments'
    for name in names:
        if not _is_number(arguments[name], operands):
            return f'"{target}": its argument {name} is no number'
    return _left_over(target, operands)


def _left_over(target: str, operands: Iterator[SSAValue]) -> str | None:
    extra = len(list(operands))
    return f'"{target}": {extra} operands stand in no argument; `unit` marks the place of each' if extra else None


def _came(attribute: Attribute) -> str:
    return "an operand of another kind, or none" if isinstance(attribute, UnitAttr) else str(attribute)


def _accepts(function: Callable[..., Any], count: int) -> bool:
    """Whether a function takes so many arguments by place; True where Python cannot tell."""
    try:
        inspect.signature(function).bind(*range(count))
    except ValueError:
        return True
    except TypeError:
        return False
    return True


def _is_number(attribute: Attribute, operands: Iterator[SSAValue]) -> bool:
    if isinstance(attribute, UnitAttr):
        value = next(operands, None)
        return value is not None and not isinstance(value.type, TensorType)
    return isinstance(attribute, IntegerAttr | FloatAttr)


def _takes(type: Any, attribute: Attribute, operands: Iterator[SSAValue]) -> bool:
    """Whether an argument of the schema's type takes the attribute; a `unit` uses up the next operand."""
    kind = type.kind()
    if kind == "OptionalType":
        return isinstance(attribute, NoneType) or _takes(type.getElementType(), attribute, operands)
    if kind == "ListType":
        element = type.getElementType()
        if isinstance(attribute, ArrayAttr):
            return all(_takes(element, item, operands) for item in attribute)
        return element.kind() in _NUMBERS and _takes(element, attribute, operands)
    if isinstance(attribute, UnitAttr):
        value = next(operands, None)
        is_tensor = value is not None and isinstance(value.type, TensorType)
        return value is not None and (kind == "TensorType" if is_tensor else kind in _NUMBERS | {"TensorType"})
    return _takes_constant(kind, attribute)


def _takes_constant(kind: str, attribute: Attribute) -> bool:
    match attribute:
        case IntegerAttr() if kind in ("BoolType", "SymBoolType"):
            return attribute.type == i1
        case IntegerAttr():
            return kind in _NUMBERS | {"TensorType"}  # torch makes a tensor of a number
        case FloatAttr():
            return kind in ("FloatType", "SymFloatType", "NumberType", "TensorType")
        case StringAttr():
            return kind == "StringType"
    return kind == "ScalarTypeType" and attribute in DTYPE_NAMES
