"""The features of the accumulator in f32; the package's import adds them to `accumulator_features`."""

from __future__ import annotations

from math import ceil

from ..dot_product import DotProduct
from ..float_sum import FloatSum
from ..floats import ADD_STEPS, DIGITS, EXPONENT_BITS, WIDTH
from .features import Features, accumulator_features, shifter_cells

_ROOM = DIGITS + 4
_SHIFTS = 5
"""Levels of a shifter of a significand."""


@accumulator_features.register
def _(accumulator: FloatSum, unit: DotProduct, width: int) -> Features:
    folds = accumulator.folds(unit.bias is not None)
    adders = 1 + ceil(folds / accumulator.passes(unit.segment // unit.lanes))
    whole = [width, *([unit.bias.width] if unit.bias else [])]
    result = accumulator.total_bits
    normalized = sum(shifter_cells(each, each - 1, each) for each in whole)
    # Signs that are taken away, roundings and exponents of each whole number, of each sum, and of the result.
    added = sum(2 * each + DIGITS + 2 * EXPONENT_BITS for each in whole) + DIGITS + EXPONENT_BITS
    summed = 3 * EXPONENT_BITS + 2 * _ROOM + DIGITS + EXPONENT_BITS
    between = sum(2 * each + DIGITS + EXPONENT_BITS for each in whole) + DIGITS + result
    # What waits: later partial sums and the bias beside each of the additions, both significands inside of them.
    waiting = WIDTH * ADD_STEPS * sum(range(folds)) if adders > 2 else WIDTH * ADD_STEPS * folds
    return {
        "shifter": normalized + (DIGITS + 2) * _SHIFTS + adders * _ROOM * 4 * _SHIFTS,
        "negation": WIDTH * (accumulator.used - 1) + adders * (2 * DIGITS + EXPONENT_BITS + _ROOM),
        "adder": added + adders * summed,
        "register": between + WIDTH * accumulator.used + adders * (6 * _ROOM + 3 * EXPONENT_BITS + WIDTH),
        "delay": waiting + adders * 2 * _ROOM,
        "float_adder": adders,
    }
