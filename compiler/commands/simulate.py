"""Simulate a compiled model, or a part of it, as hardware and compare every beat with the reference.

Prints mismatches (exit status 1 where there are any), cycles, and the throughput beside what the formula says.

mxloom simulate ./typed --part model.layers.0 --vectors 8
mxloom simulate ./typed --reuse model.layers     # one layer's hardware for all of them
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from functools import partial
from math import isfinite
from typing import TYPE_CHECKING

from . import _hardware, _json, _reuse

if TYPE_CHECKING:
    from ...backends.dataflow.timing import Timing
    from ...backends.dataflow.verification import Outcome, Simulator
    from ..hardware import Hardware
    from ..reuse import Reused

summary = "simulate the hardware and compare every beat with the reference"


def arguments(parser: argparse.ArgumentParser) -> None:
    _hardware.add_options(parser)
    parser.add_argument("--vectors", metavar="N", type=int, default=2, help="inputs in a row (default 2)")
    parser.add_argument(
        "--simulator", choices=("arc", "verilator", "both"), default="arc", help="arc needs no C++ compiler (default)"
    )
    parser.add_argument(
        "--stalls", metavar="SHARE", type=float, default=0.0, help="share of cycles in which streams wait (default 0)"
    )
    _json.add_option(parser)


def run(args: argparse.Namespace) -> int:
    from ...backends.dataflow.simulation.traffic import Stalls
    from ...backends.dataflow.verification import compare
    from ...dialects.errors import UsageError
    from ..progress import Progress
    from ..reuse import Reused

    if not 0 <= args.stalls <= 0.9:
        raise UsageError(f"--stalls is a share from 0 to 0.9, got {args.stalls}")
    names = ("arc", "verilator") if args.simulator == "both" else (args.simulator,)
    found: dict[str, Outcome] = {}
    with Progress().working(f"simulating {args.model}") as report:
        design = _hardware.built(args)
        if isinstance(design, Reused):
            simulators = {name: partial(_simulator, name, design) for name in names}
            return _reuse.simulated(design, args, simulators, report)
        given = design.vectors(args.vectors)
        for name in names:
            report("simulate", name)
            found[name] = compare(_simulator(name, design), design.graph, given, Stalls.random(args.stalls))
    timing = design.timing
    formula = design.graph.nodes[timing.slowest].stage.cycles
    if args.json:
        outcomes = {name: asdict(outcome) | {"is_equal": outcome.is_equal} for name, outcome in found.items()}
        predicted = {"formula_interval": formula, "interval": timing.interval, "latency": timing.latency}
        _json.write({"top": design.name, "predicted": predicted, "assumed": design.assumed, **outcomes})
    else:
        for name, outcome in found.items():
            print(f"{name}: {_told(outcome, timing, formula)}")
        for each in [*_hardware.told_streamed(design), *design.assumed]:
            print(f"note: {each}")
    return int(not all(outcome.is_equal for outcome in found.values()))


def _simulator(name: str, design: Hardware | Reused) -> Simulator:
    graph = design.graph
    if name == "arc":
        from ...backends.dataflow.simulation.arc import ArcSimulator

        return ArcSimulator(design.text, graph.input_streams, graph.output_streams)
    from ...backends.dataflow.simulation.verilator import VerilatorSimulator

    return VerilatorSimulator(design.text, graph.input_streams, graph.output_streams)


def _told(outcome: Outcome, timing: Timing, formula: int) -> str:
    """One paragraph on a comparison."""
    lines = [
        f"{outcome.mismatches + outcome.missing} mismatches in {outcome.beats:,} beats, "
        f"{outcome.violations} violations of the protocol, {outcome.surplus} beats too many",
        f"{outcome.cycles:,} cycles; the first beat out after {outcome.latency:,}, predicted {timing.latency:,}",
    ]
    if isfinite(outcome.interval):
        lines.append(
            f"an input every {outcome.interval:,.0f} cycles, predicted {timing.interval:,.0f}; "
            f"the slowest stage, {timing.slowest}, takes {formula:,}"
        )
    if outcome.first_difference:
        lines.append(outcome.first_difference)
    return "\n  ".join(lines)
