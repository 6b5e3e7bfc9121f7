"""Gate netlists that switch: 64 streams of inputs at a time, each net one bit of a word, no delays."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ....dialects.errors import MxloomError

STREAMS = 64

_GATES: dict[str, tuple[str, Callable[..., np.ndarray]]] = {
    "BUF": ("A", lambda a: a),
    "NOT": ("A", lambda a: ~a),
    "AND": ("AB", lambda a, b: a & b),
    "NAND": ("AB", lambda a, b: ~(a & b)),
    "OR": ("AB", lambda a, b: a | b),
    "NOR": ("AB", lambda a, b: ~(a | b)),
    "XOR": ("AB", lambda a, b: a ^ b),
    "XNOR": ("AB", lambda a, b: ~(a ^ b)),
    "ANDNOT": ("AB", lambda a, b: a & ~b),
    "ORNOT": ("AB", lambda a, b: a | ~b),
    "MUX": ("ABS", lambda a, b, s: (a & ~s) | (b & s)),
    "NMUX": ("ABS", lambda a, b, s: ~((a & ~s) | (b & s))),
    "AOI3": ("ABC", lambda a, b, c: ~((a & b) | c)),
    "OAI3": ("ABC", lambda a, b, c: ~((a | b) & c)),
    "AOI4": ("ABCD", lambda a, b, c, d: ~((a & b) | (c & d))),
    "OAI4": ("ABCD", lambda a, b, c, d: ~((a | b) & (c | d))),
}
"""Yosys's gates: names of their inputs, and what they compute."""


@dataclass(frozen=True, eq=False)
class Run:
    """What a netlist did: `switched` [cycles] counts outputs and inputs of gates that changed, in all streams together.

    `ports` has the words [cycles, bits] of every port, at the end of each cycle.
    """

    switched: np.ndarray
    ports: dict[str, np.ndarray]


class Netlist:
    """A flat module of Yosys (`write_json`): its gates, and flip-flops at the clock's rising edge, which start at 0."""

    def __init__(self, module: Mapping[str, Any]) -> None:
        self.ports: dict[str, list[int]] = {}
        self._nets: dict[int | str, int] = {"0": 0, "1": 1, "x": 0}
        for name, port in module["ports"].items():
            self.ports[name] = [self._net(bit) for bit in port["bits"]]
        self._edges: list[tuple[int, int]] = []
        gates: list[tuple[str, int, list[int]]] = []
        for cell in module["cells"].values():
            kind = str(cell["type"]).removeprefix("$_").removesuffix("_")
            pins = {pin: self._net(bits[0]) for pin, bits in cell["connections"].items()}
            if kind == "DFF_P":
                self._edges.append((pins["D"], pins["Q"]))
            elif kind in _GATES:
                gates.append((kind, pins["Y"], [pins[pin] for pin in _GATES[kind][0]]))
            else:
                raise MxloomError(f"{cell['type']} is no gate: {', '.join(_GATES)} are")
        self.size = max(self._nets.values()) + 1
        # What a net's change moves: its own driver's output, and every input that it feeds.
        self.weights = np.ones(self.size, np.int64)
        for sources in (*(inputs for _, _, inputs in gates), [data for data, _ in self._edges]):
            np.add.at(self.weights, sources, 1)
        self.weights[:2] = 0
        self._steps = _levels(gates, self.size)

    def _net(self, bit: int | str) -> int:
        return self._nets.setdefault(bit, len(self._nets) - 1)

    def run(self, inputs: Mapping[str, np.ndarray]) -> Run:
        """Drive inputs (uint64 [cycles, bits], each bit of a word a stream) and count what switches."""
        cycles = len(next(iter(inputs.values())))
        state = np.zeros(self.size, np.uint64)
        state[1] = ~np.uint64(0)
        data, held = np.array(self._edges, np.int64).reshape(-1, 2).T
        switched, before = np.zeros(cycles, np.int64), state.copy()
        outputs = {name: np.zeros((cycles, len(nets)), np.uint64) for name, nets in self.ports.items()}
        for cycle in range(cycles):
            state[held] = state[data]
            for name, words in inputs.items():
                state[self.ports[name]] = words[cycle]
            for compute, result, sources in self._steps:
                state[result] = compute(*(state[source] for source in sources))
            switched[cycle] = np.bitwise_count(state ^ before).astype(np.int64) @ self.weights
            before[:] = state
            for name, nets in self.ports.items():
                outputs[name][cycle] = state[nets]
        return Run(switched, outputs)


Step = tuple[Callable[..., np.ndarray], np.ndarray, list[np.ndarray]]


def _levels(gates: list[tuple[str, int, list[int]]], size: int) -> list[Step]:
    """Gates of one kind whose inputs are known, together; in an order in which they always are."""
    driver = {result: index for index, (_, result, _) in enumerate(gates)}
    level = np.zeros(size, np.int64)
    waiting = [sum(source in driver for source in set(inputs)) for _, _, inputs in gates]
    readers: dict[int, list[int]] = {}
    for index, (_, _, inputs) in enumerate(gates):
        for source in set(inputs):
            if source in driver:
                readers.setdefault(source, []).append(index)
    ready = [index for index, count in enumerate(waiting) if count == 0]
    grouped: dict[tuple[int, str], list[int]] = {}
    for index in ready:  # grows while it is read
        kind, result, inputs = gates[index]
        level[result] = 1 + max(level[source] for source in inputs)
        grouped.setdefault((int(level[result]), kind), []).append(index)
        for reader in readers.get(result, ()):
            waiting[reader] -= 1
            if waiting[reader] == 0:
                ready.append(reader)
    if len(ready) != len(gates):
        raise MxloomError("the netlist has a loop of gates")
    steps: list[Step] = []
    for (_, kind), members in sorted(grouped.items()):
        pins, compute = _GATES[kind]
        result = np.array([gates[index][1] for index in members])
        sources = [np.array([gates[index][2][pin] for index in members]) for pin in range(len(pins))]
        steps.append((compute, result, sources))
    return steps


def words(bits: np.ndarray) -> np.ndarray:
    """Bits [streams, cycles, width] as words [cycles, width], the first stream lowest."""
    assert bits.shape[0] == STREAMS
    return np.bitwise_or.reduce(bits.astype(np.uint64) << np.arange(STREAMS, dtype=np.uint64)[:, None, None], axis=0)


def numbers(run: np.ndarray) -> np.ndarray:
    """Words [cycles, width] of a port as whole numbers [streams, cycles], two's complement."""
    bits = (run[None] >> np.arange(STREAMS, dtype=np.uint64)[:, None, None]) & np.uint64(1)
    width = bits.shape[-1]
    weights = np.array([1 << place for place in range(width)], object)
    weights[-1] = -weights[-1]
    return bits.astype(object) @ weights
