"""The cost of a whole design, for its report: every stage, and all together."""

from __future__ import annotations

from typing import Any

from ..folding import Limits
from ..graph import Graph
from ..timing import Timing
from .model import Coefficients, coefficients
from .off_chip import streamed_cost
from .stages import StageCost, stage_cost, total


def design_cost(graph: Graph, timing: Timing, coefficients_: Coefficients | None = None) -> dict[str, Any]:
    """Area, resources, memory, energy of one input and cycles, for each stage and in total, for JSON.

    `interval_cycles` are those from one input to the next, `latency_cycles` those to the first beat out, both without
    stalls; no design with these foldings can be faster than its `slowest` stage. `outside` says where areas are
    extrapolated beyond what was fitted. `streamed` is there where weights come from outside (`streamed_cost`).
    """
    model = coefficients_ or coefficients()
    costs = {name: stage_cost(node.stage, model) for name, node in graph.nodes.items()}
    whole = total(list(costs.values()))
    stages = [
        {"name": name, "site": graph.nodes[name].site, "kind": type(graph.nodes[name].stage).__name__.lower()}
        | _told(cost)
        for name, cost in costs.items()
    ]
    return {
        "library": model.library,
        "interval_cycles": timing.interval,
        "latency_cycles": timing.latency,
        "slowest": {"name": timing.slowest, "cycles": graph.nodes[timing.slowest].stage.cycles},
        "total": _told(whole),
        "stages": stages,
        **({"streamed": streamed_cost(graph, timing.interval)} if graph.streamed else {}),
    }


def resources(graph: Graph) -> Limits:
    """LUTs (of a Xilinx 7 series device with DSP blocks) and area in square micrometres, for folding under limits."""
    whole = total([stage_cost(node.stage) for node in graph.nodes.values()])
    return Limits(None, whole.fpga["xc7_dsp"]["LUT"], whole.asap7_um2)


def _told(cost: StageCost) -> dict[str, Any]:
    return {
        "cycles": cost.cycles,
        "macs": cost.macs,
        "area_nand2": round(cost.nand2, 1),
        "area_um2": round(cost.asap7_um2, 2),
        "fpga": {t: {name: round(count, 1) for name, count in counts.items()} for t, counts in cost.fpga.items()},
        "memory_bits": cost.memory_bits,
        "energy_pj": {part: round(energy, 2) for part, energy in cost.energy_pj.items()},
        "energy_interpolated": cost.interpolated,
        "outside": list(cost.outside),
    }
