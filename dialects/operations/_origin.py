"""Where a value comes from: whether it follows from parameters alone, and who reads a parameter."""

from __future__ import annotations

from xdsl.ir import Block, SSAValue
from xdsl.ir import Operation as XdslOperation

from ..formats import is_wide
from .cast import CastOp
from .movement import Movement
from .opaque import AtenOp
from .parameter import ParameterOp
from .pointwise import Binary, Pointwise

_FOLLOWED = (CastOp, Movement, Pointwise, Binary, AtenOp)
"""What a weight may pass through and still be a weight: casts, layouts, scalings, weight normalisation."""


def is_weight(value: SSAValue) -> bool:
    """Whether the value follows from parameters alone, so that it is the same in every forward."""
    return bool(parameters_of(value))


def parameters_of(value: SSAValue) -> list[ParameterOp]:
    """The parameters that a weight follows from; none for a value that follows from inputs too."""
    found: list[ParameterOp] = []
    open_values, seen = [value], set[SSAValue]()
    while open_values:
        value = open_values.pop()
        if value in seen:
            continue
        seen.add(value)
        owner = value.owner
        if isinstance(owner, ParameterOp):
            found.append(owner)
        elif isinstance(owner, Block) or not isinstance(owner, _FOLLOWED):
            return []
        else:
            open_values += owner.operands
    return found


def stored_readers(parameter: ParameterOp) -> list[CastOp | None]:
    """The casts whose results may be stored in place of a parameter, and None where something reads its wide values.

    A cast of the parameter in another layout (transposed, reshaped) counts: what it rounds hangs on no input.
    """
    found: list[CastOp | None] = []
    open_values: list[SSAValue] = [parameter.result]
    while open_values:
        for use in open_values.pop().uses:
            reader = use.operation
            is_rounded = isinstance(reader, CastOp) and use.index == 0  # other operands say how the first is rounded
            if isinstance(reader, CastOp) and is_rounded and not is_wide(reader.result.type.element_type):
                found.append(reader)
            elif _is_layout(reader):
                open_values.append(reader.results[0])
            else:
                found.append(None)
    return found


def _is_layout(operation: XdslOperation) -> bool:
    one = len(operation.operands) == 1 and len(operation.results) == 1
    return one and isinstance(operation, Movement) and bool(operation.results[0].uses)
