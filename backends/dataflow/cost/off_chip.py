"""What comes from outside a design and goes there: bytes, and what they cost in memory off the chip."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..graph import Boundary, Graph
from .energy import ANCHOR, DRAM, bit_energy
from .memory import memories


def off_chip(bits: float) -> dict[str, Any]:
    """Bytes that pass to or from DRAM, and picojoules, the least and the most of the table that energies stand on."""
    return {"bytes": bits / 8, "dram_pj": [round(bits * each, 1) for each in DRAM], "source": ANCHOR}


def streamed_cost(graph: Graph, interval: float) -> dict[str, Any]:
    """What the weights cost that come from outside for every input, for JSON: each, and all together.

    `bytes_per_cycle` is what has to come on average so that nothing waits for it, an input every `interval` cycles.
    """
    bits = sum(each.bits for each in graph.streamed)
    return {
        "weights": [{"site": each.site, "stream": each.name, **off_chip(each.bits)} for each in graph.streamed],
        "total": off_chip(bits),
        "bytes_per_cycle": round(bits / 8 / interval, 3),
    }


def rounds_cost(graph: Graph, layers: int, work: int, interval: float, energy: float) -> dict[str, Any]:
    """What it costs to load a design for so many layers, one after the other, for JSON.

    `work`: cycles of a round in which one input passes; `interval`: cycles that each further input adds to a round;
    `energy`: picojoules on the chip for an input in one round, without loading. An input leaves the design and comes
    back between two layers; it is counted as if it stood off the chip meanwhile.
    """
    loaded = [memory for node in graph.nodes.values() for memory in node.stage.memories]
    held = [one for node in graph.nodes.values() for one in memories(node.stage) if one.level == "weights"]
    words = len(graph.configuration())
    weights = sum(memory.depth * memory.width for memory in loaded)
    return {
        "layers": layers,
        "loading": {
            "words": words,
            "cycles": words,
            "word_bits": graph.word_width + graph.number_width,
            "outside": off_chip(weights),
            "memory_pj": round(sum(one.bits * bit_energy(one.bits) for one in held), 2),
        },
        "work_cycles": work,
        "interval_cycles": interval,
        "total": {
            "loading_cycles": layers * words,
            "cycles_of_one_input": layers * (words + work),
            "cycles_of_each_further_input": layers * interval,
            "on_chip_pj_of_one_input": round(layers * energy, 2),
            "weights": off_chip(layers * weights),
            "values_of_one_input": off_chip(layers * (_bits(graph.inputs) + _bits(graph.outputs))),
        },
    }


def _bits(boundaries: Sequence[Boundary]) -> int:
    found = 0
    for each in boundaries:
        count = each.point.width
        for size in each.shape:
            count *= size
        found += count
    return found
