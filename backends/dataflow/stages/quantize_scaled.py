"""Fixed-point numbers into blocks under a float scale (NVFP4's E2M1 under E4M3): compared, never divided.

The scale is the largest magnitude / 6, rounded to E4M3; an element is the number / scale, rounded to E2M1. Both round
to nearest even where a number passes a boundary between two codes, and every boundary is a short number times a power
of two: 6 x boundary for the scale, boundary x scale for an element.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..arithmetic import leading_zeros
from ..codes import ElementCode, ScaleCode
from ..rtl import Module, Signal, join
from ._blocks import Blocks, BlockStage, gathered
from ._stream import Pipe

E2M1 = ElementCode(4, 2, 1, -1, 12)
E4M3 = ScaleCode(8, 4, 3, -9, "code")
FEWEST_BITS = 8
"""Bits of the numbers, at least: boundaries of scales take as many."""
_LARGEST_SCALE = 126
"""The code of 448."""

_QUARTERS = (1, 3, 5, 7, 10, 14, 20)
"""Four times the numbers between neighbouring magnitudes of E2M1: 0, 0.5, 1, 1.5, 2, 3, 4, 6."""


@dataclass(frozen=True)
class QuantizeScaled(BlockStage):
    """Blocks of E2M1 under a scale in E4M3; numbers have `FEWEST_BITS` at least."""

    @property
    def delay(self) -> int:
        return 4

    def module(self, name: str) -> Module:
        module = self.start(name)
        pipe = Pipe(module, "out")
        rows = Blocks(module, self)
        go = rows.available & pipe.enable
        index, last = rows.elements(go)
        valid = pipe.flag(rows.available)
        word = rows.read(index, pipe.enable)
        number = pipe.step(rows.holds(index)).repeated(word.width) & word
        scale = pipe.step(scale_of(rows.largest(), self.given.fraction))
        rows.release(go & last, pipe.enable, valid)
        parts = aligned(number, scale, self.given.fraction)
        whole, rest, significand, sign = (pipe.step(part) for part in parts)
        valid, scale = pipe.flag(valid), pipe.step(scale)
        code = pipe.step(join(sign, magnitude(whole, rest, significand)))
        valid, scale = pipe.flag(valid), pipe.step(scale)
        moving = valid & pipe.enable
        _, full = module.counter(self.lanes, moving, "lane")
        data = join(scale, gathered(module, code, self.lanes, moving))
        return module.close({"in": rows.ready}, {"out": pipe.end(valid & full, data)})


def scale_of(largest: Signal, fraction: int) -> Signal:
    """The E4M3 code of an unsigned number x 2^-`fraction` / 6: the nearest, ties to even, from 2^-9 to 448."""
    module, width = largest.module, largest.width
    normal, zeros = leading_zeros(largest)
    # t = normal / 2^(width - 1) lies in [1, 2); t / 1.5 is 8 to 11 eighths or, doubled, 11 to 16.
    upper = normal.bit(width - 2)
    above = _count(normal, [(51 + 6 * n) << (width - 6) for n in range(3)], first=8)
    below = _count(normal, [(69 + 6 * n) << (width - 7) for n in range(5)], first=11)
    room = max(width.bit_length(), fraction.bit_length(), 5) + 3
    exponent = module.constant(width - 1 - fraction - 2 + 7, room) - zeros.unsigned(room)
    exponent = exponent - (~upper).unsigned(room)
    eighths = upper.then(above, below + 3).unsigned(room + 3)
    found = join(exponent, module.constant(0, 3)) + eighths
    found = found.more_signed(_LARGEST_SCALE).then(_LARGEST_SCALE, found).low(8)
    small = exponent.less_signed(1)
    steps = _count(*_scaled(largest, [6 * n + 3 for n in range(8)], fraction - 9), first=0).unsigned(8)
    steps = steps.equals(0).then(1, steps)
    return largest.equals(0).then(1, small.then(steps, found))


def _scaled(number: Signal, bounds: list[int], places: int) -> tuple[Signal, list[int]]:
    """A number and bounds x 2^`places`, both as whole numbers."""
    if places >= 0:
        return number, [bound << places for bound in bounds]
    return join(number, number.module.constant(0, -places)), bounds


def _count(number: Signal, bounds: list[int], first: int) -> Signal:
    """How many bounds an unsigned number passes; a bound above an odd code (`first` and on) is passed by a tie."""
    module = number.module
    total = module.constant(0, 4)
    for code, bound in enumerate(bounds, first):
        if bound < 1 << number.width:
            passed = number.at_least(bound) if code % 2 else module.constant(bound, number.width).less(number)
            total = total + passed.unsigned(4)
    return total


def aligned(number: Signal, scale: Signal, fraction: int) -> tuple[Signal, Signal, Signal, Signal]:
    """(4 x magnitude / 2^the scale's exponent rounded down, whether something is left, the scale's digits, the sign).

    What does not fit into 10 bits is beyond every bound, and held.
    """
    module = number.module
    sign, field = number.sign, scale.bits(3, 4)
    digits = join(field.any(), scale.low(3))
    value = sign.then(-number, number)
    # magnitude x 2^-fraction against bound / 4 x digits x 2^(max(field, 1) - 10)
    always = fraction - 11
    if always < 0:
        value, always = join(value, module.constant(0, -always)), 0
    amount = module.constant(14, 4) - (field - field.any().unsigned(4))
    moved = value.unsigned(value.width + 14).shifted_left(amount)
    cut = min(14 + always, moved.width)
    rest = moved.low(cut).any()
    if cut == moved.width:
        return module.constant(0, 10), rest, digits, sign
    whole = moved.bits(cut, moved.width - cut)
    if whole.width <= 10:
        return whole.unsigned(10), rest, digits, sign
    return whole.top(whole.width - 10).any().then(-1, whole.low(10)), rest, digits, sign


def magnitude(whole: Signal, rest: Signal, digits: Signal) -> Signal:
    """The E2M1 code, without its sign, of what `aligned` gives."""
    module = whole.module
    total = module.constant(0, 3)
    for code, quarters in enumerate(_QUARTERS):
        bound = digits.unsigned(10) * module.constant(quarters, 10)
        # A tie goes up from an odd code.
        passed = bound.less(whole) | (whole.equals(bound) & (module.constant(code % 2, 1) | rest))
        total = total + passed.unsigned(3)
    return total
