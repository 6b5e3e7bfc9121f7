"""`@candidate_scale` and `@error`: what a block loses under many scales at once, one candidate to a lane."""

from __future__ import annotations

from typing import Literal

from xdsl.dialects.builtin import FunctionType, VectorType, f8E8M0FNU, f32, f64, i32
from xdsl.dialects.func import FuncOp, ReturnOp
from xdsl.ir import Block, Region, SSAValue

from ._builder import Builder
from .block_function import BlockFunction, divisor_of, scales_of
from .zero_point import scale_and_zero_point

Candidates = Literal["clips", "scales", "multiples"]
"""What a candidate number is: the part of the largest magnitude that the scale is made for; the scale that a block
stores; a power of two that the block's own power-of-two scale is multiplied with."""


def candidate_scale_function(numbers: BlockFunction, kind: Candidates) -> FuncOp:
    """`func @candidate_scale(i32 ..., f32, lanes x f64) -> (lanes x f32, twice or three times)`.

    From what `@measure` gives for one block, the scale of the tensor and one candidate in each lane: scales, what
    values are brought to them by, zero points where blocks have them.
    """
    real = VectorType(f32, [numbers.lanes])
    kinds = [*([i32] * len(numbers.reductions)), f32, VectorType(f64, [numbers.lanes])]
    block = Block(arg_types=kinds)
    *measured, over, candidates = block.args
    b = Builder(block, numbers.lanes)
    assert numbers.scale is not None
    if numbers.zero_points:
        low, high = (b.float(b.ordered(key)) for key in measured)
        scale, zero = scale_and_zero_point(b, low, high, numbers.element, numbers.scale, candidates)
        results = [scale, divisor_of(b, scale), zero]
    else:
        results = [*_scales(b, measured[0], over, b.narrow(candidates), numbers, kind)]
    block.add_op(ReturnOp(*results))
    return FuncOp("candidate_scale", FunctionType.from_lists(kinds, [real] * len(results)), Region(block))


def _scales(
    b: Builder, largest: SSAValue, over: SSAValue, candidates: SSAValue, numbers: BlockFunction, kind: Candidates
) -> tuple[SSAValue, SSAValue]:
    if kind == "clips":
        return scales_of(b, b.bits(b.multiply(b.float(largest), candidates)), over, numbers)
    if kind == "scales":
        scale = b.multiply(candidates, over) if numbers.tensor_scale else candidates
    else:
        own, _ = scales_of(b, largest, over, numbers)
        scale = b.clamp(b.multiply(own, candidates), b.number(2.0**-127), b.number(2.0**127))
    if numbers.scale == f8E8M0FNU:
        return scale, b.divide(b.number(1.0), scale)
    return scale, divisor_of(b, scale)


def error_function(lanes: int) -> FuncOp:
    """`func @error(f32, lanes x f32, f32, lanes x f64) -> lanes x f64`: a value, its roundings, its weight, sums.

    The sums with weight x (value - rounding)^2 added; difference, square, product and sum are each rounded to f64.
    """
    real, wide = VectorType(f32, [lanes]), VectorType(f64, [lanes])
    kinds = [f32, real, f32, wide]
    block = Block(arg_types=kinds)
    value, rounded, weight, sums = block.args
    b = Builder(block, lanes)
    off = b.subtract(b.wide(value), b.wide(rounded))
    block.add_op(ReturnOp(b.add(sums, b.multiply(b.multiply(off, off), b.wide(weight)))))
    return FuncOp("error", FunctionType.from_lists(kinds, [wide]), Region(block))
