"""Numbers under a scale as codes of an element, the scale itself, and the rules that choose it."""

from __future__ import annotations

from ....dialects.integer import Point
from ..arithmetic import leading_zeros, requantized, saturated, shifted_by
from ..codes import E8M0, ElementCode
from ..rtl import Signal, join


def rounded(number: Signal, position: Signal | None, given: Point, element: ElementCode, rounding: str) -> Signal:
    """The element's code of a number in the format `given`.

    The block's scale is made of the `position` of its largest magnitude's highest bit, as `raised` has moved it; None:
    there is no scale.
    """
    if position is None:
        return requantized(number, given.fraction, Point(element.bits, -element.unit), rounding)
    if not element.is_fixed:
        return _minifloat(number, position, given, element, rounding)
    largest = (1 << (element.bits - 1)) - 1
    lift = -element.unit + largest_exponent(element)
    width = position.width + 2 + lift.bit_length()
    places = position.unsigned(width) - lift
    found = saturated(shifted_by(number, places, -lift, given.width, rounding), element.bits)
    return found.equals(-largest - 1).then(-largest, found)


def _minifloat(number: Signal, position: Signal, given: Point, element: ElementCode, rounding: str) -> Signal:
    """Sign, exponent and mantissa: the highest bit finds the exponent; below the lowest, digits are shifted out."""
    module = number.module
    magnitude = number.sign.then(-number, number)
    normal, zeros = leading_zeros(magnitude)
    bias = 1 - element.mantissa_bits - element.unit
    width = max(zeros.width, position.width, (bias + largest_exponent(element)).bit_length()) + 3
    own = module.constant(given.width - 1, width) - zeros.unsigned(width)
    field = own - position.unsigned(width) + (largest_exponent(element) + bias)
    deep = field.less_signed(1)
    most = element.mantissa_bits + 2
    under = module.constant(1, width) - field
    down = deep.then(under.more_signed(most).then(most, under), 0).low(most.bit_length())
    digits = normal.unsigned(given.width + 1)
    places = given.width - 1 - element.mantissa_bits
    if places < 0:
        digits = join(digits, module.constant(0, -places))
        places = 0
    amount = down.unsigned(most.bit_length() + places.bit_length() + 1) + places
    kept = shifted_by(digits, join(module.constant(0, 1), amount), places, places + most, rounding)
    held = deep.then(1, field) - 1
    total = join(held.low(element.exponent_bits + 1), module.constant(0, element.mantissa_bits))
    room = max(total.width, kept.width) + 1
    total = total.unsigned(room) + kept.unsigned(room).low(room)
    top = element.largest_code
    code = magnitude.equals(0).then(0, module.constant(top, room).less(total).then(top, total))
    return join(number.sign, code.low(element.bits - 1))


def scale_byte(position: Signal, empty: Signal, given: Point, element: ElementCode) -> Signal:
    """The scale's byte: the exponent of the highest bit, less the element's own; 0 where the block is `empty`."""
    offset = 127 - given.fraction - largest_exponent(element)
    return empty.then(0, position.unsigned(E8M0.bits) + offset)


def raised(rule: str, element: ElementCode, normal: Signal) -> Signal:
    """Whether the rule takes the next power of two; `normal` has the largest magnitude's highest bit on top."""
    match rule:
        case "floor":
            return normal.module.constant(0, 1)
        case "ceil":
            return normal.low(normal.width - 1).any()
        case "even":
            digits = (element.bits - 2 if element.is_fixed else element.mantissa_bits) + 2
            return normal.top(digits).equals(-1) if digits <= normal.width else normal.module.constant(0, 1)
        case "rceil":
            top = _largest_mantissa(element, normal.width)
            return normal.module.constant(top, normal.width).less(normal)
    raise ValueError(f"no circuit for the scale rule {rule}")


def _largest_mantissa(element: ElementCode, width: int) -> int:
    """The largest value's digits, its highest bit on top of `width`, what does not fit left out."""
    largest = (1 << (element.bits - 1)) - 1 if element.is_fixed else element.largest
    return (largest << width) >> largest.bit_length()


def largest_exponent(element: ElementCode) -> int:
    """emax: floor(log2) of the largest value; fixed-point blocks leave the most negative code out."""
    largest = (1 << (element.bits - 1)) - 1 if element.is_fixed else element.largest
    return largest.bit_length() - 1 + element.unit
