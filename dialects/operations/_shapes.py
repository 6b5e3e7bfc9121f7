"""Shapes of values, with `?` for sizes that are known at run time only."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import cast

from xdsl.dialects.builtin import DYNAMIC_INDEX, TensorType
from xdsl.ir import Attribute, SSAValue

Shape = tuple[int, ...]
ShapeOf = Callable[[SSAValue], Shape]
UNKNOWN = DYNAMIC_INDEX


def tensor_type(value: SSAValue) -> TensorType[Attribute]:
    """The value's type, which the operation's definition has made sure is a tensor."""
    return cast("TensorType[Attribute]", value.type)


def shape_of(value: SSAValue) -> Shape:
    """Sizes of a tensor value, UNKNOWN where the type says `?`."""
    return tuple(tensor_type(value).get_shape())


def element_of(value: SSAValue) -> Attribute:
    """The number format of a tensor value."""
    return tensor_type(value).element_type


def text(shape: Iterable[int]) -> str:
    """`[2, ?, 64]`."""
    return "[" + ", ".join("?" if size == UNKNOWN else str(size) for size in shape) + "]"


def same(one: int, other: int) -> bool:
    """Whether two sizes may be equal at run time."""
    return one == other or UNKNOWN in (one, other)


def fits(one: Sequence[int], other: Sequence[int]) -> bool:
    """Whether two shapes may be equal at run time."""
    return len(one) == len(other) and all(map(same, one, other))


def broadcast(*shapes: Sequence[int]) -> Shape | None:
    """The common shape of operands that broadcast against each other, None where they do not."""
    rank = max(map(len, shapes))
    padded = [(1,) * (rank - len(shape)) + tuple(shape) for shape in shapes]
    common = []
    for sizes in zip(*padded, strict=True):
        known = {size for size in sizes if size not in (1, UNKNOWN)}
        if len(known) > 1:
            return None
        common.append(known.pop() if known else UNKNOWN if UNKNOWN in sizes else 1)
    return tuple(common)


def product(sizes: Iterable[int]) -> int:
    """Product of the sizes, UNKNOWN where one is."""
    total = 1
    for size in sizes:
        if size == UNKNOWN:
            return UNKNOWN
        total *= size
    return total
