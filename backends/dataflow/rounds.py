"""One design that does the work of several layers: its memories are loaded anew for each, round after round."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import TYPE_CHECKING, Any

from ...dialects.errors import MxloomError
from .graph import CONFIG, Boundary, Graph, Place
from .simulation.traffic import NO_STALLS, Run, Stalls
from .timing import predicted
from .verification import Outcome, Simulator, Vectors, outcome_of, phases

if TYPE_CHECKING:
    from numpy import ndarray


@dataclass(frozen=True, eq=False)
class Round:
    """A layer's turn: `configuration` fills the memories (uint8 [words, bytes]), then every input passes.

    The vectors' inputs are what the reference gives at the end of the layer before.
    """

    name: str
    configuration: ndarray
    vectors: Vectors


@dataclass(frozen=True)
class RoundCycles:
    """Cycles of a round: `loading` of the memories, `work` from the first beat in to the last one out.

    A word is loaded in every cycle, so that loading takes as many cycles as there are words.
    """

    loading: int
    work: int

    @property
    def total(self) -> int:
        return self.loading + self.work


def predicted_cycles(graph: Graph, inputs: int) -> RoundCycles:
    """Cycles of a round in which so many inputs pass, none of whose streams waits."""
    beats = predicted(graph, inputs).beats
    return RoundCycles(len(graph.configuration()), 1 + max(beats[each.name][-1] for each in graph.outputs))


def compare_rounds(
    simulator: Simulator,
    graph: Graph,
    rounds: Sequence[Round],
    stalls: Stalls = NO_STALLS,
    *,
    limit: int = 1_000_000_000,
) -> list[tuple[Outcome, RoundCycles]]:
    """Run the rounds one after the other, without a reset between them, and compare every beat.

    Each round's inputs are those of the reference: where all beats are right they are those of the round before, and
    where one is wrong the other rounds still say of themselves whether they are right. Violations of the protocol and
    beats too many are counted once, with the last round.
    """
    run = simulator.run(
        [phase for each in rounds for phase in phases(graph, each.vectors, each.configuration)], stalls, limit
    )
    found: list[tuple[Outcome, RoundCycles]] = []
    taken = dict.fromkeys(graph.input_streams, 0)
    given = dict.fromkeys(graph.output_streams, 0)
    for place, each in enumerate(rounds):
        counts = {CONFIG: len(each.configuration)} | {name: len(beats) for name, beats in each.vectors.inputs.items()}
        ends = {name: start + counts.get(name, 0) for name, start in taken.items()}
        lasts = {name: start + len(each.vectors.outputs[name]) for name, start in given.items()}
        last = place == len(rounds) - 1
        part = Run(
            {name: run.outputs[name][start : lasts[name]] for name, start in given.items()},
            {name: run.taken[name][start : ends[name]] for name, start in taken.items()},
            {name: run.given[name][start : lasts[name]] for name, start in given.items()},
            run.cycles,
            run.violations if last else 0,
            run.surplus if last else 0,
        )
        outcome = outcome_of(part, graph, each.vectors)
        load = part.taken.get(CONFIG, [])
        found.append((outcome, RoundCycles(int(load[-1] - load[0]) + 1 if len(load) else 0, outcome.cycles)))
        taken, given = ends, lasts
    return found


def share_stages(first: Graph, other: Graph) -> None:
    """Let a design that is the same hardware as the first take over its folding and the depths of its queues."""
    for one, same in zip(first.nodes.values(), other.nodes.values(), strict=True):
        same.stage = one.stage


def check_same(first: Graph, other: Graph) -> None:
    """Raise MxloomError, naming the first difference, unless two designs differ in the words of memories alone."""
    nodes, others = list(first.nodes.values()), list(other.nodes.values())
    for a, b in zip(nodes, others, strict=False):
        if type(a.stage) is not type(b.stage):
            raise MxloomError(f"{a.name} is a {_kind(a.stage)}, and {b.name}, in its place, a {_kind(b.stage)}")
        if (found := _difference(a.stage, b.stage)) is not None:
            raise MxloomError(f"{a.name} and {b.name}, in its place, differ: {found}")
    if len(nodes) != len(others):
        raise MxloomError(f"one has {len(nodes)} stages, the other {len(others)}")
    for side in ("inputs", "outputs"):
        _check_boundaries(side, getattr(first, side), getattr(other, side))
    for (a, b), (c, d) in zip(_edges(first), _edges(other), strict=True):
        if (a, b) != (c, d):
            raise MxloomError(f"{nodes[a[0]].name} reads another stage than {others[c[0]].name}, in its place")


def _check_boundaries(side: str, ones: Sequence[Boundary], others: Sequence[Boundary]) -> None:
    if len(ones) != len(others):
        raise MxloomError(f"one has {len(ones)} {side}, the other {len(others)}")
    for a, b in zip(ones, others, strict=True):
        if (found := _difference(replace(a, name=""), replace(b, name=""))) is not None:
            raise MxloomError(f"the {side} {a.name} and {b.name} differ: {found}")


def _kind(stage: Any) -> str:
    return type(stage).__name__.lower()


def _difference(a: Any, b: Any, path: str = "") -> str | None:
    """The first number in which two stages differ, by its name; None where they are the same."""
    if a == b:
        return None
    if type(a) is type(b) and is_dataclass(a) and not isinstance(a, type):
        for field in fields(a):
            found = _difference(getattr(a, field.name), getattr(b, field.name), f"{path}.{field.name}".lstrip("."))
            if found is not None:
                return found
    return f"{path} is {a} in the first and {b} in the second"


def _edges(graph: Graph) -> list[tuple[tuple[int, str], tuple[int, str]]]:
    """Who reads what, by the places of the stages; -1 for the design itself, whose streams count by their order."""
    places = {name: place for place, name in enumerate(graph.nodes)}
    own = {each.name: str(place) for side in (graph.inputs, graph.outputs) for place, each in enumerate(side)}

    def placed(end: Place) -> tuple[int, str]:
        return (places[end.node], end.stream) if end.node else (-1, own[end.stream])

    return sorted((placed(target), placed(source)) for target, source in graph.sources.items())
