"""The report on a simulation in which one layer's hardware does the work of several layers."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from dataclasses import asdict
from math import isfinite
from typing import TYPE_CHECKING

from . import _json

if TYPE_CHECKING:
    from ...backends.dataflow.rounds import RoundCycles
    from ...backends.dataflow.verification import Outcome, Simulator
    from ..reuse import Reused

Results = list[tuple["Outcome", "RoundCycles"]]


def simulated(
    design: Reused,
    args: argparse.Namespace,
    simulators: Mapping[str, Callable[[], Simulator]],
    report: Callable[[str, str], object],
) -> int:
    """Load and run the design for each layer in turn, print what was found, and return the exit status."""
    from ...backends.dataflow.rounds import compare_rounds, predicted_cycles
    from ...backends.dataflow.simulation.traffic import Stalls

    rounds = design.rounds(args.vectors)
    predicted = predicted_cycles(design.graph, args.vectors)
    found: dict[str, Results] = {}
    for name, simulator in simulators.items():
        report("simulate", name)
        found[name] = compare_rounds(simulator(), design.graph, rounds, Stalls.random(args.stalls))
    names = [layer.name for layer in design.layers]
    if args.json:
        told = {
            name: {
                "is_equal": _is_equal(results),
                "cycles": sum(cycles.total for _, cycles in results),
                "layers": [
                    {"name": layer, "loading_cycles": cycles.loading, **asdict(outcome)}
                    for layer, (outcome, cycles) in zip(names, results, strict=True)
                ],
            }
            for name, results in found.items()
        }
        timing = design.timing
        formula = {
            "loading_cycles": predicted.loading,
            "latency": timing.latency,
            "interval": timing.interval,
            "layer_cycles": predicted.work,
            "cycles": len(names) * predicted.total,
        }
        _json.write({"top": design.name, "predicted": formula, "assumed": design.assumed, **told})
    else:
        for name, results in found.items():
            print(f"{name}: {_told(design, results, predicted)}")
        for each in design.assumed:
            print(f"note: {each}")
    return int(not all(_is_equal(results) for results in found.values()))


def _is_equal(results: Results) -> bool:
    return all(outcome.is_equal for outcome, _ in results)


def _told(design: Reused, results: Results, predicted: RoundCycles) -> str:
    """One paragraph on a comparison: all together, then each layer."""
    outcomes = [outcome for outcome, _ in results]
    total, timing = sum(cycles.total for _, cycles in results), design.timing
    lines = [
        f"{sum(o.mismatches + o.missing for o in outcomes)} mismatches in {sum(o.beats for o in outcomes):,} beats "
        f"of {len(outcomes)} layers, {sum(o.violations for o in outcomes)} violations of the protocol, "
        f"{sum(o.surplus for o in outcomes)} beats too many",
        f"{total:,} cycles, predicted {len(results) * predicted.total:,}; predicted for each layer: "
        f"{predicted.loading:,} to load as many words, then {predicted.work:,}, the first beat out after "
        f"{timing.latency:,}, an input every {timing.interval:,.0f}",
    ]
    for layer, (outcome, cycles) in zip(design.layers, results, strict=True):
        line = f"{layer.name}: loaded in {cycles.loading:,}, then {cycles.work:,}, the first beat out after "
        line += f"{outcome.latency:,}"
        if isfinite(outcome.interval):
            line += f", an input every {outcome.interval:,.0f}"
        if outcome.first_difference:
            line += f"; {outcome.first_difference}"
        lines.append(line)
    return "\n  ".join(lines)
