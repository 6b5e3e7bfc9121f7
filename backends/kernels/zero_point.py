"""Scales and zero points of blocks with both: from the smallest and the largest value, computed in f64."""

from __future__ import annotations

from xdsl.dialects.builtin import f32
from xdsl.ir import Attribute, SSAValue

from ...dialects.formats._element import Element, Fixed, Minifloat
from ...dialects.formats._scale import minifloat_of_scale
from ._builder import Builder

LARGEST = (2 - 2.0**-23) * 2.0**127
"""The largest finite f32."""


def scale_and_zero_point(
    b: Builder, low: SSAValue, high: SSAValue, element: Element, scale: Attribute, clip: float | SSAValue | None
) -> tuple[SSAValue, SSAValue]:
    """(f32 scale, f32 zero point) from the smallest and the largest value of a block, zero among them.

    scale = (high - low) / (2^b - 1) in the scale's type, zero point = rint(lowest code - low / scale), clamped; a block
    of zeros has zero point 0, as has one with a NaN. `clip` (a number, or an f64) scales both ends.
    """
    assert isinstance(element, Fixed)
    bounds = [b.wide(b.clamp(value, b.number(-LARGEST), b.number(LARGEST))) for value in (low, high)]
    zero = b.number(0.0, 64)
    low = b.select(b.compare("ogt", bounds[0], zero), zero, bounds[0])
    high = b.select(b.compare("olt", bounds[1], zero), zero, bounds[1])
    if clip is not None:
        factor = clip if isinstance(clip, SSAValue) else b.number(clip, 64)
        low, high = (b.multiply(value, factor) for value in (low, high))
    quotient = b.divide(b.subtract(high, low), b.number(element.top_code - element.bottom_code, 64))
    stored = _stored(b, quotient, scale)
    bottom, top = b.number(element.bottom_code, 64), b.number(element.top_code, 64)
    point = b.clamp(b.round_even(b.subtract(bottom, b.divide(low, b.wide(stored)))), bottom, top)
    spread = b.compare("une", high, low)
    is_number = b.compare("oeq", point, point)
    return stored, b.narrow(b.select(spread, b.select(is_number, point, zero), zero))


def _stored(b: Builder, quotient: SSAValue, scale: Attribute) -> SSAValue:
    """An f64 quotient that is not negative in the scale's type, as f32: never 0 and never infinite, NaN stays NaN."""
    kind = minifloat_of_scale(scale)
    top = b.number(kind.largest, 64)
    bounded = b.select(b.compare("ogt", quotient, top), top, quotient)
    rounded = b.narrow(bounded if scale == f32 else _minifloat(b, bounded, kind))
    smallest = b.number(kind.smallest)
    rounded = b.select(b.compare("olt", rounded, smallest), smallest, rounded)
    of_zero = b.number(kind.smallest if kind.bits == 8 else 1.0)
    return b.select(b.compare("oeq", quotient, b.number(0.0, 64)), of_zero, rounded)


def _minifloat(b: Builder, value: SSAValue, kind: Minifloat) -> SSAValue:
    """An f64 rounded to the nearest number of a minifloat, ties to even."""
    exponent = b.both(b.bits(value), b.integer(0x7FF << 52, 64))
    lowest = b.integer((kind.lowest_exponent + 1023) << 52, 64)
    step = b.subtract(b.larger(exponent, lowest), b.integer(kind.precision << 52, 64))
    inverse = b.float(b.subtract(b.integer(2046 << 52, 64), step))
    return b.multiply(b.round_even(b.multiply(value, inverse)), b.float(step))
