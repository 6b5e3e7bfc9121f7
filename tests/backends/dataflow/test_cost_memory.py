"""Memories of stages against circuits, and the energy of what moves."""

import pytest

from mxloom.backends.dataflow.cost.designs import (
    fit_designs,
)
from mxloom.backends.dataflow.cost.energy import (
    bit_energy,
    logic_energy,
)
from mxloom.backends.dataflow.cost.memory import blocks, memories
from mxloom.backends.dataflow.cost.stages import stage_cost
from mxloom.backends.dataflow.memory import MemoryOp
from mxloom.backends.dataflow.rtl import circuit
from mxloom.backends.dataflow.stages._stream import Memory

from .cost_designs import stage


@pytest.mark.parametrize("line", [line for line in fit_designs() if not line.startswith("dot")][::2])
def test_memories_are_those_of_the_circuit(line: str) -> None:
    one = stage(line)
    types = [op.memory.type for op in circuit(one.module("top")).walk() if isinstance(op, MemoryOp)]
    built = [(int(type.depth.data), int(type.width.data)) for type in types]
    assert sorted(built) == sorted((held.memory.depth, held.memory.width) for held in memories(one))


def test_scales_that_several_rows_share_stand_beside_each_of_them() -> None:
    # A memory is read row by row: blocks of four rows save nothing of it.
    one = stage("contraction a=int8 b=int4:bf16:4x32 lanes=8 segment=32 window=32 columns=8 size=64 result=16")
    types = [op.memory.type for op in circuit(one.module("top")).walk() if isinstance(op, MemoryOp)]
    built = {(int(type.depth.data), int(type.width.data)) for type in types}
    assert (8 * 64 // 32, 16) in built
    assert stage_cost(one).memory_bits["weights"] == 8 * 64 * 4 + 8 * 2 * 16


def test_traffic_where_scales_and_biases_have_one_width() -> None:
    # An f32 scale for all of a row and a bias of 32 bits: 5 rows of a, 6 of b, 64 numbers in beats of 8.
    line = "contraction a=int8 b=int4:f32 lanes=8 segment=64 window=32 rows=5 columns=6 size=64 result=16 bias=32"
    beats, sums = 5 * 6 * 8, 5 * 6
    expected = beats * 8 * 4 * bit_energy(6 * 8 * 8 * 4) + 2 * sums * 32 * bit_energy(6 * 32)
    # Rows of a: codes and a scale of 8 bits, written once and read for every row of b, in two banks.
    expected += (5 * 8 + beats) * (8 * 8 + 8) * bit_energy(2 * 8 * (8 * 8 + 8))
    assert stage_cost(stage(line)).energy_pj["memory"] == pytest.approx(expected)


def test_traffic_where_codes_and_scales_have_one_width() -> None:
    # Two codes of 4 bits are as wide as their scale, which stands beside 16 beats; the last block has 8.
    line = "contraction a=int8 b=int4 lanes=2 segment=32 window=32 rows=3 columns=4 size=48 result=16"
    beats, sides = 3 * 4 * 24, 3 * 4 * 2
    expected = beats * 8 * bit_energy(4 * 24 * 8) + sides * 8 * bit_energy(4 * 2 * 8)
    expected += (3 * 24 + beats) * 24 * bit_energy(2 * 24 * 24)
    assert stage_cost(stage(line)).energy_pj["memory"] == pytest.approx(expected)


def test_memory_blocks() -> None:
    assert blocks(Memory(512, 36), "xc7") == (0.5, 0)
    assert blocks(Memory(1024, 36), "xc7") == (1.0, 0)
    assert blocks(Memory(1024, 24), "xc7") == (1.0, 0)
    assert blocks(Memory(1024, 18), "ecp5") == (1, 0)
    assert blocks(Memory(32, 12), "xc7") == (0.0, 8)


def test_energies_of_memories_are_horowitz_s() -> None:
    kilobyte = 8 * 1024
    table = [bit_energy(size * kilobyte) * 64 for size in (8, 32, 1024)]
    assert table == pytest.approx([10, 20, 100])
    assert bit_energy(2 * kilobyte) * 64 == pytest.approx(5)
    assert 10 < bit_energy(16 * kilobyte) * 64 < 20
    assert bit_energy(0) == 0
    assert logic_energy(64, 8) == pytest.approx(0.23)
