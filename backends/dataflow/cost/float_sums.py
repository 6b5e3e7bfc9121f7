"""The features of the accumulator in f32; the package's import adds them to `accumulator_features`."""

from __future__ import annotations

from math import ceil

from ..dot_product import DotProduct
from ..float_sum import FloatSum
from ..floats import ADD_STEPS, WIDTH
from .features import Features, accumulator_features, shifter_cells


@accumulator_features.register
def _(accumulator: FloatSum, unit: DotProduct, width: int) -> Features:
    """Features of their own: what a window costs says nothing of an adder of f32, which is one circuit of one size."""
    folds = accumulator.folds(unit.bias is not None)
    adders = 1 + ceil(folds / accumulator.passes(unit.segment // unit.lanes))
    whole = [width, *([unit.bias.width] if unit.bias else [])]
    # What waits: later partial sums and the bias, beside each of the additions.
    waiting = WIDTH * ADD_STEPS * sum(range(folds)) if adders > 2 else WIDTH * ADD_STEPS * folds
    return {
        "float_adder": adders,
        # Whole numbers are shifted to their highest bit.
        "float_shifter": sum(shifter_cells(each, each - 1, each) for each in whole),
        "float_register": WIDTH * accumulator.used + accumulator.total_bits + sum(whole),
        "float_delay": waiting,
    }
