"""Decoding and multiplying the elements of two operands, exactly, built from the numbers of their formats."""

from __future__ import annotations

from dataclasses import dataclass

from .arithmetic import product, product_unsigned
from .codes import ElementCode, OperandCode
from .rtl import Signal, any_of, join


@dataclass(frozen=True)
class Decoded:
    """A minifloat: (-1)^sign x significand x 2^(shift + unit); or a signed integer, in multiples of 2^unit."""

    unit: int
    integer: Signal | None = None
    sign: Signal | None = None
    significand: Signal | None = None
    shift: Signal | None = None
    largest_shift: int = 0
    nan: Signal | None = None

    def as_integer(self, width: int) -> Signal:
        """The number as a signed integer of `width` bits."""
        if self.integer is not None:
            return self.integer.resized(width)
        assert self.sign is not None and self.significand is not None and self.shift is not None
        magnitude = self.significand.unsigned(width).shifted_left(self.shift)
        return self.sign.then(-magnitude, magnitude)


def decoded(element: ElementCode, code: Signal) -> Decoded:
    """An element's code in its parts."""
    if element.is_fixed:
        return Decoded(element.unit, integer=code)
    exponent = code.bits(element.mantissa_bits, element.exponent_bits)
    mantissa = code.low(element.mantissa_bits)
    normal = exponent.any()
    shift = exponent - normal.unsigned(element.exponent_bits)
    nan = None
    if element.nan == "exponent":
        nan = exponent.equals(-1)
    elif element.nan == "code":
        nan = code.low(element.bits - 1).equals(-1)
    return Decoded(
        element.unit,
        sign=code.sign,
        significand=join(normal, mantissa),
        shift=shift,
        largest_shift=element.largest_shift,
        nan=nan,
    )


def decoded_operand(operand: OperandCode, code: Signal, is_low: Signal | None) -> Decoded:
    """An operand's code; where blocks are of two kinds, `is_low` says that this one is of the first."""
    if is_low is None:
        return decoded(operand.elements[0], code)
    low, high = (decoded(element, code.low(element.bits)) for element in operand.elements)
    unit = operand.unit
    if low.integer is not None or high.integer is not None:
        width = operand.largest.bit_length() + 1
        parts = [part.as_integer(width - (part.unit - unit)) for part in (low, high)]
        lifted = [
            join(number, code.module.constant(0, part.unit - unit)) if part.unit > unit else number
            for number, part in zip(parts, (low, high), strict=True)
        ]
        return Decoded(unit, integer=is_low.then(*lifted))
    return _aligned(low, high, is_low)


def _aligned(low: Decoded, high: Decoded, is_low: Signal) -> Decoded:
    """Two minifloats in the fields of one: the narrower significand moves up, its exponent changes with it."""
    assert low.significand is not None and high.significand is not None
    assert low.shift is not None and high.shift is not None and low.sign is not None and high.sign is not None
    digits = max(low.significand.width, high.significand.width)
    units = [part.unit - (digits - part.significand.width) for part in (low, high) if part.significand is not None]
    unit = min(units)
    module = is_low.module
    largest = max(part.largest_shift + own - unit for part, own in zip((low, high), units, strict=True))
    width = largest.bit_length()
    fields: list[tuple[Signal, Signal]] = []
    for part, own in zip((low, high), units, strict=True):
        assert part.significand is not None and part.shift is not None
        missing = digits - part.significand.width
        significand = join(part.significand, module.constant(0, missing)) if missing else part.significand
        fields.append((significand, part.shift.unsigned(max(width, part.shift.width)).low(width) + (own - unit)))
    nans = [nan & own for nan, own in ((low.nan, is_low), (high.nan, ~is_low)) if nan is not None]
    return Decoded(
        unit,
        sign=is_low.then(low.sign, high.sign),
        significand=is_low.then(fields[0][0], fields[1][0]),
        shift=is_low.then(fields[0][1], fields[1][1]),
        largest_shift=largest,
        nan=any_of(nans) if nans else None,
    )


def product_bits(a: OperandCode, b: OperandCode) -> int:
    """Bits of the exact product of two elements, as a signed integer."""
    return (a.largest * b.largest).bit_length() + 1


def multiplied(a: OperandCode, b: OperandCode, x: Decoded, y: Decoded) -> Signal:
    """The exact product in multiples of 2^(a.unit + b.unit), signed, of `product_bits`."""
    width = product_bits(a, b)
    for one, other, code in ((x, y, a), (y, x, b)):
        if code.largest == 1 and one.integer is not None:
            return _selected(one.integer, other, a if code is b else b, width)
    if x.integer is not None or y.integer is not None:
        return product(_as_integer(x, a), _as_integer(y, b)).resized(width)
    # Significands and a shift take fewer gates than integers, however few bits these have.
    assert x.significand is not None and y.significand is not None and x.sign is not None and y.sign is not None
    assert x.shift is not None and y.shift is not None
    # Aligned fields may reach below the units of the operands' codes: what lies below is zero and is dropped.
    below = a.unit + b.unit - x.unit - y.unit
    digits = product_unsigned(x.significand, y.significand)
    places = max(1, (x.largest_shift + y.largest_shift).bit_length())
    shift = x.shift.unsigned(max(places, x.shift.width)).low(places) + y.shift.unsigned(max(places, y.shift.width)).low(
        places
    )
    room = max(width + below, digits.width)
    magnitude = digits.unsigned(room).shifted_left(shift).bits(below, room - below).resized(width)
    return (x.sign ^ y.sign).then(-magnitude, magnitude)


def _as_integer(number: Decoded, code: OperandCode) -> Signal:
    """A number in multiples of its operand's unit; aligned fields may reach below it, where all is zero."""
    width, below = code.largest.bit_length() + 1, code.unit - number.unit
    return number.as_integer(width + below).bits(below, width)


def _selected(trit: Signal, other: Decoded, code: OperandCode, width: int) -> Signal:
    """A number times -1, 0 or 1: no multiplier."""
    number = _as_integer(other, code).signed(width)
    return trit.bit(0).repeated(width) & trit.sign.then(-number, number)
