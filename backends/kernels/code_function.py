"""`@code_scale` and `@codes`: one block of a format as whole numbers and one factor, for arithmetic on codes.

Every value of an element is a whole number of steps, its smallest positive value; a code is that number, or the
value itself (step 1) where the number takes more than 16 bits. So value = code x (scale x step), where the product in
brackets is exact but for subnormals.
"""

from __future__ import annotations

from xdsl.dialects.builtin import FunctionType, VectorType, f32, i32
from xdsl.dialects.func import FuncOp, ReturnOp
from xdsl.ir import Attribute, Block, Region

from ...dialects.contractions import LARGEST_CODE, bounds_of, step_of
from ...dialects.formats._element import Fixed
from ._builder import Builder
from .block_function import INFINITY, LARGEST, BlockFunction, levels_of, scaled_element

_TO_BITS = 1.5 * 2**23
"""Added to a whole number below 2^22 it leaves that number in the lowest bits of the sum."""


def code_bits(numbers: BlockFunction) -> int:
    """Bits of a code in memory: 8 or 16 of an integer, or 64 of the f64 that holds an element as it is."""
    bounds = bounds_of(numbers.element)
    if bounds.step < 1:
        return 64
    fits = bounds.largest <= 127 or (isinstance(numbers.element, Fixed) and numbers.element.width <= 8)
    return 8 if fits else 16


def why_no_codes(numbers: BlockFunction) -> str | None:
    """Why the values of a format are not kept as codes under a factor."""
    if bounds_of(numbers.element).largest > LARGEST_CODE and code_bits(numbers) < 64:
        return "the element's values are no whole numbers of 16 bits"
    step = step_of(numbers.element)
    return "the element's step lies outside 2^-22 to 1" if not 2.0**-22 <= step <= 1 else None


def code_scale_function(numbers: BlockFunction, blocks: int | None) -> FuncOp:
    """`func @code_scale(i32, f32) -> (f32, f32, i32)`: for one block, or for a vector of `blocks` at once.

    From the bits of the largest magnitude and the scale of the tensor: the block's own scale x step; what values are
    brought to the scale by; and 1 where code x scale x step may not be the value, since scale x step is no f32 or the
    largest value passes f32 (there the definitions saturate), else 0. A block with a NaN has scale NaN.
    """
    whole, real = _kinds(blocks)
    block = Block(arg_types=[whole, f32])
    largest, over = block.args
    b = Builder(block, blocks or 1)
    step = step_of(numbers.element)
    if numbers.scale is None:
        is_number = b.compare("oeq", b.float(largest), b.float(largest))
        scale = b.select(is_number, b.number(1.0), b.float(b.integer(INFINITY | 1 << 22)))
        product, divisor = scale, b.number(1.0)
    else:
        scale, product, divisor = levels_of(b, largest, over, numbers)
    factor = b.multiply(scale, b.number(step))
    back = b.multiply(factor, b.number(1 / step))
    yes, no = b.integer(1), b.integer(0)
    inexact = b.select(b.compare("olt", back, scale), yes, b.select(b.compare("ogt", back, scale), yes, no))
    top = b.multiply(product, b.number(numbers.element.largest))
    inexact = b.select(b.compare("ogt", top, b.number(LARGEST)), yes, inexact)
    if blocks is not None and numbers.scale is None:
        divisor = b.spread(divisor)
    block.add_op(ReturnOp(factor, divisor, inexact))
    return FuncOp("code_scale", FunctionType.from_lists([whole, f32], [real, real, whole]), Region(block))


def code_function(numbers: BlockFunction) -> FuncOp:
    """`func @codes(vector of lanes x f32, the same) -> vector of lanes x i32`: values and divisors to codes.

    Codes that are elements as they are, are f32. NaN has code 0, as negative zero has among whole numbers.
    """
    kind = VectorType(f32, [numbers.lanes])
    whole = VectorType(i32, [numbers.lanes])
    block = Block(arg_types=[kind] * 2)
    values, divisor = block.args
    b = Builder(block, numbers.lanes)
    rounded = scaled_element(b, values, divisor, numbers)
    if code_bits(numbers) == 64:
        block.add_op(ReturnOp(b.select(b.compare("oeq", rounded, rounded), rounded, b.number(0.0))))
        return FuncOp("codes", FunctionType.from_lists([kind] * 2, [kind]), Region(block))
    steps = b.multiply(rounded, b.number(1 / step_of(numbers.element)))
    codes = b.subtract(b.bits(b.add(steps, b.number(_TO_BITS))), b.bits(b.number(_TO_BITS)))
    block.add_op(ReturnOp(b.select(b.compare("oeq", steps, steps), codes, b.integer(0))))
    return FuncOp("codes", FunctionType.from_lists([kind] * 2, [whole]), Region(block))


def _kinds(blocks: int | None) -> tuple[Attribute, Attribute]:
    if blocks is None:
        return i32, f32
    return VectorType(i32, [blocks]), VectorType(f32, [blocks])
