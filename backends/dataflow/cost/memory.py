"""The memories of stages, exactly, and what they take of an FPGA's memory blocks."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf

from ....dialects.integer import PowerOfTwo
from ..stages._blocks import BlockStage
from ..stages._stream import Memory, Stage
from ..stages.contraction import Contraction
from ..stages.normalize import Normalize
from ..stages.patches import Patches
from ..stages.pool import Pool
from ..stages.rope import Rope
from ..stages.route import Fifo, Reorder
from ..stages.softmax import Softmax

LEVELS = ("weights", "rows")
"""What memories hold: numbers that are loaded once, or rows and words that pass."""

_SHAPES = ((36, 512), (18, 1024), (9, 2048), (4, 4096), (2, 8192), (1, 16384))
"""(width, depth) of half a block RAM of the 7 series (Xilinx UG473) and of ECP5's DP16KD (Lattice TN02204)."""
_SMALLEST_BLOCK = {"xc7": 2048, "ecp5": 2048}
"""Memories of fewer bits stand in LUTs."""
_LUT_RAM = {"xc7": (32, 6, 4), "ecp5": (16, 4, 4)}
"""(words, bits, LUTs) of the distributed memory's cell: RAM32M, TRELLIS_DPR16X4."""


@dataclass(frozen=True)
class Held:
    """A memory, and what it holds: `name` tells those of a contraction apart, whose widths may be the same.

    `codes`, `sides` and `biases` of weights, rows of `a` and of `b`.
    """

    level: str
    memory: Memory
    name: str = ""

    @property
    def bits(self) -> int:
        return self.memory.depth * self.memory.width


def memories(stage: Stage) -> list[Held]:
    """Every memory that the stage's circuit has: those that are loaded, and two banks of every row that is kept."""
    if isinstance(stage, Contraction):
        names = _weight_names(stage)
        found = [Held("weights", memory, name) for memory, name in zip(stage.memories, names, strict=True)]
        return found + [Held("rows", memory, "b" if at else "a") for at, memory in enumerate(_rows(stage))]
    found = [Held("weights", memory) for memory in stage.memories]
    return found + [Held("rows", memory) for memory in _rows(stage)]


def _weight_names(stage: Contraction) -> list[str]:
    """What the memories that are loaded hold, in their order: those of each copy; of a dynamic product biases alone."""
    biases = ["biases"] * bool(stage.unit.bias)
    if stage.dynamic:
        return biases
    return ["codes", *["sides"] * bool(stage.unit.b.side_bits), *biases] * stage.copies


def _rows(stage: Stage) -> list[Memory]:
    match stage:
        case Contraction():
            rows = [Memory(2 * stage.steps, stage.inputs["a"])]
            if stage.dynamic:
                rows += [Memory(2 * stage.groups * stage.steps, stage.inputs["b"])] * stage.copies
            return rows
        case BlockStage():
            return [Memory(2 * stage.block, stage.given.width)]
        case Normalize():
            return [Memory(2 * stage.size, stage.given.width)]
        case Softmax():
            return [Memory(2 * stage.size, stage.given.width), Memory(stage.size, PowerOfTwo.FRACTION + 1)]
        case Rope():
            return [Memory(2 * stage.size, stage.given.width)] * 2
        case Fifo():
            return [Memory(stage.depth, stage.width)]
        case Reorder():
            return [Memory(2 * stage.count, stage.width)]
        case Patches():
            return [Memory(stage.kept * stage.line, stage.width)]
        case Pool() if stage.inner > 1:
            return [Memory(stage.inner, stage.kept_bits)]
    return []


def blocks(memory: Memory, family: str) -> tuple[float, int]:
    """(block RAMs, LUTs) of a memory on `xc7` (36 Kbit blocks, halves of them) or `ecp5` (16 Kbit), by its shape."""
    if memory.depth * memory.width < _SMALLEST_BLOCK[family]:
        words, bits, luts = _LUT_RAM[family]
        return 0.0, -(-memory.depth // words) * -(-memory.width // bits) * luts
    best = inf
    for width, depth in _SHAPES:
        best = min(best, -(-memory.width // width) * -(-memory.depth // depth))
    return best / 2 if family == "xc7" else best, 0
