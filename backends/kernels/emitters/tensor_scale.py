"""`@tensor_scale` and the magnitudes it is made from: the scale over the block scales of a tensor."""

from __future__ import annotations

from xdsl.dialects.builtin import FunctionType, VectorType, f32, i32
from xdsl.dialects.func import FuncOp, ReturnOp
from xdsl.ir import Block, Region

from ....dialects.formats._scale import minifloat_of_scale
from .._builder import Builder
from ..block_function import INFINITY, LARGEST, BlockFunction


def magnitudes_without_nan(lanes: int) -> FuncOp:
    """`func @magnitudes_without_nan(vector of lanes x f32) -> vector of lanes x i32`: the bits of |x|, zero for NaN."""
    kind = VectorType(f32, [lanes])
    block = Block(arg_types=[kind])
    b = Builder(block, lanes)
    (values,) = block.args
    number = b.compare("oeq", values, values)
    block.add_op(ReturnOp(b.select(number, b.magnitude_bits(values), b.integer(0))))
    signature = FunctionType.from_lists([kind], [VectorType(i32, [lanes])])
    return FuncOp("magnitudes_without_nan", signature, Region(block))


def tensor_scale_function(numbers: BlockFunction) -> FuncOp:
    """`func @tensor_scale(i32) -> f32`: from the bits of the largest magnitude, infinity as the largest finite f32.

    What `dialects/formats` computes: largest / (the element's largest * the scale's largest), 1 where that is zero.
    """
    assert numbers.scale is not None
    block = Block(arg_types=[i32])
    b = Builder(block, 1)
    largest = b.float(b.smaller(block.args[0], b.integer(INFINITY - 1)))
    if numbers.clip is not None:
        largest = b.multiply(largest, b.number(numbers.clip))
    quotient = b.divide(largest, b.number(numbers.element.largest * minifloat_of_scale(numbers.scale).largest))
    quotient = b.select(b.compare("ogt", quotient, b.number(LARGEST)), b.number(LARGEST), quotient)
    block.add_op(ReturnOp(b.select(b.compare("oeq", quotient, b.number(0.0)), b.number(1.0), quotient)))
    return FuncOp("tensor_scale", FunctionType.from_lists([i32], [f32]), Region(block))
