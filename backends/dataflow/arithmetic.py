"""Shifts that round, saturation, normalisation: the circuits beside `dialects.integer`, bit for bit."""

from __future__ import annotations

from collections.abc import Sequence

from ...dialects.integer import Point, bits_above
from .rtl import Signal, join


def saturated(x: Signal, width: int) -> Signal:
    """A signed number held within `width` bits."""
    if x.width <= width:
        return x.signed(width)
    beyond = x.bits(width - 1, x.width - width + 1)
    fits = beyond.equals(0) | beyond.equals(-1)
    return fits.then(x.low(width), join(x.sign, (~x.sign).repeated(width - 1)))


def shifted(x: Signal, places: int, rounding: str = "rne") -> Signal:
    """A signed number times 2^-places, rounded once, in as many bits as it needs."""
    if places <= 0:
        return x if places == 0 else join(x, x.module.constant(0, -places))
    if places >= x.width:
        x = x.signed(places + 1)
    whole, rest = x.bits(places, x.width - places), x.low(places)
    up = _up(x.sign, whole.bit(0), rest, rounding)
    width = whole.width + (rounding != "rtz")
    return whole.signed(width) + up.unsigned(width)


def _up(negative: Signal, odd: Signal, rest: Signal, rounding: str) -> Signal:
    """Whether the number before the point grows by one."""
    if rounding == "rtz":
        return negative & rest.any()
    half = rest.sign
    below = rest.low(rest.width - 1).any() if rest.width > 1 else rest.module.constant(0, 1)
    match rounding:
        case "rne":
            return half & (below | odd)
        case "rna":
            return half & (below | ~negative)
    raise ValueError(f"no circuit rounds by {rounding}")


def requantized(x: Signal, fraction: int, into: Point, rounding: str = "rne") -> Signal:
    """A signed number with `fraction` bits behind the point in another format, rounded once, saturated."""
    return saturated(shifted(x, fraction - into.fraction, rounding), into.width)


def shifted_by(x: Signal, places: Signal, least: int, most: int, rounding: str = "rne") -> Signal:
    """A signed number times 2^-places, rounded once; `places` is signed, between `least` and `most`; most >= 0.

    The result has as many bits as its largest value needs.
    """
    room = x.width + most - least
    width = max(places.width, most.bit_length() + 1) + 1
    amount = (x.module.constant(most, width) - places.signed(width)).low(max(1, (most - least).bit_length()))
    return shifted(x.signed(room).shifted_left(amount), most, rounding)


def leading_zeros(x: Signal) -> tuple[Signal, Signal]:
    """(x moved to the left until its highest bit is 1, by how many places); zero moves by all ones."""
    stages = max(1, (x.width - 1).bit_length())
    counted: list[Signal] = []
    for stage in reversed(range(stages)):
        step = 1 << stage
        if step >= x.width:
            counted.append(x.module.constant(0, 1))
            continue
        empty = x.top(step).equals(0)
        x = empty.then(join(x.low(x.width - step), x.module.constant(0, step)), x)
        counted.append(empty)
    return x, join(*counted)


def magnitude_bits(x: Signal) -> Signal:
    """How many bits a signed number has beside its sign: 0 for 0 and -1."""
    module = x.module
    folded = (x ^ x.sign.repeated(x.width)).low(x.width - 1) if x.width > 1 else x
    width = folded.width.bit_length()
    zeros = leading_zeros(folded)[1].unsigned(max(width, leading_zeros_bits(folded.width)))
    count = module.constant(folded.width, zeros.width) - zeros
    return folded.equals(0).then(0, count)


def leading_zeros_bits(width: int) -> int:
    """Bits of the count that `leading_zeros` gives."""
    return max(1, (width - 1).bit_length())


def adder_tree(terms: Sequence[Signal]) -> Signal:
    """The exact sum of signed numbers."""
    row = list(terms)
    while len(row) > 1:
        pairs = [row[i : i + 2] for i in range(0, len(row), 2)]
        row = [_sum(*pair) if len(pair) == 2 else pair[0] for pair in pairs]
    return row[0]


def _sum(a: Signal, b: Signal) -> Signal:
    width = max(a.width, b.width) + 1
    return a.signed(width) + b.signed(width)


def product(a: Signal, b: Signal) -> Signal:
    """The exact product of signed numbers."""
    width = a.width + b.width
    return a.signed(width) * b.signed(width)


def product_unsigned(a: Signal, b: Signal) -> Signal:
    """The exact product of unsigned numbers."""
    width = a.width + b.width
    return a.unsigned(width) * b.unsigned(width)


def reciprocal(divisor: int, width: int) -> tuple[int, int]:
    """(m, n): x // divisor = x m / 2^n, rounded down, for every unsigned x of so many bits.

    T. Granlund, P. Montgomery, Division by invariant integers using multiplication, 1994, theorem 4.2.
    """
    places = width + bits_above(divisor)
    return (1 << places) // divisor + 1, places
