"""What it costs to keep a block in the low of two kinds, in whole numbers: widths, units and thresholds."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from math import floor, isinf

from ....dialects.integer import Point
from ..codes import ElementCode
from ._rounding import largest_exponent

F64_DIGITS = 53
"""Digits in which the reference sums impacts."""


@dataclass(frozen=True)
class Impact:
    """The sum over a block of s (low - high)^2, and the threshold that it is compared with (FGMP, arXiv 2504.14152).

    s is 1, or a channel's sensitivity in the format `sensitivity`, which is never negative.

    `given` is the format of the numbers, `block` how many there are. Where the highest bit of a block's largest
    magnitude stands at p, the values of both kinds are whole multiples of the unit 2^(p - F - depth), F the fraction of
    `given`: impacts count in squares of it, and a scale that its rule has raised doubles the values of its kind.
    """

    low: ElementCode
    high: ElementCode
    given: Point
    block: int
    threshold: float
    rounding: str = "rne"
    sensitivity: Point | None = None

    @cached_property
    def depth(self) -> int:
        return max(_depth(self.low), _depth(self.high))

    def lift(self, element: ElementCode) -> int:
        """How many places a kind's codes are moved up to count in the unit, before its scale is raised."""
        return self.depth - _depth(element)

    @cached_property
    def largest(self) -> int:
        """The most that both kinds of one number differ by: each lies as near as its step and its range allow."""
        errors = _error(self.low, self.rounding) + _error(self.high, self.rounding)
        return floor(errors * 2**self.depth)

    @property
    def difference_bits(self) -> int:
        """Bits of a difference as a signed number."""
        return self.largest.bit_length() + 1

    @property
    def square_bits(self) -> int:
        return (self.largest**2).bit_length()

    @property
    def term_bits(self) -> int:
        """Bits of a number's share."""
        return (self.largest**2 * self._heaviest).bit_length()

    @property
    def sum_bits(self) -> int:
        """Bits of the whole impact."""
        return (self.block * self.largest**2 * self._heaviest).bit_length()

    @property
    def _heaviest(self) -> int:
        return 1 if self.sensitivity is None else (1 << (self.sensitivity.width - 1)) - 1

    def why_not(self) -> str | None:
        """Why the reference, which sums impacts in f64, may decide otherwise; None where it does not."""
        if self.sum_bits <= F64_DIGITS:
            return None
        return f"the impact of a block takes {self.sum_bits} digits, and the reference has {F64_DIGITS}"

    def bounds(self) -> list[int]:
        """For each p the largest impact that leaves a block low; the largest of all impacts where none exceeds it."""
        most = (1 << self.sum_bits) - 1
        if isinf(self.threshold):
            return [most] * self.given.width
        limits = (self._bound(place) for place in range(self.given.width))
        return [min(max(limit, 0), most) for limit in limits]

    def _bound(self, place: int) -> int:
        unit = Fraction(2) ** (place - self.given.fraction - self.depth)
        fraction = 0 if self.sensitivity is None else self.sensitivity.fraction
        return floor(Fraction(self.threshold) / unit**2 * 2**fraction)


def _depth(element: ElementCode) -> int:
    """Places from the highest bit of the largest value down to the lowest of any."""
    return largest_exponent(element) - element.unit


def _error(element: ElementCode, rounding: str) -> Fraction:
    """The most by which a number differs from its kind, in parts of the block's highest bit.

    Below the range it is half a step of the largest numbers (a whole one towards zero); the largest magnitude, less
    than 2, may saturate.
    """
    mantissa_bits = element.bits - 2 if element.is_fixed else element.mantissa_bits
    step = Fraction(1, 2 ** (mantissa_bits + (rounding != "rtz")))
    largest = (1 << (element.bits - 1)) - 1 if element.is_fixed else element.largest
    return max(step, 2 - Fraction(largest, 2 ** _depth(element)))
