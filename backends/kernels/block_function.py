"""`@q`: one block of a format rounded, as a function in the dialects arith, math and vector.

It is written from the numbers of the format's type alone. The algorithm is the one of `dialects/formats`, instruction
for instruction where an instruction rounds: divide by the scale (multiply by the exact inverse of a power of two),
clamp, bring to whole numbers by an exact power of two, round, bring back.
"""

from __future__ import annotations

from dataclasses import dataclass
from struct import pack, unpack

from xdsl.dialects.builtin import FunctionType, VectorType, f8E8M0FNU, f32, i32
from xdsl.dialects.func import FuncOp, ReturnOp
from xdsl.ir import Attribute, Block, Region, SSAValue

from ...dialects.formats._element import Element, Fixed, Minifloat
from ...dialects.formats._scale import minifloat_of_scale
from ._builder import Builder

EXPONENT = 0x7F800000
INFINITY = 0x7F800000
LARGEST = unpack("<f", pack("<I", 0x7F7FFFFF))[0]
"""The largest finite f32."""


@dataclass(frozen=True)
class BlockFunction:
    """The numbers that `@q` is written from.

    `lanes` is how many values it takes at once. `scale` is None where there is none; `tensor_scale` says that block
    scales stand under a scale of the tensor. `clip` scales the largest magnitude.
    """

    element: Element
    lanes: int
    scale: Attribute | None = None
    rule: str = "absmax"
    tensor_scale: bool = False
    rounding: str = "rne"
    clip: float | None = None


def block_function(numbers: BlockFunction) -> FuncOp:
    """`func @q(vector of lanes x f32, i32, f32) -> vector of lanes x f32`: part of a block, or values without a scale.

    The second argument are the bits of the block's largest magnitude, the third is the scale of the tensor; neither is
    read where there is none.
    """
    kind = VectorType(f32, [numbers.lanes])
    block = Block(arg_types=[kind, i32, f32])
    values, largest, over = block.args
    b = Builder(block, numbers.lanes)
    if numbers.scale is None:
        rounded = _element(b, values, numbers)
    else:
        rounded = _rounded(b, values, *scales_of(b, largest, over, numbers), numbers)
    block.add_op(ReturnOp(rounded))
    return FuncOp("q", FunctionType.from_lists([kind, i32, f32], [kind]), Region(block))


def magnitudes(lanes: int) -> FuncOp:
    """`func @magnitudes(vector of lanes x f32) -> vector of lanes x i32`: the bits of |x|, which order as |x| does."""
    kind = VectorType(f32, [lanes])
    block = Block(arg_types=[kind])
    block.add_op(ReturnOp(Builder(block, lanes).magnitude_bits(block.args[0])))
    return FuncOp("magnitudes", FunctionType.from_lists([kind], [VectorType(i32, [lanes])]), Region(block))


def scale_function(numbers: BlockFunction, blocks: int) -> FuncOp:
    """`func @scale(vector of blocks x i32, f32) -> (vector of blocks x f32, the same)`: for several blocks at once.

    From the bits of the largest magnitudes and the scale of the tensor: scales, and what values are brought to them by.
    """
    kind, largest = VectorType(f32, [blocks]), VectorType(i32, [blocks])
    block = Block(arg_types=[largest, f32])
    block.add_op(ReturnOp(*scales_of(Builder(block, blocks), block.args[0], block.args[1], numbers)))
    return FuncOp("scale", FunctionType.from_lists([largest, f32], [kind, kind]), Region(block))


def element_function(numbers: BlockFunction) -> FuncOp:
    """`func @elements(vector of lanes x f32, three times) -> the same`: values, scales, divisors to rounded values."""
    kind = VectorType(f32, [numbers.lanes])
    block = Block(arg_types=[kind] * 3)
    values, scale, divisor = block.args
    block.add_op(ReturnOp(_rounded(Builder(block, numbers.lanes), values, scale, divisor, numbers)))
    return FuncOp("elements", FunctionType.from_lists([kind] * 3, [kind]), Region(block))


def scales_of(b: Builder, largest: SSAValue, over: SSAValue, numbers: BlockFunction) -> tuple[SSAValue, SSAValue]:
    """The scale, and its exact inverse where it is a power of two, else what values are divided by."""
    _, scale, divisor = levels_of(b, largest, over, numbers)
    return scale, divisor


def levels_of(
    b: Builder, largest: SSAValue, over: SSAValue, numbers: BlockFunction
) -> tuple[SSAValue, SSAValue, SSAValue]:
    """The block's own scale as it is stored, its product with that of the tensor, what values are brought to it by."""
    if numbers.clip is not None:
        largest = b.bits(b.multiply(b.float(largest), b.number(numbers.clip)))
    if numbers.scale == f8E8M0FNU:
        scale, inverse = _power_of_two(b, largest, numbers)
        return scale, scale, inverse
    stored = _quotient(b, largest, over, numbers)
    scale = b.multiply(stored, over) if numbers.tensor_scale else stored
    zero = b.compare("oeq", scale, b.number(0.0))
    return stored, scale, b.select(zero, b.float(b.integer(INFINITY)), scale)


def _rounded(b: Builder, values: SSAValue, scale: SSAValue, divisor: SSAValue, numbers: BlockFunction) -> SSAValue:
    return _finite(b, b.multiply(scaled_element(b, values, divisor, numbers), scale))


def scaled_element(b: Builder, values: SSAValue, divisor: SSAValue, numbers: BlockFunction) -> SSAValue:
    """The values of the elements that stand for values under a scale."""
    if numbers.scale is None:
        return _element(b, values, numbers)
    exact = numbers.scale == f8E8M0FNU
    return _element(b, b.multiply(values, divisor) if exact else b.divide(values, divisor), numbers)


def _finite(b: Builder, value: SSAValue) -> SSAValue:
    """A product at most the largest finite f32: an element of a block with an infinity may round up beyond it."""
    return b.clamp(value, b.number(-LARGEST), b.number(LARGEST))


def _power_of_two(b: Builder, largest: SSAValue, numbers: BlockFunction) -> tuple[SSAValue, SSAValue]:
    """The E8M0 scale of a block and its exact inverse, from the bits of the largest magnitude.

    OCP MX 1.0 sections 5.3 and 6.3; a rule that rounds the magnitude up carries into its exponent field.
    """
    element = numbers.element
    carried = largest
    match numbers.rule:
        case "ceil":
            carried = b.add(_normal(b, largest, element), b.integer((1 << 23) - 1))
        case "even":
            carried = b.add(_normal(b, largest, element), b.integer(1 << (22 - element.precision)))
        case "rceil":
            top = int((element.largest * 2.0**-element.largest_exponent - 1) * 2**23)
            carried = b.add(_normal(b, largest, element), b.integer((1 << 23) - 1 - top))
    exponent = b.subtract(b.both(carried, b.integer(EXPONENT)), b.integer(element.largest_exponent << 23))
    if numbers.rule == "rceil":  # infinity has the largest scale, whatever the element
        infinite = b.compare("oeq", b.float(largest), b.float(b.integer(INFINITY)))
        exponent = b.select(infinite, b.integer(254 << 23), exponent)
    exponent = b.smaller(b.larger(exponent, b.integer(0)), b.integer(254 << 23))
    half = b.integer(1 << 22)  # the field of 2^-127, which is subnormal
    scale = b.float(b.larger(exponent, half))
    inverse = b.float(b.larger(b.subtract(b.integer(254 << 23), exponent), half))
    number = b.compare("oeq", b.float(largest), b.float(largest))
    return b.select(number, scale, b.float(b.integer(0x7FC00000))), inverse


def _normal(b: Builder, largest: SSAValue, element: Element) -> SSAValue:
    """The bits of a magnitude, for a carry into its exponent.

    Subnormals have scale 2^-127 whatever they carry where the element reaches 2 or more; elsewhere a subnormal above
    2^-127 counts as its true power of two, which is what the field 0 stands for, and a smaller one as zero.
    """
    if element.largest_exponent > 0:
        return largest
    beyond = b.subtract(largest, b.integer(1 << 22))
    doubled = b.larger(b.add(beyond, beyond), b.integer(0))  # the mantissa of a magnitude between 2^-127 and 2^-126
    subnormal = b.compare("olt", b.float(largest), b.float(b.integer(1 << 23)))
    return b.select(subnormal, doubled, largest)


def _quotient(b: Builder, largest: SSAValue, over: SSAValue, numbers: BlockFunction) -> SSAValue:
    """The float scale of a block: its largest magnitude over the element's, over the tensor's, in the scale's type."""
    assert numbers.scale is not None
    kind = minifloat_of_scale(numbers.scale)
    magnitude = b.float(largest)
    infinite = b.compare("oeq", magnitude, b.float(b.integer(INFINITY)))
    quotient = b.divide(b.select(infinite, b.number(LARGEST), magnitude), b.number(numbers.element.largest))
    if numbers.tensor_scale:
        quotient = b.divide(quotient, over)
    if numbers.scale == f32:
        rounded = quotient
    else:
        rounded = _half_of_f32(b, quotient, kind) if kind.needs_f64 else _minifloat(b, quotient, kind, "rne")
    smallest = b.number(kind.smallest)
    rounded = b.select(b.compare("olt", rounded, smallest), smallest, rounded)
    of_zero = b.number(kind.smallest if kind.bits == 8 else 1.0)
    # The quotient of a subnormal may round to zero in f32; without a tensor's scale the definition divides in f64.
    vanishing = quotient if numbers.tensor_scale else magnitude
    return b.select(b.compare("oeq", vanishing, b.number(0.0)), of_zero, rounded)


def _element(b: Builder, values: SSAValue, numbers: BlockFunction) -> SSAValue:
    """Values rounded to the element's grid, saturating; NaN stays NaN."""
    element = numbers.element
    if isinstance(element, Minifloat):
        return _minifloat(b, values, element, numbers.rounding)
    assert isinstance(element, Fixed)
    low, high = element.bottom_code, element.top_code
    if element.fraction:
        values = b.multiply(values, b.number(2.0**element.fraction))
    codes = _whole(b, b.clamp(values, b.number(low), b.number(high)), numbers.rounding)
    if element.fraction:
        codes = b.multiply(codes, b.number(2.0**-element.fraction))
    return b.add(codes, b.number(0.0))  # no negative zero


def _minifloat(b: Builder, values: SSAValue, element: Minifloat, rounding: str) -> SSAValue:
    if element.saturating:
        values = b.clamp(values, b.number(-element.largest), b.number(element.largest))
    exponent = b.both(b.bits(values), b.integer(EXPONENT))
    step = b.subtract(
        b.larger(exponent, b.integer((element.lowest_exponent + 127) << 23)), b.integer(element.precision << 23)
    )
    whole = _whole(b, b.multiply(values, b.float(b.subtract(b.integer(254 << 23), step))), rounding)
    rounded = b.multiply(whole, b.float(step))
    return rounded if element.has_negative_zero else b.add(rounded, b.number(0.0))


def _half_of_f32(b: Builder, value: SSAValue, kind: Minifloat) -> SSAValue:
    """A number that is not negative, in bf16: the upper bits of f32, which no product brings to its subnormals."""
    dropped = 23 - kind.precision
    top = b.number(kind.largest)
    bits = b.bits(b.select(b.compare("ogt", value, top), top, value))
    odd = b.both(b.shifted_right(bits, dropped), b.integer(1))
    carried = b.add(bits, b.add(odd, b.integer((1 << (dropped - 1)) - 1)))
    rounded = b.float(b.both(carried, b.integer((1 << 32) - (1 << dropped))))
    return b.select(b.compare("oeq", value, value), rounded, value)


def _whole(b: Builder, values: SSAValue, rounding: str) -> SSAValue:
    """Values rounded to whole numbers; zeros keep their sign."""
    if rounding == "rne":
        return b.round_even(values)
    if rounding == "rtz":
        return b.truncate(values)
    assert rounding == "rna"
    whole = b.truncate(values)
    rest = b.subtract(values, whole)
    return b.with_sign(b.magnitude(b.add(whole, b.truncate(b.add(rest, rest)))), values)
