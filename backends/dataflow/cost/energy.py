"""Energy per multiply-accumulate and per bit moved, anchored to a 45 nm table: estimates, not measurements of a chip.

Anchors: M. Horowitz, "Computing's energy problem (and what we can do about it)", ISSCC 2014, figure 1.1.9 (45 nm,
0.9 V). Ratios between formats: switched capacitance per multiply-accumulate of emitted units of eight lanes on MX data
drawn from normal distributions (toggles of a gate netlist, weighted with their fan-out), relative to INT8.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from math import log, sqrt

import numpy as np

from ..codes import ElementCode, OperandCode

MULTIPLY_INT8, ADD_INT8 = 0.2, 0.03
"""Picojoules of an 8-bit multiplication and an 8-bit addition (Horowitz 2014)."""
INT8_MAC = MULTIPLY_INT8 + ADD_INT8
ANCHOR = "Horowitz 2014, 45 nm"

SWITCHED = {
    ("int8", "int8"): 695.6,
    ("int4", "int4"): 243.9,
    ("int6", "int6"): 446.7,
    ("e2m1", "e2m1"): 252.4,
    ("e2m3", "e2m3"): 465.4,
    ("e3m2", "e3m2"): 420.8,
    ("e4m3", "e4m3"): 616.2,
    ("e5m2", "e5m2"): 516.0,
    ("int4", "int8"): 465.5,
}
"""Switched capacitance per multiply-accumulate, in gate inputs that toggle."""

FGMP_SWITCHED = {
    "shared": {"88": 646.1, "48": 598.8, "84": 587.4, "44": 510.4},
    "split": {"88": 678.9, "48": 630.9, "84": 619.0, "44": 445.3},
}
"""The same of units that take FP4 (E2M1) and FP8 (E4M3) blocks, by the formats of both operands' blocks.

`shared`: one multiplier for both, as `multiplier.py` builds it; `split`: a small and a large one, the idle one held.
"""
FGMP_PAPER_SAVING = 0.14
"""What arXiv 2504.14152 states for 70 % of blocks in FP4."""

SRAM = ((8 * 8192, 10 / 64), (32 * 8192, 20 / 64), (8 * 1048576, 100 / 64))
"""(bits of a memory, picojoules for each bit that is read or written) (Horowitz 2014: 8 KB, 32 KB, 1 MB)."""
DRAM = (1300 / 64, 2600 / 64)
"""Picojoules for each bit to or from DRAM, least and most (Horowitz 2014)."""


@dataclass(frozen=True)
class MacEnergy:
    """Relative to INT8, in picojoules, and whether it was measured for these formats or is interpolated."""

    relative: float
    picojoules: float
    interpolated: bool


def mac_energy(a: OperandCode, b: OperandCode) -> MacEnergy:
    """One multiply-accumulate of two operands; blocks of two kinds count as a half of each."""
    found = [_relative(x, y) for x in a.elements for y in b.elements]
    relative = sum(value for value, _ in found) / len(found)
    return MacEnergy(relative, relative * INT8_MAC, any(guessed for _, guessed in found))


@lru_cache(maxsize=4096)
def _relative(a: ElementCode, b: ElementCode) -> tuple[float, bool]:
    """(energy relative to INT8, is it interpolated)."""
    base = SWITCHED["int8", "int8"]
    for pair in ((_name(a), _name(b)), (_name(b), _name(a))):
        if pair in SWITCHED:
            return SWITCHED[pair] / base, False
    row = np.array(_traits(a, b))
    return max(0.05, float(row @ _interpolation())), True


def _name(element: ElementCode) -> str:
    if element.is_fixed:
        return f"int{element.bits}"
    return f"e{element.exponent_bits}m{element.mantissa_bits}"


def _traits(a: ElementCode, b: ElementCode) -> list[float]:
    """What energy grows with: pairs of bits in the multiplier, and bits of the exact product."""
    product = (a.largest * b.largest).bit_length() + 1
    return [a.significand_bits * b.significand_bits, product, 1.0]


@lru_cache(maxsize=1)
def _interpolation() -> np.ndarray:
    """Least squares through the measured pairs."""
    from .designs import element_code

    rows = [_traits(element_code(a), element_code(b)) for a, b in SWITCHED]
    base = SWITCHED["int8", "int8"]
    return np.linalg.lstsq(np.array(rows), np.array([value / base for value in SWITCHED.values()]), rcond=None)[0]


def bit_energy(bits: float) -> float:
    """Picojoules for each bit that goes into or out of an on-chip memory of `bits` bits.

    Between the table's sizes by a straight line in logarithms; beyond them with the square root of the size, as word
    and bit lines grow.
    """
    if bits <= 0:
        return 0.0
    if bits <= SRAM[0][0] or bits >= SRAM[-1][0]:
        size, energy = SRAM[0] if bits <= SRAM[0][0] else SRAM[-1]
        return energy * sqrt(bits / size)
    for (size, energy), (larger, more) in pairwise(SRAM):
        if size <= bits <= larger:
            return energy * (more / energy) ** (log(bits / size) / log(larger / size))
    raise AssertionError(bits)


def logic_energy(multiplier_pairs: float, adder_bits: float) -> float:
    """Picojoules of multipliers and adders, by their cells: 8 x 8 pairs of bits, 8 bits of a sum are the anchors."""
    return multiplier_pairs * MULTIPLY_INT8 / 64 + adder_bits * ADD_INT8 / 8


def fgmp_energies(structure: str = "shared") -> dict[str, float]:
    """Energy of each mode (formats of both operands' blocks) relative to a unit that knows FP8 only."""
    return {mode: value / SWITCHED["e4m3", "e4m3"] for mode, value in FGMP_SWITCHED[structure].items()}


def fgmp_saving(low_share: float, structure: str = "shared") -> float:
    """The part of the dot products' energy that blocks in FP4 save; both operands have `low_share` of them, at random.

    p^2, 2 p (1 - p) and (1 - p)^2 are the shares of the modes; what mixes the two is the mean of both mixed modes.
    """
    energy, p = fgmp_energies(structure), low_share
    mixed = (energy["48"] + energy["84"]) / 2
    return 1 - (p * p * energy["44"] + 2 * p * (1 - p) * mixed + (1 - p) ** 2 * energy["88"])
