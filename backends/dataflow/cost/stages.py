"""What a stage costs, from its numbers alone: nothing is built or emitted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from typing import TypeVar

from ..dot_product import DotProduct
from ..stages._stream import Stage
from ..stages.contraction import Contraction
from ..stages.softmax import Softmax
from .energy import bit_energy, logic_energy, mac_energy
from .features import dsp_blocks, features, multipliers
from .memory import LEVELS, Held, blocks, memories
from .model import Coefficients, coefficients

Number = TypeVar("Number", int, float)
FAMILIES = {"xc7": "xc7", "xc7_dsp": "xc7", "ecp5": "ecp5"}
"""The family of memory blocks of each FPGA target."""


@dataclass(frozen=True)
class StageCost:
    """Areas without memories, FPGA resources with them, memories in bits, energy of one run, cycles.

    `nand2` in gates, `asap7_um2` in square micrometres (ASAP7, where the coefficients name no other library);
    `fpga` LUT, FF, DSP and BRAM by target; `memory_bits` by level; `energy_pj` of `macs`, `logic` and `memory`.
    `outside` says which feature lies outside the fitted range: there the areas are extrapolated. `interpolated` says
    that no measured energy stands behind a pair of formats.
    """

    nand2: float = 0.0
    asap7_um2: float = 0.0
    fpga: dict[str, dict[str, float]] = field(default_factory=dict)
    memory_bits: dict[str, int] = field(default_factory=dict)
    energy_pj: dict[str, float] = field(default_factory=dict)
    macs: int = 0
    cycles: int = 0
    outside: tuple[str, ...] = ()
    interpolated: bool = False

    def __add__(self, other: StageCost) -> StageCost:
        """Both side by side: sums, and the cycles of the slower."""
        targets = {**self.fpga, **other.fpga}
        fpga = {target: _sum(self.fpga.get(target, {}), other.fpga.get(target, {})) for target in targets}
        return StageCost(
            self.nand2 + other.nand2,
            self.asap7_um2 + other.asap7_um2,
            fpga,
            _sum(self.memory_bits, other.memory_bits),
            _sum(self.energy_pj, other.energy_pj),
            self.macs + other.macs,
            max(self.cycles, other.cycles),
            tuple(dict.fromkeys((*self.outside, *other.outside))),
            self.interpolated or other.interpolated,
        )


def _sum(a: Mapping[str, Number], b: Mapping[str, Number]) -> dict[str, Number]:
    found = dict(a)
    for name, value in b.items():
        found[name] = found[name] + value if name in found else value
    return found


def total(costs: Sequence[StageCost]) -> StageCost:
    """A design of these stages: all together, as slow as the slowest."""
    return reduce(lambda a, b: a + b, costs, StageCost())


def stage_cost(stage: Stage, coefficients_: Coefficients | None = None) -> StageCost:
    """The cost of a stage; a contraction's units are counted as often as it has copies."""
    model = coefficients_ or coefficients()
    logic, outside = _logic(stage, model)
    if isinstance(stage, Contraction):
        unit, beyond = _logic(stage.unit, model)
        outside += beyond
        for target, counts in unit.items():
            logic[target] = _sum(logic[target], {name: stage.copies * count for name, count in counts.items()})
    held = memories(stage)
    fpga = {target: _with_memories(logic[target], held, family) for target, family in FAMILIES.items()}
    nand2 = logic["nand2"]["NAND2"]
    macs, energy, interpolated = _energy(stage, held)
    return StageCost(
        nand2,
        nand2 * model.nand2_um2,
        fpga,
        {level: sum(memory.bits for memory in held if memory.level == level) for level in LEVELS},
        energy,
        macs,
        stage.cycles,
        tuple(dict.fromkeys(outside)),
        interpolated,
    )


def _logic(design: DotProduct | Stage, model: Coefficients) -> tuple[dict[str, dict[str, float]], list[str]]:
    """(counts by target, what is outside the fitted range)."""
    counts, outside = dict[str, dict[str, float]](), list[str]()
    for target in ("nand2", *FAMILIES):
        counts[target], beyond = model.predict(design, target)
        outside += beyond
        if target in FAMILIES:
            counts[target]["DSP"] = dsp_blocks(multipliers(design), target)
    return counts, outside


def _with_memories(counts: dict[str, float], held: list[Held], family: str) -> dict[str, float]:
    found = [blocks(memory.memory, family) for memory in held]
    return {
        **counts,
        "LUT": counts["LUT"] + sum(luts for _, luts in found),
        "BRAM": sum(block for block, _ in found),
    }


def _energy(stage: Stage, held: list[Held]) -> tuple[int, dict[str, float], bool]:
    """(multiply-accumulates of a run, picojoules by sort, whether a pair of formats was interpolated)."""
    if isinstance(stage, Contraction):
        unit = stage.unit
        beats = stage.runs * stage.rows * stage.groups * stage.steps
        # The zeros that fill a last block or a last group of rows are multiplied as well.
        macs = beats * unit.lanes * stage.copies
        each = mac_energy(unit.a, unit.b)
        memory = _contraction_traffic(stage, held, beats)
        return macs, {"macs": macs * each.picojoules, "logic": 0.0, "memory": memory}, each.interpolated
    numbers = max(stage.beats.values())
    pairs = sum(m.pairs for m in multipliers(stage) if m.constant is None)
    adders = features(stage).get("adder", 0.0) + sum(m.added for m in multipliers(stage))
    reads = {"weights": numbers, "rows": numbers * (2 if isinstance(stage, Softmax) else 1)}
    # What is kept is written once.
    memory = sum(
        (reads[one.level] + (numbers if one.level == "rows" else 0)) * one.memory.width * bit_energy(one.bits)
        for one in held
    )
    return 0, {"macs": 0.0, "logic": numbers * logic_energy(pairs, adders), "memory": memory}, False


def _contraction_traffic(stage: Contraction, held: list[Held], beats: int) -> float:
    """Picojoules of what is written into the banks and read for the beats of the units.

    Every beat reads codes; what stands beside a block is read once for the block, a bias once for its sum.
    """
    sums = stage.runs * stage.rows * stage.groups
    reads = {"codes": beats, "sides": sums * stage.side_words, "biases": sums, "a": beats, "b": beats}
    found = sum(reads[one.name] * one.memory.width * bit_energy(one.bits) for one in held)
    for name, width in stage.inputs.items():
        bank = next(one for one in held if one.name == name)
        found += stage.beats[name] * width * bit_energy(bank.bits)
    return found
