"""Folding: how many units work side by side in each contraction, so that a design meets its limits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import ceil

from ...dialects.errors import UsageError
from .graph import Graph, Node
from .stages.contraction import Contraction


@dataclass(frozen=True)
class Limits:
    """What a design may take: `cycles` from one input to the next, and of each resource that the cost model counts."""

    cycles: int | None = None
    luts: float | None = None
    area_um2: float | None = None


class TooSlowError(UsageError):
    """No folding is as fast as a limit says; the graph is left as fast as it gets. `why` says what holds it up."""

    def __init__(self, cycles: int, why: str, nearest: int) -> None:
        super().__init__(f"no folding gives an input every {cycles} cycles: {why}; the nearest is cycles={nearest}")
        self.why = why


Resources = Callable[[Graph], Limits]
"""LUTs and area of a design, as the cost model says them."""


def fold(graph: Graph, limits: Limits, resources: Resources | None = None) -> None:
    """Widen contractions, the slowest first, until the limit of cycles is met.

    Without a limit of cycles the design is made as fast as the other limits allow; without any limit it stays as it is.
    Raises UsageError, saying the nearest that there is, where no folding meets the limits (of cycles: TooSlowError).
    """
    spends = limits.luts is not None or limits.area_um2 is not None
    if limits.cycles is None and not spends:
        return
    while limits.cycles is None or interval(graph) > limits.cycles:
        node = slowest(graph)
        wider = _wider(node)
        if wider is None:
            if limits.cycles is not None:
                why = f"{node.name} takes {node.stage.cycles}, however wide"
                raise TooSlowError(limits.cycles, why, interval(graph))
            break
        before, node.stage = node.stage, wider
        if resources is not None and exceeds(resources(graph), limits):
            node.stage = before
            if limits.cycles is not None:
                why = f"a faster one takes more than {named(limits)}"
                raise TooSlowError(limits.cycles, why, interval(graph))
            break
    if spends and resources is not None and exceeds(resources(graph), limits):
        needed = resources(graph)
        raise UsageError(f"the narrowest design takes {named(needed)}, more than {named(limits)}")


def interval(graph: Graph) -> int:
    """Cycles from one input to the next: those of the slowest stage."""
    return slowest(graph).stage.cycles


def slowest(graph: Graph) -> Node:
    """The stage that all others wait for."""
    return max(graph.nodes.values(), key=lambda node: node.stage.cycles)


def _wider(node: Node) -> Contraction | None:
    """The stage with the next larger number of units that makes it faster; None where none does."""
    stage = node.stage
    if not isinstance(stage, Contraction):
        return None
    for copies in range(stage.copies + 1, stage.columns + 1):
        if stage.dynamic and stage.columns % copies:
            continue
        wider = replace(stage, copies=copies)
        if wider.cycles < stage.cycles:
            return wider
    return None


def exceeds(found: Limits, limits: Limits) -> bool:
    """Whether something takes more than it may."""
    pairs = ((found.luts, limits.luts), (found.area_um2, limits.area_um2))
    return any(limit is not None and taken is not None and taken > limit for taken, limit in pairs)


def named(limits: Limits) -> str:
    """What a design takes, or may take, in words."""
    parts = []
    if limits.luts is not None:
        parts.append(f"{ceil(limits.luts):,} LUTs")
    if limits.area_um2 is not None:
        parts.append(f"{ceil(limits.area_um2):,} um2")
    return " and ".join(parts)
