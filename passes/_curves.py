"""Curves that a model spells out, operation by operation, under the name of the one that hardware has a table for."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from xdsl.dialects.builtin import StringAttr
from xdsl.ir import Block, SSAValue
from xdsl.rewriter import InsertPoint, Rewriter

from ..backends.reference import results
from ..dialects.integer import CURVES
from ..dialects.operations._operation import Operation
from ..dialects.operations._shapes import element_of, shape_of
from ..dialects.operations.pointwise import Binary, Curve, GeluOp, Pointwise, SiluOp
from ._ranges import Ranges

if TYPE_CHECKING:
    from torch import Tensor

_NAMES: dict[str, tuple[type[Curve], dict[str, Any]]] = {
    "silu": (SiluOp, {}),
    "gelu": (GeluOp, {}),
    "gelu_tanh": (GeluOp, {"approximate": StringAttr("tanh")}),
}
_LONGEST = 12
"""Operations that a curve is spelled with, at most."""
_TOLERANCE = 4e-6
"""Roundings of f32 stay below this part of 1 or of the number; GELU and its approximation differ by 5e-4."""


def name_curves(block: Block, ranges: Ranges) -> None:
    """Put one operation in the place of each expression of one value that is a known curve on all of [-10, 10].

    What such an expression means is found by its values, so that every way to write it counts.
    """
    for op in tuple(block.ops):
        if isinstance(op, Binary) and op.other is not None and str(element_of(op.result)) == "f32":
            for operations, root in _expressions(op):
                if (name := _curve_of(operations, root)) is not None:
                    _replace(op, root, name, ranges)
                    break
    _drop_unused(block)


def _expressions(op: Operation) -> Iterator[tuple[list[Operation], SSAValue]]:
    """(operations in order, the one value that they read), the shortest expression first."""
    place = {each: index for index, each in enumerate(block.ops)} if (block := op.parent) is not None else {}
    operations: list[Operation] = []
    open_values: set[SSAValue] = {op.results[0]}
    while len(operations) < _LONGEST:
        owners = [value.owner for value in open_values]
        found = [owner for owner in owners if isinstance(owner, Pointwise | Binary)]
        if not found:
            return
        last = max(found, key=lambda owner: place[owner])
        operations.insert(0, last)
        open_values = (open_values - {last.results[0]}) | {*last.operands}
        if len(open_values) == 1:
            (root,) = open_values
            if shape_of(root) == shape_of(op.results[0]) and element_of(root) == element_of(op.results[0]):
                yield operations, root


def _curve_of(operations: list[Operation], root: SSAValue) -> str | None:
    """The name of the curve that an expression computes."""
    import torch

    x = torch.linspace(-10, 10, 801)
    values: dict[Any, Tensor] = {root: x}
    for op in operations:
        (values[op.results[0]],) = results(op, op.call(), values)
    y = values[operations[-1].results[0]].double()
    for name in _NAMES:
        expected = torch.tensor([CURVES[name].function(float(each)) for each in x], dtype=torch.float64)
        if bool(((y - expected).abs() <= _TOLERANCE * x.abs().clamp(min=1.0)).all()):
            return name
    return None


def _replace(op: Operation, root: SSAValue, name: str, ranges: Ranges) -> None:
    kind, properties = _NAMES[name]
    old = op.results[0]
    new = kind.build(operands=[root], result_types=[old.type], properties=properties)
    Rewriter.insert_op(new, InsertPoint.before(op))
    new.results[0].name_hint = old.name_hint
    ranges.moved(old, new.results[0])
    old.replace_all_uses_with(new.results[0])


def _drop_unused(block: Block) -> None:
    for op in reversed(list(block.ops)):
        if isinstance(op, Pointwise | Binary) and not list(op.results[0].uses):
            Rewriter.erase_op(op)
