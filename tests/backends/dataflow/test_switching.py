"""What gates switch: netlists by hand, and those of Yosys against exact sums."""

from typing import Any

import numpy as np
import pytest
import torch

from mxloom.backends.dataflow.cost.gates import STREAMS, Netlist, numbers, words
from mxloom.backends.dataflow.cost.switching import BLOCK, BLOCKS, MIXED, WARM, WINDOW, Unit, operands
from mxloom.dialects.errors import MxloomError
from mxloom.dialects.formats import MixedType
from mxloom.dialects.instances import format_of

from .cost_designs import needs_yosys


def module(cells: dict[str, tuple[str, dict[str, int | str]]], **ports: list[int | str]) -> dict[str, Any]:
    return {
        "ports": {name: {"bits": bits} for name, bits in ports.items()},
        "cells": {
            name: {"type": f"$_{kind}_", "connections": {pin: [bit] for pin, bit in pins.items()}}
            for name, (kind, pins) in cells.items()
        },
    }


def test_a_counter_of_two_bits_by_hand() -> None:
    # q0 <- not q0, q1 <- q0 xor q1. Weights: a driver's output and each input fed.
    cells: dict[str, tuple[str, dict[str, int | str]]] = {
        "low": ("DFF_P", {"C": 2, "D": 5, "Q": 3}),
        "high": ("DFF_P", {"C": 2, "D": 6, "Q": 4}),
        "invert": ("NOT", {"A": 3, "Y": 5}),
        "add": ("XOR", {"A": 3, "B": 4, "Y": 6}),
    }
    found = Netlist(module(cells, clk=[2], q=[3, 4])).run({"clk": np.zeros((5, 1), np.uint64)})
    counted = numbers(found.ports["q"])
    assert (counted == counted[0]).all()
    # Two's complement of two bits; the first edge takes what stood there before anything settled: 0.
    assert counted[0].tolist() == [0, 1, -2, -1, 0]
    # At first the inverse settles. Then the low bit (weight 3) and its inverse (2) change in each cycle, the high bit
    # (2) and the sum (2) by turns.
    assert (found.switched / STREAMS).tolist() == [2, 7, 7, 7, 7]


@pytest.mark.parametrize(
    ("kind", "function"),
    [
        ("NAND", lambda a, b, c, d: 1 - a * b),
        ("NOR", lambda a, b, c, d: (1 - a) * (1 - b)),
        ("XNOR", lambda a, b, c, d: int(a == b)),
        ("ANDNOT", lambda a, b, c, d: a * (1 - b)),
        ("ORNOT", lambda a, b, c, d: 1 - (1 - a) * b),
        ("AOI3", lambda a, b, c, d: int(not ((a and b) or c))),
        ("OAI3", lambda a, b, c, d: int(not ((a or b) and c))),
        ("AOI4", lambda a, b, c, d: int(not ((a and b) or (c and d)))),
        ("OAI4", lambda a, b, c, d: int(not ((a or b) and (c or d)))),
    ],
)
def test_gates_by_their_tables(kind: str, function: Any) -> None:
    pins: dict[str, int | str] = {"A": 2, "B": 3, "C": 4, "D": 5, "Y": 6}
    netlist = Netlist(module({"gate": (kind, pins)}, i=[2, 3, 4, 5], y=[6]))
    bits = (np.arange(STREAMS)[:, None, None] >> np.arange(4)) & 1
    found = -numbers(netlist.run({"i": words(bits)}).ports["y"])[:, 0]
    assert found.tolist() == [function(*row) for row in bits[:, 0].tolist()]


def test_what_is_no_gate() -> None:
    with pytest.raises(MxloomError, match=r"\$_DLATCH_P_ is no gate"):
        Netlist(module({"latch": ("DLATCH_P", {"D": 2, "Q": 3})}, d=[2]))
    loop: dict[str, tuple[str, dict[str, int | str]]] = {
        "one": ("NOT", {"A": 2, "Y": 3}),
        "two": ("NOT", {"A": 3, "Y": 2}),
    }
    with pytest.raises(MxloomError, match="loop of gates"):
        Netlist(module(loop, y=[3]))


@needs_yosys
@pytest.mark.parametrize("names", [("mxint4", "mxint4"), ("mxfp4", "mxint4"), ("low", "high")])
def test_the_gates_that_switch_compute_the_sums(names: tuple[str, str]) -> None:
    mixed = format_of(MIXED, rank=2)
    assert isinstance(mixed, MixedType)
    kinds = {"low": mixed.low, "high": mixed.high}
    types = [kinds[name] if name in kinds else format_of(name, rank=2) for name in names]
    unit = Unit(mixed, mixed) if "low" in names else Unit(types[0], types[1])
    a, b = operands(*types)
    run = unit.gates.run(unit.inputs(a, b))
    ends = np.flatnonzero(numbers(run.ports["done"])[0])
    size, steps = BLOCK * BLOCKS, BLOCK * BLOCKS // unit.design.lanes
    assert len(ends) >= 3 and set(np.diff(ends)) == {steps} and ends[0] < steps + WARM
    products = a.decode(torch.float64) * b.decode(torch.float64) * 2.0**-WINDOW.lsb
    for number, cycle in enumerate(ends):
        # Each segment is rounded once where it meets the window.
        blocks = products[:, number * size : (number + 1) * size].reshape(STREAMS, -1, BLOCK).sum(-1)
        expected = blocks.round().sum(-1).to(torch.int64)
        assert numbers(run.ports["total"])[:, cycle].tolist() == expected.tolist()
