"""`@q`: one block of a format rounded, as a function in the dialects arith, math and vector.

It is written from the numbers of the format's type alone. The algorithm is the one of `dialects/formats`, instruction
for instruction where an instruction rounds: divide by the scale (multiply by the exact inverse of a power of two),
clamp, bring to whole numbers by an exact power of two, round, bring back.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from struct import pack, unpack

from xdsl.dialects.builtin import FunctionType, VectorType, f8E8M0FNU, f32, i32
from xdsl.dialects.func import FuncOp, ReturnOp
from xdsl.ir import Attribute, Block, Region, SSAValue

from ...dialects.formats._element import Element, Fixed, Minifloat
from ...dialects.formats._scale import minifloat_of_scale
from ._builder import Builder
from .zero_point import scale_and_zero_point

EXPONENT = 0x7F800000
INFINITY = 0x7F800000
LARGEST = unpack("<f", pack("<I", 0x7F7FFFFF))[0]
"""The largest finite f32."""


@dataclass(frozen=True)
class BlockFunction:
    """The numbers that `@q` is written from.

    `lanes` is how many values it takes at once. `scale` is None where there is none; `tensor_scale` says that block
    scales stand under a scale of the tensor. `clip` scales the largest magnitude. Under the rule minmax blocks have
    zero points. Under the rule absmean scales are computed before (a mean is no matter of one block's registers).
    """

    element: Element
    lanes: int
    scale: Attribute | None = None
    rule: str = "absmax"
    tensor_scale: bool = False
    rounding: str = "rne"
    clip: float | None = None

    @property
    def zero_points(self) -> bool:
        return self.rule == "minmax"

    @property
    def noisy(self) -> bool:
        """Whether functions take noise in [0, 1) as their last argument, one number per value."""
        return self.rounding == "stochastic"

    @property
    def reductions(self) -> tuple[str, ...]:
        """What brings the results of `@measure` together, over lanes and pieces."""
        return ("smin", "smax") if self.zero_points else ("umax",)


def block_function(numbers: BlockFunction) -> FuncOp:
    """`func @q(vector of lanes x f32, i32, f32) -> vector of lanes x f32`: part of a block, or values without a scale.

    The second argument are the bits of the block's largest magnitude, the third is the scale of the tensor; neither is
    read where there is none. Under the rules absmean and minmax the third is the block's scale; under minmax the second
    are the bits of the zero point (f32).
    """
    kind = VectorType(f32, [numbers.lanes])
    kinds = [kind, i32, f32] + [kind] * numbers.noisy
    block = Block(arg_types=kinds)
    values, given, over, *noise = block.args
    b = Builder(block, numbers.lanes)
    if numbers.scale is None:
        rounded = _element(b, values, numbers, noise)
    elif numbers.zero_points:
        rounded = _finite(b, _shifted(b, values, over, divisor_of(b, over), b.float(given), numbers, noise))
    else:
        scale, divisor = scales_of(b, given, over, numbers)
        rounded = _finite(b, b.multiply(scaled_element(b, values, divisor, numbers, noise), scale))
    block.add_op(ReturnOp(rounded))
    return FuncOp("q", FunctionType.from_lists(kinds, [kind]), Region(block))


def magnitudes(lanes: int) -> FuncOp:
    """`func @magnitudes(vector of lanes x f32) -> vector of lanes x i32`: the bits of |x|, which order as |x| does."""
    kind = VectorType(f32, [lanes])
    block = Block(arg_types=[kind])
    block.add_op(ReturnOp(Builder(block, lanes).magnitude_bits(block.args[0])))
    return FuncOp("magnitudes", FunctionType.from_lists([kind], [VectorType(i32, [lanes])]), Region(block))


def measure_function(numbers: BlockFunction) -> FuncOp:
    """`func @measure(vector of lanes x f32) -> vectors of lanes x i32`: what a scale is made from, once reduced.

    The bits of magnitudes; under the rule minmax twice the values as integers that order as they do.
    """
    if not numbers.zero_points:
        return magnitudes(numbers.lanes)
    kind, keys = VectorType(f32, [numbers.lanes]), VectorType(i32, [numbers.lanes])
    block = Block(arg_types=[kind])
    b = Builder(block, numbers.lanes)
    ordered = b.ordered(b.bits(block.args[0]))
    block.add_op(ReturnOp(ordered, ordered))
    return FuncOp("measure", FunctionType.from_lists([kind], [keys, keys]), Region(block))


def scale_function(numbers: BlockFunction, blocks: int | None) -> FuncOp:
    """`func @scale(i32 ..., f32) -> (f32, f32 ...)`: for one block, or for vectors of `blocks` at once.

    From the reduced results of `@measure` and the scale of the tensor: scales; what values are divided by (where scales
    are powers of two: multiplied with); zero points, where blocks have them.
    """
    whole: Attribute = i32 if blocks is None else VectorType(i32, [blocks])
    real: Attribute = f32 if blocks is None else VectorType(f32, [blocks])
    measured = [whole] * len(numbers.reductions)
    block = Block(arg_types=[*measured, f32])
    b = Builder(block, blocks or 1)
    if numbers.zero_points:
        assert numbers.scale is not None
        low, high = (b.float(b.ordered(key)) for key in block.args[:2])
        scale, zero = scale_and_zero_point(b, low, high, numbers.element, numbers.scale, numbers.clip)
        results = [scale, divisor_of(b, scale), zero]
    else:
        results = [*scales_of(b, block.args[0], block.args[1], numbers)]
    block.add_op(ReturnOp(*results))
    return FuncOp("scale", FunctionType.from_lists([*measured, f32], [real] * len(results)), Region(block))


def bounds_function(lanes: int) -> FuncOp:
    """`func @bounded(vector of lanes x f32) -> the same`: at most the largest finite f32; NaN stays NaN."""
    kind = VectorType(f32, [lanes])
    block = Block(arg_types=[kind])
    block.add_op(ReturnOp(_finite(Builder(block, lanes), block.args[0])))
    return FuncOp("bounded", FunctionType.from_lists([kind], [kind]), Region(block))


def largest_safe_scale(numbers: BlockFunction) -> float:
    """A scale up to which no rounded value passes f32."""
    element = numbers.element
    reach = element.largest
    if isinstance(element, Fixed):
        codes = element.top_code - element.bottom_code if numbers.zero_points else -element.bottom_code
        reach = codes * 2.0**-element.fraction
    return min(LARGEST / (4 * reach), LARGEST)


def element_function(numbers: BlockFunction, *, bounded: bool = True) -> FuncOp:
    """`func @elements(vector of lanes x f32, ...) -> vector of lanes x f32`: values to rounded values.

    Beside the values it takes what `@scale` gives, in every lane, and noise where rounding is stochastic. Where results
    are not `bounded`, those of scales above `largest_safe_scale` are still to be brought within f32 by `@bounded`.
    """
    kind = VectorType(f32, [numbers.lanes])
    kinds = [kind] * (3 + numbers.zero_points + numbers.noisy)
    block = Block(arg_types=kinds)
    values, scale, divisor, *others = block.args
    b = Builder(block, numbers.lanes)
    if numbers.zero_points:
        products = _shifted(b, values, scale, divisor, others[0], numbers, others[1:])
    else:
        products = b.multiply(scaled_element(b, values, divisor, numbers, others), scale)
    block.add_op(ReturnOp(_finite(b, products) if bounded else products))
    return FuncOp("elements", FunctionType.from_lists(kinds, [kind]), Region(block))


def scales_of(b: Builder, largest: SSAValue, over: SSAValue, numbers: BlockFunction) -> tuple[SSAValue, SSAValue]:
    """The scale, and its exact inverse where it is a power of two, else what values are divided by."""
    _, scale, divisor = levels_of(b, largest, over, numbers)
    return scale, divisor


def levels_of(
    b: Builder, largest: SSAValue, over: SSAValue, numbers: BlockFunction
) -> tuple[SSAValue, SSAValue, SSAValue]:
    """The block's own scale as it is stored, its product with that of the tensor, what values are brought to it by."""
    if numbers.rule == "absmean":
        return over, over, divisor_of(b, over)
    if numbers.clip is not None:
        largest = b.bits(b.multiply(b.float(largest), b.number(numbers.clip)))
    if numbers.scale == f8E8M0FNU:
        scale, inverse = _power_of_two(b, largest, numbers)
        return scale, scale, inverse
    stored = _quotient(b, largest, over, numbers)
    scale = b.multiply(stored, over) if numbers.tensor_scale else stored
    return stored, scale, divisor_of(b, scale)


def divisor_of(b: Builder, scale: SSAValue) -> SSAValue:
    """What values are divided by: a scale that underflowed to 0 makes zeros of them."""
    return b.select(b.compare("oeq", scale, b.number(0.0)), b.float(b.integer(INFINITY)), scale)


def scaled_element(
    b: Builder, values: SSAValue, divisor: SSAValue, numbers: BlockFunction, noise: Sequence[SSAValue] = ()
) -> SSAValue:
    """The values of the elements that stand for values under a scale."""
    if numbers.scale is None:
        return _element(b, values, numbers, noise)
    exact = numbers.scale == f8E8M0FNU
    return _element(b, b.multiply(values, divisor) if exact else b.divide(values, divisor), numbers, noise)


def _shifted(
    b: Builder,
    values: SSAValue,
    scale: SSAValue,
    divisor: SSAValue,
    zero: SSAValue,
    numbers: BlockFunction,
    noise: Sequence[SSAValue],
) -> SSAValue:
    """Values rounded to whole multiples of a scale, between the lowest and the highest code less the zero point."""
    element = numbers.element
    assert isinstance(element, Fixed)
    low, high = (b.subtract(b.number(code), zero) for code in (element.bottom_code, element.top_code))
    codes = _whole(b, b.clamp(b.divide(values, divisor), low, high), numbers.rounding, noise)
    return b.multiply(b.add(codes, b.number(0.0)), scale)


def _finite(b: Builder, value: SSAValue) -> SSAValue:
    """A product at most the largest finite f32: an element of a block with an infinity may round up beyond it."""
    return b.clamp(value, b.number(-LARGEST), b.number(LARGEST))


def _power_of_two(b: Builder, largest: SSAValue, numbers: BlockFunction) -> tuple[SSAValue, SSAValue]:
    """The E8M0 scale of a block and its exact inverse, from the bits of the largest magnitude.

    OCP MX 1.0 sections 5.3 and 6.3; a rule that rounds the magnitude up carries into its exponent field.
    """
    element = numbers.element
    emax = element.largest_exponent
    if (
        emax < 0
    ):  # brought to an element whose largest value lies between 1 and 2; what passes f32 has the largest scale
        largest, emax = b.bits(b.multiply(b.float(largest), b.number(2.0**-emax))), 0
    carried = largest
    match numbers.rule:
        case "ceil":
            carried = b.add(_normal(b, largest, element), b.integer((1 << 23) - 1))
        case "even":
            carried = b.add(_normal(b, largest, element), b.integer(1 << (22 - element.precision)))
        case "rceil":
            top = int((element.largest * 2.0**-element.largest_exponent - 1) * 2**23)
            carried = b.add(_normal(b, largest, element), b.integer((1 << 23) - 1 - top))
    exponent = b.subtract(b.both(carried, b.integer(EXPONENT)), b.integer(emax << 23))
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
    elif numbers.element.largest < 1:  # it may pass f32; without a tensor's scale the definition divides in f64
        quotient = b.select(b.compare("ogt", quotient, b.number(LARGEST)), b.number(LARGEST), quotient)
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


def _element(b: Builder, values: SSAValue, numbers: BlockFunction, noise: Sequence[SSAValue]) -> SSAValue:
    """Values rounded to the element's grid, saturating; NaN stays NaN."""
    element = numbers.element
    if isinstance(element, Minifloat):
        return _minifloat(b, values, element, numbers.rounding, noise)
    assert isinstance(element, Fixed)
    low, high = element.bottom_code, element.top_code
    if element.fraction:
        values = b.multiply(values, b.number(2.0**element.fraction))
    codes = _whole(b, b.clamp(values, b.number(low), b.number(high)), numbers.rounding, noise)
    if element.fraction:
        codes = b.multiply(codes, b.number(2.0**-element.fraction))
    return b.add(codes, b.number(0.0))  # no negative zero


def _minifloat(
    b: Builder, values: SSAValue, element: Minifloat, rounding: str, noise: Sequence[SSAValue] = ()
) -> SSAValue:
    if element.saturating:
        values = b.clamp(values, b.number(-element.largest), b.number(element.largest))
    exponent = b.both(b.bits(values), b.integer(EXPONENT))
    step = b.subtract(
        b.larger(exponent, b.integer((element.lowest_exponent + 127) << 23)), b.integer(element.precision << 23)
    )
    whole = _whole(b, b.multiply(values, b.float(b.subtract(b.integer(254 << 23), step))), rounding, noise)
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


def _whole(b: Builder, values: SSAValue, rounding: str, noise: Sequence[SSAValue]) -> SSAValue:
    """Values rounded to whole numbers; zeros keep their sign."""
    if rounding == "stochastic":  # up where the noise lies below the remainder
        whole = b.round_down(values)
        up = b.select(b.compare("olt", noise[0], b.subtract(values, whole)), b.number(1.0), b.number(0.0))
        return b.with_sign(b.magnitude(b.add(whole, up)), values)
    if rounding == "rne":
        return b.round_even(values)
    if rounding == "rtz":
        return b.truncate(values)
    assert rounding == "rna"
    whole = b.truncate(values)
    rest = b.subtract(values, whole)
    return b.with_sign(b.magnitude(b.add(whole, b.truncate(b.add(rest, rest)))), values)
