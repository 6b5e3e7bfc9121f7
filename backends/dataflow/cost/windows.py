"""The features of line buffers and of pooling; the package's import adds them to `features`."""

from __future__ import annotations

from ..arithmetic import reciprocal
from ..rtl import address_bits
from ..stages.patches import Patches
from ..stages.pool import Pool
from .features import Features, Multiplier, features, multipliers


@features.register
def _(design: Patches) -> Features:
    lines, columns, kept = design.lines, design.columns, design.kept.bit_length()
    words = address_bits(design.kept * design.line)
    # Places of whole lines and columns end in as many zeros as these have words, and zeros are no registers.
    ring = words - _zeros(design.line)
    line = ((columns.size + 2 * columns.padding) * design.channels).bit_length() - _zeros(design.channels)
    height = (lines.size + 2 * lines.padding).bit_length() if lines.padding else 0
    counted = [design.channels, lines.kernel, columns.kernel, columns.positions, lines.positions, design.line]
    places = (1 + (columns.kernel > 1)) * line + (1 + (lines.kernel > 1)) * (ring + height)
    return {
        # Sums that go round the ring, and comparisons with the ends of the picture where something stands beside it.
        "adder": 6 * ring + 2 * words + (3 if columns.padding else 1) * line + 3 * height + places,
        "register": design.width + 2 * words + ring + places,
        "control": sum(address_bits(size) for size in counted if size > 1) + words + 4 * kept,
        "table": 2 * lines.positions * kept,
        "constant": 1.0,
    }


def _zeros(number: int) -> int:
    """How often 2 divides a number."""
    return (number & -number).bit_length() - 1


@multipliers.register
def _(design: Pool) -> tuple[Multiplier, ...]:
    division = design.division
    if design.operation != "mean" or division.odd == 1:
        return ()
    return (Multiplier.by(reciprocal(division.odd, division.bits)[0], division.bits),)


@features.register
def _(design: Pool) -> Features:
    kept, result, division = design.kept_bits, design.result.width, design.division
    # Of a product with a reciprocal only the quotient is kept.
    quotient = division.bits - division.odd.bit_length() + 1 if design.operation == "mean" else 0
    return {
        "adder": kept + (division.bits + result if quotient else 0),
        "register": (2 if design.inner == 1 else 1) * kept + design.given.width + result + quotient,
        "window": result,
        "control": address_bits(design.count) + (3 * address_bits(design.inner) if design.inner > 1 else 0),
        "constant": 1.0,
    }
