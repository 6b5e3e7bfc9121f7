"""Whether a design computes what its module means: the reference against a simulator, beat by beat."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
from xdsl.dialects.builtin import ModuleOp

from ...dialects.errors import MxloomError
from ...dialects.formats import FixedType, quantize
from ...dialects.integer import Point
from ...dialects.integer_meanings import codes_on
from ..reference import Interpreter, Weights
from .graph import CONFIG, Boundary, Graph
from .images import packed
from .simulation.traffic import NO_STALLS, Phase, Run, Stalls

if TYPE_CHECKING:
    from numpy import ndarray
    from torch import Tensor


class Simulator(Protocol):
    """What runs a design."""

    def run(self, phases: Sequence[Phase], stalls: Stalls = ..., limit: int = ...) -> Run: ...


@dataclass(frozen=True)
class Outcome:
    """What a comparison found.

    `first_difference` names the first beat that is wrong. `cycles` are those of the whole run without the loading of
    memories; `interval` the cycles from one input's last beat to the next one's; `latency` from the first beat in to
    the first beat out.
    """

    beats: int
    mismatches: int
    missing: int
    violations: int
    surplus: int
    cycles: int
    latency: int
    interval: float
    first_difference: str = ""

    @property
    def is_equal(self) -> bool:
        return not (self.mismatches or self.missing or self.violations or self.surplus)


def beats_of_values(values: Tensor, point: Point) -> ndarray:
    """Numbers on a format's grid as beats, in row-major order: uint8 [count, bytes]."""
    codes = codes_on(values, point.fraction).reshape(-1).numpy()
    top = 1 << (point.width - 1)
    if not bool(values.isfinite().all()) or (codes.size and not (-top <= codes.min() and codes.max() < top)):
        raise MxloomError(f"a number leaves the {point.width} bits of its stream, or is none")
    return packed((codes & ((1 << point.width) - 1))[:, None], point.width)


def on_grid(values: Tensor, point: Point) -> Tensor:
    """Numbers rounded to a format."""
    return quantize(values, FixedType(point.width, point.fraction))  # pyright: ignore[reportArgumentType]


@dataclass(frozen=True)
class Vectors:
    """Inputs and what the reference makes of them, as beats of the design's streams."""

    inputs: dict[str, ndarray]
    outputs: dict[str, ndarray]
    runs: int


def vectors(module: ModuleOp, weights: Weights, graph: Graph, inputs: Sequence[Sequence[Tensor]]) -> Vectors:
    """The beats of several inputs in a row; `inputs` gives the tensors of each, rounded to the streams' formats."""
    interpreter = Interpreter(module, weights)
    given = [[on_grid(x, each.point) for x, each in zip(xs, graph.inputs, strict=True)] for xs in inputs]
    return beats_of_tensors(graph, given, [interpreter(*xs) for xs in given])


def beats_of_tensors(graph: Graph, inputs: Sequence[Sequence[Tensor]], outputs: Sequence[Sequence[Tensor]]) -> Vectors:
    """The beats of a design's streams for several inputs in a row, all on the grids of the streams' formats."""
    return Vectors(_joined(graph.inputs, inputs), _joined(graph.outputs, outputs), len(inputs))


def _joined(boundaries: Sequence[Boundary], runs: Sequence[Sequence[Tensor]]) -> dict[str, ndarray]:
    """The beats of each stream, one run behind the other."""
    streams = zip(boundaries, zip(*runs, strict=True), strict=True)
    return {each.name: np.concatenate([beats_of_values(x, each.point) for x in xs]) for each, xs in streams}


def phases(graph: Graph, vectors: Vectors, configuration: ndarray | None = None) -> list[Phase]:
    """Fill the memories, then send every input, and the weights that are not on the chip once for each."""
    words = graph.configuration() if configuration is None else configuration
    load = [Phase({CONFIG: words})] if graph.loaded else []
    streamed = {each.name: np.tile(each.words, (vectors.runs, 1)) for each in graph.streamed}
    return [*load, Phase({**vectors.inputs, **streamed}, {name: len(beats) for name, beats in vectors.outputs.items()})]


def compare(
    simulator: Simulator,
    graph: Graph,
    vectors: Vectors,
    stalls: Stalls = NO_STALLS,
    *,
    limit: int = 100_000_000,
    configuration: ndarray | None = None,
) -> Outcome:
    """Run the vectors and compare every beat."""
    return outcome_of(simulator.run(phases(graph, vectors, configuration), stalls, limit), graph, vectors)


def outcome_of(run: Run, graph: Graph, vectors: Vectors) -> Outcome:
    """Every beat that a simulation gave beside those of the reference, and the cycles that it took."""
    mismatches = missing = beats = 0
    first = ""
    for each in graph.outputs:
        expected, found = vectors.outputs[each.name], run.outputs[each.name]
        missing += len(expected) - len(found)
        wrong = (found != expected[: len(found)]).any(-1)
        beats, mismatches = beats + len(found), mismatches + int(wrong.sum())
        if wrong.any() and not first:
            place = int(wrong.argmax())
            numbers = [int.from_bytes(x[place].tobytes(), "little") for x in (found, expected)]
            first = f"beat {place} of {each.name}: {numbers[0]:#x}, the reference says {numbers[1]:#x}"
    starts = min((int(run.taken[each.name][0]) for each in graph.inputs if len(run.taken[each.name])), default=0)
    given = [run.given[each.name] for each in graph.outputs if len(run.given[each.name])]
    latency = min((int(cycles[0]) for cycles in given), default=starts) - starts
    last = max((int(cycles[-1]) for cycles in given), default=starts)
    return Outcome(
        beats,
        mismatches,
        missing,
        run.violations,
        run.surplus,
        last - starts + 1,
        latency,
        _interval(run, graph, vectors.runs),
        first,
    )


def _interval(run: Run, graph: Graph, runs: int) -> float:
    """Cycles between the last beats of two inputs, on average behind the first."""
    cycles = run.given[graph.outputs[0].name]
    if runs < 2 or len(cycles) % runs:
        return float("nan")
    ends = cycles.reshape(runs, -1)[:, -1]
    return float(ends[-1] - ends[0]) / (runs - 1)
