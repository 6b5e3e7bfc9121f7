"""What a design is made of, counted from its numbers alone: the features that its cost is a weighted sum of.

A feature counts one-bit cells of one sort: `multiplier` pairs of bits that meet in multipliers, `shifter`
multiplexers of barrel shifters, `adder` bits of adders, `negation` bits that are negated or chosen, `register`
flip-flops that hold numbers, `delay` those that only carry something to a later stage, `table` bits of constant tables,
`control` bits of counters, `window` bits of an accumulator that saturates, `float_adder` whole adders of f32 and other
`float_...` what stands around them, `rounding` bits of numbers that are rounded under no scale, `block` what finds a
block's scale, and `constant` the design itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import singledispatch
from math import ceil, sqrt

from ....dialects.integer import CURVES, PowerOfTwo, bits_above
from ..codes import OperandCode
from ..dot_product import Accumulator, DotProduct
from ..multiplier import product_bits
from ..rtl import address_bits
from ..stages._stream import Stage
from ..stages.contraction import Contraction
from ..stages.normalize import Normalize
from ..stages.pointwise import Binary, Convert
from ..stages.quantize import Quantize
from ..stages.quantize_mixed import QuantizeMixed
from ..stages.quantize_scaled import QuantizeScaled
from ..stages.rope import Rope
from ..stages.softmax import Softmax
from ..stages.table import Activation
from ..window import Window

Features = dict[str, float]


@dataclass(frozen=True)
class Multiplier:
    """`count` multipliers of a bits by b bits, or by a constant."""

    a: int
    b: int
    count: int = 1
    signed: bool = True
    constant: int | None = None

    @classmethod
    def by(cls, constant: int, width: int) -> Multiplier:
        """One that multiplies numbers of `width` bits by a positive constant."""
        return cls(width, constant.bit_length(), constant=constant)

    @property
    def added(self) -> int:
        """Bits of the adders that a constant needs instead: one adder for each of its digits but the first."""
        return 0 if self.constant is None else self.a * (nonzero_digits(self.constant) - 1) * self.count

    @property
    def pairs(self) -> int:
        """Pairs of bits that meet."""
        return self.a * self.b * self.count

    @property
    def recoded(self) -> int:
        """Cells of a multiplier of gates: bits of partial products, and of the adders that sum their rows.

        Yosys recodes the wider factor after Booth in radix 4, from 5 x 4 bits on.
        """
        narrow, wide = sorted((self.a, self.b))
        if narrow < 4 or wide == 4:
            return (narrow - 1) * wide * self.count
        rows = (wide + 1) // 2 if self.signed else wide // 2 + 1
        # A row is wider than the factor by its sign, by the doubled multiple, and by the 1 of a negation.
        return (rows * narrow + (rows - 1) * (narrow + 3)) * self.count


def kind_of(design: DotProduct | Stage) -> str:
    """The name of a design's kind in the coefficients: its class."""
    return "dot" if isinstance(design, DotProduct) else type(design).__name__.lower()


def dsp_blocks(multipliers: tuple[Multiplier, ...], target: str) -> int:
    """DSP blocks of a family, as Yosys maps multipliers onto them: 25 x 18 bits signed (xc7), 18 x 18 (ecp5)."""
    return sum(m.count * _blocks(m, target) for m in multipliers)


def _blocks(multiplier: Multiplier, target: str) -> int:
    a, b = sorted((multiplier.a, multiplier.b), reverse=True)
    if target not in _SMALLEST or b < _SMALLEST[target][0] or a + b < _SMALLEST[target][1]:
        return 0
    wide, narrow = _LARGEST[target]
    return min(_pieces(a, wide) * _pieces(b, narrow), _pieces(b, wide) * _pieces(a, narrow))


_SMALLEST = {"xc7_dsp": (2, 9), "ecp5": (2, 0)}
_LARGEST = {"xc7_dsp": (25, 18), "ecp5": (18, 18)}


def _pieces(width: int, most: int) -> int:
    """Signed pieces of a wide factor: all but the highest lose a bit to their sign."""
    return 1 if width <= most else ceil((width - 1) / (most - 1))


@singledispatch
def multipliers(design: DotProduct | Stage) -> tuple[Multiplier, ...]:
    """The multipliers of a design, by the widths of their factors."""
    return ()


@singledispatch
def features(design: DotProduct | Stage) -> Features:
    """The features of a design, without its multipliers, memories and dot-product units.

    Raises TypeError for a class that has none.
    """
    raise TypeError(f"no features for {type(design).__name__}")


def features_on(design: DotProduct | Stage, target: str) -> Features:
    """The features that cost something on a target: multipliers that are DSP blocks leave logic alone."""
    found = features(design)
    logic = [m for m in multipliers(design) if not _blocks(m, target)]
    real = [m for m in logic if m.constant is None]
    found["multiplier"] = sum(m.recoded if target == "nand2" else m.pairs for m in real)
    # The parts of a product that is wider than a DSP block come together in adders.
    parts = sum((m.a + m.b) * (_blocks(m, target) - 1) * m.count for m in multipliers(design) if m not in logic)
    found["adder"] = found.get("adder", 0) + sum(m.added for m in logic) + parts
    if target == "xc7_dsp" and "register" in found:
        # A DSP48E1 keeps the register behind its product.
        inside = sum((m.a + m.b) * m.count for m in multipliers(design) if m not in logic)
        found["register"] = max(0.0, found["register"] - inside)
    return found


# The dot-product unit.


@multipliers.register
def _(design: DotProduct) -> tuple[Multiplier, ...]:
    a, b = design.a, design.b
    found: list[Multiplier] = []
    if not _is_ternary(design):
        widths = (_integer_bits(a), _integer_bits(b)) if _as_integers(design) else (_significand(a), _significand(b))
        found.append(Multiplier(widths[0], widths[1], design.lanes, signed=_as_integers(design)))
    factors = [scale.significand_bits for scale in design.scales if scale.significand_bits]
    if len(factors) == 2:
        found.append(Multiplier(factors[0], factors[1]))
    if factors:
        found.append(Multiplier(design.sum_bits, sum(factors) + 1))
    return tuple(found)


def _is_ternary(unit: DotProduct) -> bool:
    return any(code.largest == 1 and code.elements[0].is_fixed for code in (unit.a, unit.b))


def _is_fixed(code: OperandCode) -> bool:
    return any(element.is_fixed for element in code.elements)


def _integer_bits(code: OperandCode) -> int:
    """Bits of an operand's numbers as signed integers; -128 needs no more than 127 does."""
    return (code.largest - 1).bit_length() + 1


def _as_integers(unit: DotProduct) -> bool:
    """Whether elements are multiplied as integers; otherwise their significands, and the product is shifted."""
    return _is_fixed(unit.a) or _is_fixed(unit.b)


def _significand(code: OperandCode) -> int:
    return max(element.significand_bits for element in code.elements)


def _largest_shift(code: OperandCode) -> int:
    """How far a significand is shifted at most, on the way to an integer in the operand's units."""
    return max(element.largest_shift + (element.unit - code.unit) for element in code.elements)


@features.register
def _(design: DotProduct) -> Features:
    lanes, total = design.lanes, design.sum_bits
    a, b = design.a, design.b
    wide = product_bits(a, b)
    shifter = negation = 0.0
    if _as_integers(design):
        for code in (a, b):
            if not _is_fixed(code):
                shifter += shifter_cells(_significand(code), _largest_shift(code), _integer_bits(code))
                negation += _integer_bits(code)
    else:
        shifter += shifter_cells(_significand(a) + _significand(b), _largest_shift(a) + _largest_shift(b), wide)
        negation += wide
    selection = sum(code.code_bits + 4 for code in (a, b) if code.is_mixed)
    if _is_ternary(design):
        selection += 2 * wide
    stages = 2 + (design.segment > lanes) + design.has_significands
    factors = sum(scale.significand_bits for scale in design.scales)
    exponent = _exponent_bits(design)
    bias = design.bias.width if design.bias else 0
    after = total + (factors + 1 if factors else 0)
    delay = stages * exponent + (stages + 1) * bias + (stages - 1) * factors + 3 * (stages + 2)
    found: Features = {
        "shifter": lanes * shifter,
        "negation": lanes * (negation + selection),
        "adder": tree_bits(lanes, wide) + (total if design.segment > lanes else 0),
        "register": lanes * wide + total + (total if design.segment > lanes else 0) + (after if factors else 0),
        "delay": delay,
        "window": 0.0,
        "constant": 1.0,
    }
    for name, count in accumulator_features(design.accumulator, design, after).items():
        found[name] = found.get(name, 0.0) + count
    return found


@singledispatch
def accumulator_features(accumulator: Accumulator, unit: DotProduct, width: int) -> Features:
    """What an accumulator adds to the features of its unit, which gives it sums of `width` bits."""
    raise TypeError(f"no features for {type(accumulator).__name__}")


@accumulator_features.register
def _(accumulator: Window, unit: DotProduct, width: int) -> Features:
    window = accumulator.width
    aligner = _aligner(unit, accumulator, width)
    return {"shifter": aligner, "register": 3 * window, "window": window * (2 if unit.bias else 1)}


def _exponent_bits(unit: DotProduct) -> int:
    """Bits of the sum of the scales' exponents."""
    widths = [scale.exponent_bits for scale in unit.scales]
    return max(widths) + len(widths) - 1 if widths else 0


def _aligner(unit: DotProduct, window: Window, width: int) -> float:
    """Bits times levels of the shift into the window, what falls below the window's lowest bit included."""
    if not unit.scales:
        return 0.0
    least = unit.unit + sum(scale.unit for scale in unit.scales) - window.lsb
    most = least + sum(scale.largest_exponent for scale in unit.scales)
    low, high = min(0, max(least, -width)), max(0, min(most, window.width))
    return float(shifter_cells(width, high - low, max(window.width, width) + 1 - low))


def shifter_cells(width: int, largest: int, room: int) -> int:
    """Multiplexers of a barrel shifter by 0 to `largest` places: each level makes the number wider, up to `room`."""
    return sum(min(room, width + (2 << level) - 1) for level in range(largest.bit_length()))


def tree_bits(lanes: int, width: int) -> int:
    """Bits of all sums of a tree that adds `lanes` numbers of `width` bits exactly."""
    found, widths = 0, [width] * lanes
    while len(widths) > 1:
        sums = [max(widths[i : i + 2]) + 1 for i in range(0, len(widths) - 1, 2)]
        found += sum(sums)
        widths = [*sums, *([widths[-1]] if len(widths) % 2 else [])]
    return found


# Stages.


@features.register
def _(design: Contraction) -> Features:
    """Control, requantization and the serializer of the copies' results; units and memories stand beside."""
    words = [design.steps, design.groups, design.groups * design.steps, *(m.depth for m in design.memories)]
    if design.dynamic:
        words += [design.columns * design.steps, design.rows, design.groups * design.steps]
    serial = design.copies * design.result.width if design.copies > 1 else 0
    accumulator = design.unit.accumulator
    # Sums in f32 come out of their units in the result's format.
    rounded = accumulator.total_bits + design.result.width if isinstance(accumulator, Window) else 0
    return {
        "adder": design.copies * rounded,
        "register": serial + design.result.width,
        "control": sum(address_bits(depth) for depth in words if depth > 1),
        "constant": 1.0,
    }


@features.register
def _(design: Quantize) -> Features:
    given, code = design.given.width, design.code
    found: Features = {
        "register": (design.lanes - 1) * code.code_bits + design.outputs["out"],
        "control": address_bits(design.lanes) + address_bits(design.blocks),
        "constant": 1.0,
    }
    if code.scale is None:
        return {**found, "rounding": given + code.code_bits}
    return {
        **found,
        "shifter": given * (bits_above(given) if code.elements[0].is_fixed else 2 * bits_above(given)),
        "adder": 4 * given + code.code_bits,
        "control": found["control"] + address_bits(design.block) * 4,
        "block": 1.0,
    }


@features.register
def _(design: QuantizeScaled) -> Features:
    given, code = design.given.width, design.code
    moved = given + 14 + max(0, 11 - design.given.fraction)
    return {
        # To the highest bit of the largest magnitude, and to the scale's exponent.
        "shifter": given * bits_above(given) + 4 * moved,
        # Boundaries of scales; the magnitudes of a number and of the largest.
        "adder": 20 * given,
        "register": (design.lanes - 1) * code.code_bits + design.outputs["out"],
        "control": address_bits(design.block) * 4 + address_bits(design.lanes) + address_bits(design.blocks),
        "constant": 1.0,
    }


@multipliers.register
def _(design: QuantizeMixed) -> tuple[Multiplier, ...]:
    impact = design.impact
    square = Multiplier(impact.difference_bits, impact.difference_bits)
    if design.sensitivity is None:
        return (square,)
    return square, Multiplier(impact.square_bits, design.sensitivity.width - 1, signed=False)


@features.register
def _(design: QuantizeMixed) -> Features:
    given, impact, kinds = design.given.width, design.impact, design.kinds
    rounding = sum(given * (bits_above(given) if kind.is_fixed else 2 * bits_above(given)) for kind in kinds)
    decoding = sum(
        shifter_cells(kind.significand_bits, kind.largest_shift, kind.largest.bit_length() + 1)
        for kind in kinds
        if not kind.is_fixed
    )
    codes = sum(kind.bits for kind in kinds)
    summed = impact.difference_bits + impact.square_bits + 2 * impact.sum_bits
    return {
        "shifter": rounding + decoding,
        "negation": design.lanes * design.code.code_bits,
        "adder": 7 * given + codes + summed,
        "register": (design.lanes - 1) * codes + design.outputs["out"] + summed,
        "table": given * impact.sum_bits,
        "control": address_bits(design.block) * 4 + address_bits(design.blocks),
        "constant": 1.0,
    }


@multipliers.register
def _(design: Normalize) -> tuple[Multiplier, ...]:
    root, given = design.root, design.given.width
    found = [Multiplier(given, given), Multiplier(given + design.centred, root.ROOT_BITS + 3)]
    if design.weight is not None:
        found.append(Multiplier(root.normal.width, design.weight.width))
    if design.centred:
        found += [Multiplier(given, design.sum_bits), Multiplier(given, given)]
    return tuple(found)


@features.register
def _(design: Normalize) -> Features:
    root, total = design.root, design.root.sum_bits
    highest = root.ROOT_BITS + total // 2 - root.root_of_size - root.normal.fraction
    scaled = design.given.width + root.ROOT_BITS + 3
    divided = root.numerator.bit_length() + root.ROOT_BITS + (2 * design.sum_bits if design.centred else 0)
    # Sum and what is added to it, root, division, rounding; around the mean, another division and three sums.
    added = 2 * total + 4 * root.ROOT_BITS + scaled + design.result.width
    return {
        "adder": added + (4 * design.sum_bits + 3 * total if design.centred else 0),
        "shifter": total * bits_above(total) + (scaled + highest) * highest.bit_length(),
        "register": 3 * total + divided + scaled + root.normal.width + design.result.width,
        "constant": 1.0,
    }


@multipliers.register
def _(design: Softmax) -> tuple[Multiplier, ...]:
    points = PowerOfTwo.FRACTION
    rise = max(PowerOfTwo(design.bits).steps).bit_length()
    return (
        Multiplier(rise, points - design.bits),
        Multiplier(points + 2, points + bits_above(design.size) + 2),
        Multiplier.by(design.exponential.factor, design.given.width + 1),
    )


@features.register
def _(design: Softmax) -> Features:
    points, table = PowerOfTwo.FRACTION, PowerOfTwo(design.bits)
    entries = 1 << design.bits
    return {
        "table": sqrt(entries) * (points + 1 + max(table.steps).bit_length()),
        "shifter": points * (points + 1).bit_length(),
        "adder": 2 * (design.given.width + 1) + 3 * (points + bits_above(design.size)) + design.result.width,
        "register": 5 * design.given.width + 2 * design.reciprocal_bits + design.result.width,
        "control": address_bits(design.size) * (7 + 2 * design.causal),
        "constant": 1.0,
    }


@multipliers.register
def _(design: Activation) -> tuple[Multiplier, ...]:
    table = design.table
    return (Multiplier(_signed_bits(table.slopes), table.low_bits + 1),) if table.low_bits else ()


@features.register
def _(design: Activation) -> Features:
    table = design.table
    bits = _signed_bits(table.bases) + _signed_bits(table.slopes)
    beside = table.given.width if CURVES[table.curve].above is None else 0
    return {
        # Neighbours in a table are alike: its logic grows with the square root of its length.
        "table": sqrt(1 << table.index_bits) * bits,
        "register": bits + table.low_bits + beside + table.result.width,
        "constant": 1.0,
    }


def _signed_bits(numbers: list[int]) -> int:
    return max(max(numbers).bit_length(), (-min(numbers)).bit_length()) + 1


@multipliers.register
def _(design: Rope) -> tuple[Multiplier, ...]:
    return (Multiplier(design.given.width, design.table.width, 2),)


@features.register
def _(design: Rope) -> Features:
    wide = design.given.width + design.table.width
    places = design.given.fraction + design.table.fraction - design.result.fraction
    return {
        "adder": wide + 1 + rounded_bits(wide + 1, places),
        "register": 3 * wide + design.result.width,
        "control": 5 * address_bits(design.size) + 3 * address_bits(design.positions * design.size),
        "constant": 1.0,
    }


@multipliers.register
def _(design: Binary) -> tuple[Multiplier, ...]:
    return (Multiplier(design.a.width, design.b.width),) if design.operation == "mul" else ()


@features.register
def _(design: Binary) -> Features:
    wide, fraction = design.a.width + design.b.width, design.a.fraction + design.b.fraction
    if design.operation != "mul":
        fraction = max(design.a.fraction, design.b.fraction)
        wide = max(point.width + fraction - point.fraction for point in (design.a, design.b)) + 1
    return {
        "adder": (0 if design.operation == "mul" else wide) + rounded_bits(wide, fraction - design.result.fraction),
        "register": wide + design.result.width,
        "constant": 1.0,
    }


@multipliers.register
def _(design: Convert) -> tuple[Multiplier, ...]:
    return (Multiplier.by(design.factor, design.given.width),) if design.factor != 1 else ()


@features.register
def _(design: Convert) -> Features:
    grown = design.factor.bit_length() + 1 if design.factor != 1 else 0
    wide, places = design.given.width + grown, design.given.fraction + design.factor_fraction - design.result.fraction
    return {
        "adder": rounded_bits(wide, places) + (wide if design.added else 0),
        "register": (wide if grown else 0) + design.result.width + 1,
        "window": design.result.width if wide - places > design.result.width else 0,
        "constant": 1.0,
    }


def rounded_bits(width: int, places: int) -> int:
    """Bits of the adder that rounds a number which loses `places` of its bits."""
    return max(0, width - places) if places > 0 else 0


def nonzero_digits(number: int) -> int:
    """Digits other than 0 of a number written with digits -1, 0 and 1, no two of them side by side: its adders."""
    return ((3 * number) ^ number).bit_count()
