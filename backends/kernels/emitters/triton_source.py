"""The block function as Triton source: one module of text with all kernels that a layout's rounding takes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from xdsl.dialects import arith, math
from xdsl.dialects.builtin import f32, i1, i32

from ....dialects.errors import MxloomError
from ..block_function import block_function, magnitudes
from ._spelling import Language, function_text
from .tensor_scale import magnitudes_without_nan, tensor_scale_function

if TYPE_CHECKING:
    from xdsl.dialects.func import FuncOp

    from .._layout import Layout

LARGEST_TILE = 4096
"""Blocks up to so many values stay in a program's registers; longer ones are read twice."""

TRITON = Language(
    name="Triton",
    constant="tl.full((), {value}, {type})",
    bitcast="{0}.to({type}, bitcast=True)",
    types={f32: "tl.float32", i32: "tl.int32", i1: "tl.int1"},
    calls={
        arith.DivfOp: "tl.div_rn({0}, {1})",  # `/` is approximate
        arith.MaxSIOp: "tl.maximum({0}, {1})",
        arith.MinSIOp: "tl.minimum({0}, {1})",
        arith.ShRUIOp: "shifted_right({0}, {1})",
        arith.SelectOp: "tl.where({0}, {1}, {2})",
        arith.SIToFPOp: "{0}.to(tl.float32)",
        math.RoundEvenOp: "round_even({0})",
        math.TruncOp: "truncated({0})",
    },
    bounds={
        "ogt": "tl.minimum({0}, {1}, propagate_nan=tl.PropagateNan.ALL)",
        "olt": "tl.maximum({0}, {1}, propagate_nan=tl.PropagateNan.ALL)",
    },
)

_ARITHMETIC = '''
@triton.jit
def with_sign(magnitude, sign):
    """A number that is not negative, with the sign of another."""
    bits = magnitude.to(tl.int32, bitcast=True) | (sign.to(tl.int32, bitcast=True) & -2147483648)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def magnitude_of(values):
    """|x|."""
    return (values.to(tl.int32, bitcast=True) & 2147483647).to(tl.float32, bitcast=True)


@triton.jit
def shifted_right(bits, places):
    """Bits moved towards the lowest, zeros behind them: the shift of i32 brings the sign along."""
    return (bits.to(tl.uint32, bitcast=True) >> places.to(tl.uint32, bitcast=True)).to(tl.int32, bitcast=True)


@triton.jit
def nearest(magnitude):
    """A number that is not negative, to the nearest whole number, ties to even. From 2^23 on every f32 is one."""
    return tl.where(magnitude < 8388608.0, (magnitude + 8388608.0) - 8388608.0, magnitude)


@triton.jit
def round_even(values):
    """To the nearest whole number, ties to even; zeros keep their sign."""
    return with_sign(nearest(magnitude_of(values)), values)


@triton.jit
def truncated(values):
    """Towards zero to a whole number; zeros keep their sign."""
    magnitude = magnitude_of(values)
    whole = nearest(magnitude)
    return with_sign(tl.where(whole > magnitude, whole - 1.0, whole), values)
'''

_NARROWED = '''
@triton.jit
def narrowed(values, TOP: tl.constexpr):
    """Values between those that the target can hold; TOP is 0 for f32."""
    if TOP > 0:
        values = tl.minimum(values, TOP, propagate_nan=tl.PropagateNan.ALL)
        values = tl.maximum(values, -TOP, propagate_nan=tl.PropagateNan.ALL)
    return values
'''

_LARGEST = '''
@triton.jit
def largest(source, seen, count, TILE: tl.constexpr):
    """The bits of the largest magnitude of all values, in `seen`, which holds 0 before."""
    first = tl.program_id(0).to(tl.int64) * TILE
    lane = tl.arange(0, TILE)
    values = tl.load(source + first + lane, mask=lane < count - first, other=0.0).to(tl.float32)
    tl.atomic_max(seen, tl.max({magnitudes}(values), axis=0), sem="relaxed")
'''

_ELEMENTS = '''
@triton.jit
def rounding(source, target, seen, count, TILE: tl.constexpr, TOP: tl.constexpr):
    """Every value alone, or with one scale for all."""
    first = tl.program_id(0).to(tl.int64) * TILE
    lane = tl.arange(0, TILE)
    inside = lane < count - first
    values = tl.load(source + first + lane, mask=inside, other=0.0).to(tl.float32)
    rounded = q(values, {largest}, 1.0)
    tl.store(target + first + lane, narrowed(rounded, TOP).to(target.dtype.element_ty), mask=inside)
'''

_BLOCKS = '''
@triton.jit
def rounding(
    source, target, seen, count, SIZE: tl.constexpr, WIDTH: tl.constexpr, BLOCKS: tl.constexpr, TOP: tl.constexpr
):
    """`count` blocks of SIZE values each, BLOCKS to a program; WIDTH is the power of two that holds SIZE."""
    first = tl.program_id(0).to(tl.int64) * BLOCKS
    block = tl.arange(0, BLOCKS)[:, None]
    lane = tl.arange(0, WIDTH)[None, :]
    inside = block < count - first
    if SIZE < WIDTH:
        inside = inside & (lane < SIZE)
    at = first * SIZE + (block * SIZE + lane)
    values = tl.load(source + at, mask=inside, other=0.0).to(tl.float32)
    most = tl.max(magnitudes(values), axis=1, keep_dims=True)
    rounded = q(values, most, {over})
    tl.store(target + at, narrowed(rounded, TOP).to(target.dtype.element_ty), mask=inside)
'''

_ROWS = '''
@triton.jit
def rounding(source, target, seen, length, TILE: tl.constexpr, TOP: tl.constexpr):
    """A block of `length` values to each program, read for its largest magnitude, then rounded."""
    first = tl.program_id(0).to(tl.int64) * length
    lane = tl.arange(0, TILE)
    own = tl.zeros([TILE], tl.int32)
    for start in range(0, length, TILE):
        values = tl.load(source + first + start + lane, mask=start + lane < length, other=0.0).to(tl.float32)
        own = tl.maximum(own, magnitudes(values))
    most = tl.max(own, axis=0)
    over = {over}
    for start in range(0, length, TILE):
        inside = start + lane < length
        values = tl.load(source + first + start + lane, mask=inside, other=0.0).to(tl.float32)
        rounded = q(values, most, over)
        tl.store(target + first + start + lane, narrowed(rounded, TOP).to(target.dtype.element_ty), mask=inside)
'''


def triton_source(layout: Layout) -> str:
    """A module of Triton kernels that round tensors of a layout: `rounding`, and `largest` where it needs one.

    The kernels take f32, bf16 and f16, compute in f32 and write what the target holds. They are to be launched without
    fusion of products and sums (`enable_fp_fusion=False`): they round where the definition rounds. Raises MxloomError
    for a layout or an operation that has no form in Triton.
    """
    numbers = layout.function
    parts = [_HEAD, _ARITHMETIC, _NARROWED]
    over = "1.0"
    if layout.kind == "whole" or numbers.tensor_scale:
        name = "magnitudes_without_nan" if numbers.tensor_scale else "magnitudes"
        measured = magnitudes_without_nan(1) if numbers.tensor_scale else magnitudes(1)
        parts += [_device_function(measured, ["values"]), _LARGEST.format(magnitudes=name)]
    if numbers.tensor_scale:
        parts.append(_device_function(tensor_scale_function(numbers), ["largest"]))
        over = "tensor_scale(tl.load(seen))"
    parts.append(_device_function(block_function(numbers), ["values", "largest", "over"]))
    match layout.kind:
        case "elements" | "whole":
            parts.append(_ELEMENTS.format(largest="tl.load(seen)" if layout.kind == "whole" else "0"))
        case "blocks" | "rows":
            kernel = _ROWS if layout.size > LARGEST_TILE else _BLOCKS
            parts += [_device_function(magnitudes(1), ["values"]), kernel.format(over=over)]
        case _:
            raise MxloomError(f"tensors of the layout {layout.kind} have no kernel in Triton")
    return "\n".join(parts)


_HEAD = """import triton
import triton.language as tl

# Launch with enable_fp_fusion=False: every operation rounds for itself.
"""


def _device_function(function: FuncOp, arguments: list[str]) -> str:
    return "\n".join(["", "@triton.jit", *function_text(function, TRITON, arguments), ""])
