"""The block function as Triton source: one module of text with all kernels that a layout's rounding takes."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from xdsl.dialects import arith, math
from xdsl.dialects.builtin import f32, f64, i1, i32, i64

from ._spelling import Language, function_text
from .parts import parts, refuse

if TYPE_CHECKING:
    from .._layout import Layout

LARGEST_TILE = 4096
"""Blocks up to so many values stay in a program's registers; longer ones are read twice."""

TRITON = Language(
    name="Triton",
    constant="tl.full((), {value}, {type})",
    bitcast="{0}.to({type}, bitcast=True)",
    types={f32: "tl.float32", f64: "tl.float64", i1: "tl.int1", i32: "tl.int32", i64: "tl.int64"},
    calls={
        arith.DivfOp: "tl.div_rn({0}, {1})",  # `/` is approximate
        arith.MaxSIOp: "tl.maximum({0}, {1})",
        arith.MinSIOp: "tl.minimum({0}, {1})",
        arith.ShRUIOp: "shifted_right({0}, {1})",
        arith.SelectOp: "tl.where({0}, {1}, {2})",
        arith.ExtFOp: "{0}.to(tl.float64)",
        arith.TruncFOp: "{0}.to(tl.float32)",
        math.RoundEvenOp: "round_even({0})",
        math.TruncOp: "truncated({0})",
    },
    wide={
        arith.DivfOp: "{0} / {1}",  # exact in f64 alone
        math.RoundEvenOp: "round_even_wide({0})",
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
def round_even_wide(values):
    """The same in f64, where every number from 2^52 on is whole."""
    sign = values.to(tl.int64, bitcast=True) & -9223372036854775808
    magnitude = (values.to(tl.int64, bitcast=True) & 9223372036854775807).to(tl.float64, bitcast=True)
    rounded = (magnitude + 4503599627370496.0) - 4503599627370496.0
    whole = tl.where(magnitude < 4503599627370496.0, rounded, magnitude)
    return (whole.to(tl.int64, bitcast=True) | sign).to(tl.float64, bitcast=True)


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

_MEASURING = '''
@triton.jit
def measuring(source, seen, count, TILE: tl.constexpr):
    """What the whole tensor's scale is made from, in `seen`, which holds zeros before."""
    first = tl.program_id(0).to(tl.int64) * TILE
    lane = tl.arange(0, TILE)
    values = tl.load(source + first + lane, mask=lane < count - first, other=0.0).to(tl.float32)
    {measure}
    {atomics}
'''

_ELEMENTS = '''
@triton.jit
def rounding(source, target, seen, count, TILE: tl.constexpr, TOP: tl.constexpr):
    """Every value alone, or with one scale for all."""
    first = tl.program_id(0).to(tl.int64) * TILE
    lane = tl.arange(0, TILE)
    inside = lane < count - first
    values = tl.load(source + first + lane, mask=inside, other=0.0).to(tl.float32)
    {scale}
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
    {measure}
    {reduce}
    {scale}
    tl.store(target + at, narrowed(rounded, TOP).to(target.dtype.element_ty), mask=inside)
'''

_ROWS = '''
@triton.jit
def rounding(source, target, seen, length, TILE: tl.constexpr, TOP: tl.constexpr):
    """A block of `length` values to each program, read for its scale, then rounded."""
    first = tl.program_id(0).to(tl.int64) * length
    lane = tl.arange(0, TILE)
    {start}
    for start in range(0, length, TILE):
        values = tl.load(source + first + start + lane, mask=start + lane < length, other=0.0).to(tl.float32)
        {measure}
        {keep}
    {reduce}
    {over}
    for start in range(0, length, TILE):
        inside = start + lane < length
        values = tl.load(source + first + start + lane, mask=inside, other=0.0).to(tl.float32)
        {elements}
        tl.store(target + first + start + lane, narrowed(rounded, TOP).to(target.dtype.element_ty), mask=inside)
'''


def triton_source(layout: Layout) -> str:
    """A module of Triton kernels that round tensors of a layout: `rounding`, and `measuring` where it needs one.

    The kernels take f32, bf16 and f16, compute in f32 (scales beside zero points in f64) and write what the target
    holds. They are to be launched without fusion of products and sums (`enable_fp_fusion=False`): they round where the
    definition rounds. Raises MxloomError for a layout or an operation that has no form in Triton.
    """
    refuse(layout, "Triton")
    numbers, functions = layout.function, parts(layout.function)
    written = ["\n".join(["@triton.jit", *function_text(f, TRITON, names), ""]) for f, names in functions.values()]
    head = [_HEAD, _ARITHMETIC, _NARROWED, *(f"\n{text}" for text in written)]
    if layout.kind == "elements":
        return "\n".join([*head, _filled(_ELEMENTS, scale=["rounded = q(values, 0, 1.0)"])])
    reduced, scales = functions["scale"][1][:-1], functions["elements"][1][1:]
    measured = functions["measure"][0].sym_name.data
    measure = [f"{', '.join(reduced)} = {measured}(values)"]
    which = ["max" if reduction.endswith("max") else "min" for reduction in numbers.reductions]
    over = "tensor_scale(tl.load(seen))" if numbers.tensor_scale else "1.0"
    scale = [f"{', '.join(scales)} = scale({', '.join(reduced)}, {over})"]
    elements = [f"rounded = elements(values, {', '.join(scales)})"]
    if layout.kind == "whole" or numbers.tensor_scale:
        atomics = [
            f'tl.atomic_{which}(seen + {place}, tl.{which}({name}, axis=0), sem="relaxed")'
            for place, (which, name) in enumerate(zip(which, reduced, strict=True))
        ]
        own = ["largest = magnitudes_without_nan(values)"] if numbers.tensor_scale else measure
        head.append(_filled(_MEASURING, measure=own, atomics=atomics))
    if layout.kind == "whole":
        loaded = [f"{name} = tl.load(seen + {place})" for place, name in enumerate(reduced)]
        return "\n".join([*head, _filled(_ELEMENTS, scale=[*loaded, *scale, *elements])])
    if layout.size <= LARGEST_TILE:
        reduce = [f"{n} = tl.{w}({n}, axis=1, keep_dims=True)" for w, n in zip(which, reduced, strict=True)]
        return "\n".join([*head, _filled(_BLOCKS, measure=measure, reduce=reduce, scale=[*scale, *elements])])
    kept = list(zip(which, reduced, [f"{name}_seen" for name in reduced], strict=True))
    kernel = _filled(
        _ROWS,
        start=[f"{seen} = tl.zeros([TILE], tl.int32)" for _, _, seen in kept],
        measure=measure,
        keep=[f"{seen} = tl.{which}imum({seen}, {name})" for which, name, seen in kept],
        reduce=[f"{name} = tl.{which}({seen}, axis=0)" for which, name, seen in kept],
        over=scale,
        elements=elements,
    )
    return "\n".join([*head, kernel])


_HEAD = """import triton
import triton.language as tl

# Launch with enable_fp_fusion=False: every operation rounds for itself.
"""


def _filled(kernel: str, **lines: list[str]) -> str:
    """A kernel with lines in place of names in braces, as far to the right as these stand."""
    for name, found in lines.items():
        indent = re.search(rf"^( *)\{{{name}\}}$", kernel, re.MULTILINE)
        assert indent is not None
        kernel = kernel.replace(f"{{{name}}}", f"\n{indent[1]}".join(found))
    return kernel
