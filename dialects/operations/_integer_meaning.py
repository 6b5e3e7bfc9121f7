"""What operations that may be computed in integers share: the property, its rules, formats as pairs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from xdsl.dialects.builtin import IndexType, IntegerType, TensorType
from xdsl.ir import SSAValue

from ..formats import FixedType
from ..integer import LONGEST, WIDEST, Exponential, InverseRoot, Point, Table
from ._shapes import shape_of

if TYPE_CHECKING:
    from ..integer_attribute import IntegerMeaningAttr
    from ._operation import Operation

WIDEST_WEIGHT = 16
"""Bits of a normalization's weight, at most."""

Pair = tuple[int, int]


def pair_of(value: SSAValue | None) -> Pair | None:
    """Width and fraction of a value of fixed-point format; None for another, or for no value."""
    if value is None or not isinstance(value.type, TensorType) or not isinstance(value.type.element_type, FixedType):
        return None
    return value.type.element_type.width.data, value.type.element_type.fraction.data


def pair(value: SSAValue) -> Pair:
    """Width and fraction of a value that verification has made sure is of fixed-point format."""
    found = pair_of(value)
    assert found is not None
    return found


def all_fixed(operation: Operation) -> bool:
    """Whether every float tensor among operands and results is of fixed-point format (and there is one)."""
    tensors = (value.type for value in (*operation.operands, *operation.results) if isinstance(value.type, TensorType))
    floats = [type.element_type for type in tensors if not isinstance(type.element_type, IntegerType | IndexType)]
    return bool(floats) and all(isinstance(element, FixedType) for element in floats)


def require_fixed(operation: Operation, roles: Mapping[str, SSAValue | None], widest: int = WIDEST) -> None:
    """Raise VerifyException unless every value that is given is fixed point of at most `widest` bits."""
    for role, value in roles.items():
        if value is None:
            continue
        found = pair_of(value)
        came = value.type.element_type if isinstance(value.type, TensorType) else value.type
        operation.require(
            found is not None and found[0] <= widest,
            f"computed in integers, its {role} is !mx.fixed of at most {widest} bits, got {came}",
        )


def require_row(operation: Operation, value: SSAValue) -> None:
    """Raise VerifyException where a row of the value is known to be longer than integers allow."""
    size = shape_of(value)[-1] if shape_of(value) else 0
    operation.require(size <= LONGEST, f"computed in integers, rows have at most {LONGEST} numbers, got {size}")


def require_root(operation: Operation, value: SSAValue, more: int, eps: float) -> None:
    """Raise VerifyException where the sum of squares of a row, or eps in its units, leaves 62 bits."""
    width, fraction = pair(value)
    size = shape_of(value)[-1]
    if size > 0:
        bits = InverseRoot(width + more, fraction, size, eps).sum_bits
        operation.require(
            bits <= 62, f"computed in integers, eps = {eps} in units of !mx.fixed<{width}, {fraction}> leaves 62 bits"
        )


def require_bias(operation: Operation, value: SSAValue, weight: SSAValue | None, bias: SSAValue | None) -> None:
    """Raise VerifyException where a normalization's bias leaves 62 bits in units of its products with the weight."""
    size = shape_of(value)[-1]
    if weight is None or bias is None or size < 1:
        return
    (width, fraction), (_, behind) = pair(bias), pair(weight)
    bits = width + InverseRoot(*pair(value), size, 0.0).normal.fraction + behind - fraction
    operation.require(
        bits <= 62,
        f"computed in integers, its bias (!mx.fixed<{width}, {fraction}>) is too large for its weight "
        f"(fraction {behind}): in units of the weight it takes {bits} bits, and 62 are there",
    )


def require_exponential(operation: Operation, format: Pair, scale: float = 1.0) -> None:
    """Raise VerifyException where the exponential of numbers of a format leaves 64 bits."""
    width, fraction = format
    operation.require(scale > 0, f"computed in integers, the scale is above 0, got {scale}")
    places = Exponential(fraction, scale, 8).places
    operation.require(
        -16 <= places <= 60,
        f"computed in integers, e^x does not fit x of !mx.fixed<{width}, {fraction}>: its point is too far away",
    )


def require_table(
    operation: Operation, curve: str, input: SSAValue, result: SSAValue, meaning: IntegerMeaningAttr
) -> None:
    """Raise VerifyException where a table cannot be laid over the input's format."""
    given, found = pair(input), pair(result)
    table = Table(curve, Point(*given), Point(*found), meaning.table_bits.data)
    operation.require(
        table.index_bits >= 1 and 0 <= found[1] <= 40 and given[1] <= 40,
        f"computed in integers, it needs 0 to 40 bits behind the point, "
        f"got !mx.fixed<{given[0]}, {given[1]}> -> !mx.fixed<{found[0]}, {found[1]}>",
    )
