"""Energy per multiply-accumulate and per bit moved, anchored to a 45 nm table: estimates, not measurements of a chip.

Anchors: M. Horowitz, "Computing's energy problem (and what we can do about it)", ISSCC 2014, figure 1.1.9 (45 nm,
0.9 V). Ratios between formats: what the gates of emitted units of eight lanes switch for each multiply-accumulate of MX
data drawn from normal distributions (changes of nets, weighted with their fan-out), relative to INT8; written to a file
by `python benchmarks/hardware_energy.py`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from math import log, sqrt
from pathlib import Path

import numpy as np

from ..codes import E8M0, ElementCode, OperandCode
from ..dot_product import DotProduct
from ..window import Window
from .features import features_on
from .fitting import non_negative

MULTIPLY_INT8, ADD_INT8 = 0.2, 0.03
"""Picojoules of an 8-bit multiplication and an 8-bit addition (Horowitz 2014)."""
INT8_MAC = MULTIPLY_INT8 + ADD_INT8
ANCHOR = "Horowitz 2014, 45 nm"

SWITCHING = Path(__file__).with_name("switching.json")
"""Outputs and inputs of gates that change for each multiply-accumulate, as `switching.py` measures them."""
FGMP_PAPER_SAVING = 0.14
"""What arXiv 2504.14152 states for 70 % of blocks in FP4."""

SRAM = ((8 * 8192, 10 / 64), (32 * 8192, 20 / 64), (8 * 1048576, 100 / 64))
"""(bits of a memory, picojoules for each bit that is read or written) (Horowitz 2014: 8 KB, 32 KB, 1 MB)."""
DRAM = (1300 / 64, 2600 / 64)
"""Picojoules for each bit to or from DRAM, least and most (Horowitz 2014)."""


@dataclass(frozen=True)
class Switching:
    """What changes for each multiply-accumulate: `pairs` by the formats of both operands, `fgmp` by mode.

    `fgmp` belongs to one unit that takes blocks of FP4 (E2M1) and FP8 (E4M3): "48" is FP4 x FP8.
    """

    pairs: dict[tuple[str, str], float]
    fgmp: dict[str, float]


@lru_cache(maxsize=1)
def switching() -> Switching:
    """The measured numbers."""
    found = json.loads(SWITCHING.read_text(encoding="utf-8"))
    pairs = {(a, b): float(value) for names, value in found["pairs"].items() for a, b in (names.split(),)}
    return Switching(pairs, {mode: float(value) for mode, value in found["fgmp"].items()})


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
    pairs = switching().pairs
    for pair in ((_name(a), _name(b)), (_name(b), _name(a))):
        if pair in pairs:
            return pairs[pair] / pairs["int8", "int8"], False
    return float(np.array(_traits(a, b)) @ _interpolation()), True


def _name(element: ElementCode) -> str:
    if element.is_fixed:
        return "trit" if element.largest == 1 else f"int{element.bits}"
    return f"e{element.exponent_bits}m{element.mantissa_bits}"


def _traits(a: ElementCode, b: ElementCode) -> list[float]:
    """What energy grows with: cells of a unit's multipliers, and bits of its sums and registers."""
    first, second = (OperandCode(_name(element), (element,), E8M0, 32) for element in (a, b))
    found = features_on(DotProduct(first, second, 8, 32, Window(32, -20)), "nand2")
    return [found["multiplier"], found["adder"] + found["register"]]


@lru_cache(maxsize=1)
def _interpolation() -> np.ndarray:
    """Least squares through the measured pairs, on relative errors."""
    from .designs import element_code

    pairs = switching().pairs
    relative = np.array(list(pairs.values())) / pairs["int8", "int8"]
    rows = np.array([_traits(element_code(a), element_code(b)) for a, b in pairs])
    return non_negative(rows / relative[:, None], np.ones(len(relative)))


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


def fgmp_energies() -> dict[str, float]:
    """Energy of each mode (formats of both operands' blocks) relative to a unit that knows FP8 only."""
    found = switching()
    return {mode: value / found.pairs["e4m3", "e4m3"] for mode, value in found.fgmp.items()}


def fgmp_saving(low_share: float) -> float:
    """The part of the dot products' energy that blocks in FP4 save; both operands have `low_share` of them, at random.

    p^2, 2 p (1 - p) and (1 - p)^2 are the shares of the modes; what mixes the two is the mean of both mixed modes.
    """
    energy, p = fgmp_energies(), low_share
    mixed = (energy["48"] + energy["84"]) / 2
    return 1 - (p * p * energy["44"] + 2 * p * (1 - p) * mixed + (1 - p) ** 2 * energy["88"])
