"""Numbers in f32 as circuits: an addition in five steps, and the steps into f32 and out of it, each rounded once.

Every function cuts itself into steps by `step`, which gives a value one step later; its result belongs into a register.
IEEE 754: subnormals, overflow to infinity, infinity less infinity is no number. The sign of a zero alone is any: it
changes no other number.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ...dialects.integer import Point
from .arithmetic import saturated
from .rtl import Signal, any_of, join

Step = Callable[[Signal], Signal]

WIDTH = 32
DIGITS = 24
"""Bits of a significand, the leading one included."""
EXPONENT_BITS = 10
"""Bits of an exponent beyond the range of f32, signed."""
BIAS = 150
"""What an exponent, that of the significand's last bit, is counted from: 1 is that of subnormals."""
ADD_STEPS, INTO_STEPS, OUT_STEPS = 5, 4, 3
"""Steps of a sum, of a whole number on the way into f32, and of an f32 into fixed point, their registers included."""

LOWEST = -(1 << (EXPONENT_BITS - 1))
"""The exponent of zero."""
_SPARE = 3
"""Bits behind a significand: guard, round, and whether anything lies below."""


@dataclass(frozen=True)
class Float:
    """(-1)^sign x significand x 2^(exponent - 150): 24 bits and a signed exponent; zero has the lowest exponent or 1.

    A significand without a leading one is zero, or has exponent 1.
    """

    sign: Signal
    significand: Signal
    exponent: Signal
    infinite: Signal
    nan: Signal


def unpacked(bits: Signal) -> Float:
    """The parts of an f32."""
    field, mantissa = bits.bits(DIGITS - 1, 8), bits.low(DIGITS - 1)
    normal, special = field.any(), field.equals(-1)
    exponent = join(field.bits(1, 7), field.bit(0) | ~normal)
    significand = join(normal, mantissa)
    some = mantissa.any()
    return Float(bits.sign, significand, exponent.unsigned(EXPONENT_BITS), special & ~some, special & some)


def added(step: Step, x: Float, y: Float) -> Signal:
    """x + y rounded to f32, four steps later; the fifth is the register that takes it. One exponent is 1 or more."""
    module = x.sign.module
    # 1: which exponent is larger, and by how much.
    width = EXPONENT_BITS + 1
    ahead, behind = (one.exponent.signed(width) - other.exponent.signed(width) for one, other in ((x, y), (y, x)))
    swapped = ahead.sign
    large = step(swapped.then(y.significand, x.significand))
    small = step(swapped.then(x.significand, y.significand))
    exponent = step(swapped.then(y.exponent, x.exponent))
    sign = step(swapped.then(y.sign, x.sign))
    places = step(_at_most(swapped.then(behind, ahead).low(EXPONENT_BITS), 5))
    differs = x.sign ^ y.sign
    subtracts = step(differs)
    nan = step(x.nan | y.nan | (x.infinite & y.infinite & differs))
    infinite, toward = step(x.infinite | y.infinite), step(x.infinite.then(x.sign, y.sign))
    # 2: the small one moves to the exponent of the large one. `floor` has a 1 where the leading one of a number of
    # the lowest exponent stands: further nothing is moved to the front.
    small = step(shifted_sticky(join(small, module.constant(0, _SPARE)), places))
    room = DIGITS + _SPARE + 1
    floor = step(module.constant(1 << (room - 1), room).shifted_right(_at_most(exponent, 5)))
    large, exponent, sign, subtracts, nan, infinite, toward = map(
        step, (large, exponent, sign, subtracts, nan, infinite, toward)
    )
    # 3: the sum, or the difference that is not negative.
    zero, one = module.constant(0, 1), module.constant(1, 1)
    a, b = join(zero, large, module.constant(0, _SPARE)), small.unsigned(room)
    total = join(zero, a, one) + join(subtracts, b ^ subtracts.repeated(room), subtracts)
    negative = total.sign
    result = step(negative.then(b - a, total.bits(1, room)))
    sign = step(infinite.then(toward, sign ^ negative))
    floor, exponent, nan, infinite = map(step, (floor, exponent, nan, infinite))
    # 4: the leading one comes to the front.
    some = step(result.any())
    (result, marks), coarse = _to_front((result, result | floor), 4)
    (result, _), fine = _to_front((result, marks), 1, within=4)
    result, exponent = step(result), step(exponent - join(coarse, fine).unsigned(EXPONENT_BITS))
    sign, nan, infinite = map(step, (sign, nan, infinite))
    # 5: the rounding; a carry out of the significand makes the exponent larger, and a leading one makes it 1 or more.
    kept, rest = result.top(DIGITS), result.low(_SPARE + 1)
    up = rest.sign & (rest.low(_SPARE).any() | kept.bit(0))
    found = join(exponent, module.constant(1, DIGITS)) + join(kept, up).unsigned(EXPONENT_BITS + DIGITS)
    found = found.top(EXPONENT_BITS + DIGITS - 1)
    infinite = infinite | (some & found.top(EXPONENT_BITS).at_least(255))
    return _packed(sign, some.then(found.low(WIDTH - 1), 0), infinite, nan)


def _packed(sign: Signal, magnitude: Signal, infinite: Signal, nan: Signal) -> Signal:
    module = sign.module
    special = join(module.constant(-1, 8), nan, module.constant(0, DIGITS - 2))
    return join(sign, (infinite | nan).then(special, magnitude))


def normalized(step: Step, x: Signal) -> tuple[Signal, Signal, Signal, Signal]:
    """(sign, significand, places, some): a signed whole number rounded to 24 bits, three steps later.

    x = (-1)^sign x significand x 2^(x.width - 24 - places); `some` is 0 where it is zero, as the significand is then.
    The fourth step belongs to whoever makes use of it. Places are signed, of `EXPONENT_BITS` bits.
    """
    module = x.module
    sign, magnitude = step(x.sign), step(x.sign.then(-x, x))
    (front,), coarse = _to_front((magnitude,), 16)
    front, coarse, some, sign = step(front), step(coarse), step(magnitude.any()), step(sign)
    (front,), middle = _to_front((front,), 4, within=16)
    (front,), fine = _to_front((front,), 1, within=4)
    front, places, some, sign = step(front), step(join(coarse, middle, fine)), step(some), step(sign)
    places = places.unsigned(EXPONENT_BITS)
    if x.width <= DIGITS:
        padded = front if x.width == DIGITS else join(front, module.constant(0, DIGITS - x.width))
        return sign, padded, places, some
    kept, rest = front.top(DIGITS), front.low(x.width - DIGITS)
    below = rest.low(rest.width - 1).any() if rest.width > 1 else module.constant(0, 1)
    rounded = kept.unsigned(DIGITS + 1) + (rest.sign & (below | kept.bit(0))).unsigned(DIGITS + 1)
    carry = rounded.sign
    significand = join(carry | rounded.bit(DIGITS - 1), rounded.low(DIGITS - 1))
    return sign, significand, places - carry.unsigned(EXPONENT_BITS), some


def from_fixed(step: Step, x: Signal, point: Point) -> Signal:
    """A fixed-point number of at most 25 bits as f32, which holds it, four steps later."""
    sign, significand, places, some = normalized(step, x)
    exponent = -places + (x.width - DIGITS - point.fraction + BIAS)
    module = x.module
    found = join(exponent.low(8), significand.low(DIGITS - 1))
    return step(_packed(sign, some.then(found, 0), module.constant(0, 1), module.constant(0, 1)))


def into_fixed(step: Step, bits: Signal, into: Point) -> Signal:
    """An f32 rounded into a fixed-point format, ties to even, saturated; no number gives 0. Two steps and a register.

    Moved by `left` places to the left every number saturates, infinity too; moved by `right` to the right none is half
    of the last bit.
    """
    x, module = unpacked(bits), bits.module
    left, right = max(0, into.width - DIGITS + 1), DIGITS + 1
    places = -x.exponent.signed(EXPONENT_BITS + 2) + (BIAS - into.fraction + left)
    amount = places.low((left + right).bit_length())
    amount = places.more_signed(left + right).then(left + right, amount)
    amount = step((places.sign | x.infinite).then(0, amount))
    significand, sign, nan = step(x.significand), step(x.sign), step(x.nan)
    found = step(shifted_sticky(join(significand, module.constant(0, left + 2)), amount))
    sign, nan = step(sign), step(nan)
    kept, rest = found.top(DIGITS + left), found.low(2)
    up = rest.bit(1) & (rest.bit(0) | kept.bit(0))
    # -(kept + up) = ~kept + (1 - up): one adder for both signs.
    width = kept.width + 2
    signed = (kept.unsigned(width) ^ sign.repeated(width)) + (up ^ sign).unsigned(width)
    return nan.then(0, saturated(signed, into.width))


def _to_front(numbers: Sequence[Signal], size: int, *, within: int | None = None) -> tuple[list[Signal], Signal]:
    """(the numbers moved to the left by whole groups of bits, by how many).

    It is the first group of `size` bits with a 1 in the last of the numbers that comes to the front, looked for among
    the highest `within` bits.
    """
    marks = numbers[-1]
    within = min(marks.width, within or marks.width)
    groups = [marks.top(end).low(min(size, end - start)) for start, end in
              ((start, min(start + size, within)) for start in range(0, within, size))]  # fmt: skip
    index = _first([group.any() for group in groups])
    amount = join(index, marks.module.constant(0, size.bit_length() - 1)) if size > 1 else index
    return [number.shifted_left(amount.low(min(amount.width, number.width))) for number in numbers], index


def _first(flags: Sequence[Signal]) -> Signal:
    """The place of the first flag that is 1, of the last one where none is; in as many bits as that takes."""
    if len(flags) == 1:
        return flags[0].module.constant(0, 1)
    half = 1 << ((len(flags) - 1).bit_length() - 1)
    before, after = flags[:half], flags[half:]
    found = any_of(before)
    if half == 1:
        return ~found
    width = half.bit_length() - 1
    return join(~found, found.then(_first(before).unsigned(width), _first(after).unsigned(width)))


def _at_most(x: Signal, bits: int) -> Signal:
    """An unsigned number in so many bits, all ones where it has more."""
    return x.low(bits) | x.top(x.width - bits).any().repeated(bits)


def shifted_sticky(x: Signal, places: Signal) -> Signal:
    """An unsigned number shifted to the right; its last bit is 1 where a bit was lost."""
    module = x.module
    lost = module.constant(0, 1)
    for index in reversed(range(places.width)):
        distance = 1 << index
        chosen = places.bit(index)
        if distance >= x.width:
            lost = lost | (chosen & x.any())
            x = chosen.then(module.constant(0, x.width), x)
            continue
        lost = lost | (chosen & x.low(distance).any())
        x = chosen.then(x.top(x.width - distance).unsigned(x.width), x)
    return join(x.top(x.width - 1), x.bit(0) | lost)
