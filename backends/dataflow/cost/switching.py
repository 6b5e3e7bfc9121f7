"""How much a dot-product unit switches for each product, by the formats of its operands: gates that are simulated."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from ....dialects.formats import Encoded, MixedType
from ....dialects.instances import format_of
from ....dialects.numbers import encode
from ..codes import OperandCode, operand_code
from ..dot_product import DotProduct
from ..images import rows_of
from ..window import Window
from .gates import STREAMS, Netlist, words
from .synthesis import netlist, verilog

if TYPE_CHECKING:
    from xdsl.ir import TypeAttribute

LANES, BLOCK, BLOCKS = 8, 32, 12
"""Of a unit; numbers of a block; blocks of a sum."""
SUMS, WARM = 4, 24
"""Sums of each stream, and cycles before the pipeline is full, which do not count."""
WINDOW = Window(32, -20)
_NAMES = {"e2m1": "mxfp4", "e2m3": "mxfp6_e2m3", "e3m2": "mxfp6_e3m2", "e4m3": "mxfp8_e4m3", "e5m2": "mxfp8_e5m2"}
_ALIKE = (*(f"int{bits}" for bits in (2, 3, 4, 6, 8)), *_NAMES)
PAIRS = (*zip(_ALIKE, _ALIKE, strict=True), ("int4", "int8"), ("int8", "e2m1"), ("e2m1", "e4m3"), ("e2m3", "e3m2"))
"""Element formats of both operands."""
MIXED = "mixed<!mx.block<32xf4E2M1FN>, !mx.block<32xf8E4M3FN>>"
MODES = ("88", "48", "84", "44")
"""Kinds of both operands' blocks of a unit that takes FP4 and FP8: FP8 x FP8, FP4 x FP8, FP8 x FP4, FP4 x FP4."""


def switched(tell: Callable[[str], None] = lambda text: None) -> dict[str, dict[str, float]]:
    """Outputs and inputs of gates that change for each multiply-accumulate: "pairs" by formats, "fgmp" by mode.

    Operands are rows of the normal distributions N(0, 1) and N(0, 0.02), rounded into MX blocks. Gates have no delays:
    what glitches does not count. Runs Yosys once for each unit.
    """
    found: dict[str, dict[str, float]] = {"pairs": {}, "fgmp": {}}
    for pair in PAIRS:
        a, b = (format_of(_NAMES.get(name, f"mx{name}"), rank=2) for name in pair)
        found["pairs"][" ".join(pair)] = _measured(Unit(a, b), a, b)
        tell(f"{' x '.join(pair)}: {found['pairs'][' '.join(pair)]}")
    mixed = format_of(MIXED, rank=2)
    assert isinstance(mixed, MixedType)
    unit = Unit(mixed, mixed)
    for mode in MODES:
        a, b = (mixed.low if kind == "4" else mixed.high for kind in mode)
        found["fgmp"][mode] = _measured(unit, a, b)
        tell(f"FGMP {mode}: {found['fgmp'][mode]}")
    return found


class Unit:
    """A unit's gates, and the formats that its operands come in."""

    def __init__(self, a: TypeAttribute, b: TypeAttribute) -> None:
        self.codes = operand_code(a, BLOCK * BLOCKS), operand_code(b, BLOCK * BLOCKS)
        self.design = DotProduct(self.codes[0], self.codes[1], LANES, BLOCK, WINDOW)
        self.gates = Netlist(netlist(verilog(self.design)))

    def inputs(self, a: Encoded, b: Encoded) -> dict[str, np.ndarray]:
        """What drives the unit with rows [STREAMS, sum after sum], one beat a cycle."""
        rows, size = a.shape
        assert rows == STREAMS
        steps = size // LANES
        one, none = np.ones((STREAMS, steps, 1), bool), np.zeros((STREAMS, steps, 1), bool)
        at = np.arange(steps)
        found = {"rst": none, "enable": one, "valid": one}
        found["segment_last"] = one & (at % (BLOCK // LANES) == BLOCK // LANES - 1)[None, :, None]
        found["last"] = one & (at % (BLOCK * BLOCKS // LANES) == BLOCK * BLOCKS // LANES - 1)[None, :, None]
        for name, code, operand in (("a", self.codes[0], a), ("b", self.codes[1], b)):
            found[name], found[f"{name}_side"] = _bits(code, operand)
        return {name: words(bits) for name, bits in found.items()}


def _bits(code: OperandCode, operand: Encoded) -> tuple[np.ndarray, np.ndarray]:
    """(codes of each beat, what stands beside its block) as bits [rows, steps, bits]; blocks of one kind."""
    size = operand.shape[1]
    own = operand_code(operand.format, size)
    rows = rows_of(operand, own, size)
    lanes = rows.codes.reshape(len(rows.codes), -1, LANES)
    # Codes of a narrower kind lie lowest, and stand under a kind of 1.
    bits = (lanes[..., None] >> np.arange(code.code_bits)) & 1
    sides = rows.sides
    if code.is_mixed and own.elements[0] == code.elements[0]:
        assert code.scale is not None
        sides = sides | (1 << code.scale.bits)
    sides = np.repeat(sides, BLOCK // LANES, axis=1)
    return bits.reshape(*lanes.shape[:2], -1), (sides[..., None] >> np.arange(code.side_bits)) & 1


def operands(*types: TypeAttribute) -> tuple[Encoded, ...]:
    """Rows of both operands for every stream, sum after sum."""
    import torch

    generator = torch.Generator().manual_seed(0)
    shape = (STREAMS, BLOCK * BLOCKS * SUMS)
    return tuple(
        encode(torch.randn(shape, generator=generator) * deviation, type)
        for type, deviation in zip(types, (1.0, 0.02), strict=True)
    )


def _measured(unit: Unit, a: TypeAttribute, b: TypeAttribute) -> float:
    run = unit.gates.run(unit.inputs(*operands(a, b)))
    counted = run.switched[WARM:]
    return round(float(counted.sum()) / (len(counted) * STREAMS * LANES), 1)
