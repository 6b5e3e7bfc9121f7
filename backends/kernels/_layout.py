"""Which kernel rounds a tensor into a format, decided once for each format, rounding and shape."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from math import prod
from typing import TYPE_CHECKING, Literal

from xdsl.dialects.builtin import NoneAttr

from ...dialects.formats import BlockType, Rounding
from ...dialects.formats._builtin import numbers_of
from ...dialects.formats._element import Element, Fixed, Minifloat
from ...dialects.formats._format import SEARCHED_RULES
from ...dialects.formats._plain import Plain, refuse_scale_options
from .block_function import BlockFunction

if TYPE_CHECKING:
    from xdsl.ir import Attribute

    from ...dialects.formats._tiling import Tiling

LANES = 32
"""Values that a kernel takes at once where the format does not say how many."""

LARGEST_VECTOR = 64
"""Blocks up to so many values stay in registers; longer ones are read twice."""

Kind = Literal["elements", "blocks", "rows", "whole", "means"]


@dataclass(frozen=True)
class Layout:
    """How one tensor is rounded: which kernel, with which numbers, on which order of its values.

    elements: every value alone. blocks: each of `size` values, held in registers. rows: each block of `size` values is
    read twice. whole: the tensor is one block, so that its threads share one largest magnitude. means: as rows, but the
    scales of all rows are computed before. `tiling` is None where the tensor's own order is the order of its blocks;
    `padding` are zeros behind each block. `own` is how many values a block has that are no padding, None where that
    differs. `split` is the shape of the values while they are rounded, in which noise from `seed` is drawn.
    """

    kind: Kind
    function: BlockFunction
    size: int = 1
    padding: int = 0
    tiling: Tiling | None = None
    own: int | None = None
    split: tuple[int, ...] = ()
    seed: int = 0


@lru_cache(maxsize=4096)
def layout_of(fmt: Attribute, how: Rounding, shape: tuple[int, ...]) -> Layout | str:
    """The layout of a tensor of `shape`, or why there is no kernel for this format and rounding.

    Raises UsageError for options that mean nothing for the format, as rounding itself does.
    """
    numbers = block_numbers(fmt, how)
    if isinstance(numbers, str) or numbers.scale is None:
        return numbers if isinstance(numbers, str) else Layout("elements", numbers, split=shape, seed=how.seed)
    assert isinstance(fmt, BlockType)
    tiling = fmt.tiling(shape)
    size = prod(tiling.block)
    in_order = not tiling.is_ragged and _is_contiguous(tiling.block, tiling.trailing)
    pairs = zip(tiling.tiles, tiling.block, strict=True)
    laid = Layout(
        "whole",
        numbers,
        size,
        tiling=None if in_order else tiling,
        own=None if tiling.is_ragged else size,
        split=(*tiling.leading, *(length for pair in pairs for length in pair)),
        seed=how.seed,
    )
    means = numbers.rule == "absmean"
    if prod(tiling.grid) == 1 and (size > LARGEST_VECTOR or means) and not numbers.tensor_scale:
        return laid
    if size <= LARGEST_VECTOR and size & (size - 1) == 0 and not means:
        return replace(laid, kind="blocks", function=replace(numbers, lanes=size))
    padding = -size % 8
    lanes = next(lanes for lanes in (32, 16, 8) if (size + padding) % lanes == 0)
    kind = "means" if means else "rows"
    laid = replace(laid, kind=kind, function=replace(numbers, lanes=lanes), padding=padding)
    return replace(laid, tiling=tiling) if padding else laid


def block_numbers(fmt: Attribute, how: Rounding) -> BlockFunction | str:
    """What the block function of a format and a rounding is written from, or why there is none."""
    numbers = numbers_of(fmt)
    if isinstance(numbers, Plain):
        refuse_scale_options(numbers, how)
        return _refusal(numbers.element_numbers) or BlockFunction(numbers.element_numbers, LANES, rounding=how.rounding)
    if not isinstance(numbers, BlockType):
        return f"no kernel for {getattr(fmt, 'name', fmt)}"
    return _scaled(numbers, how)


def _scaled(fmt: BlockType, how: Rounding) -> BlockFunction | str:
    rule = fmt.rule(how)
    if rule in SEARCHED_RULES:
        return f"the scale rule {rule} tries several scales"
    element = fmt.scaling((1,) * len(fmt.dims)).element
    return _refusal(element) or BlockFunction(
        element,
        LANES,
        fmt.scale,
        rule,
        tensor_scale=fmt.tensor_scale != NoneAttr(),
        rounding=how.rounding,
        clip=how.clip,
    )


def _refusal(element: Element) -> str | None:
    if not isinstance(element, Fixed | Minifloat):
        return "the element is no fixed-point number or minifloat"
    if element.needs_f64:
        return "the element needs f64"
    if isinstance(element, Minifloat) and not element.saturating:
        return "the element overflows to infinity"
    return None


def _is_contiguous(block: Sequence[int], trailing: Sequence[int]) -> bool:
    """Whether a block's values lie one behind the other: whole dimensions from the last, then one part, then ones."""
    sizes = list(zip(block, trailing, strict=True))
    while sizes and sizes[-1][0] == sizes[-1][1]:
        sizes.pop()
    return all(size == 1 for size, _ in sizes[:-1])
