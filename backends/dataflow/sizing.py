"""Folding and queues together: a design that meets its limits with the queues that it then needs."""

from __future__ import annotations

from math import ceil

from ...dialects.errors import UsageError
from .folding import Limits, Resources, TooSlowError, exceeds, fold, named
from .graph import Graph
from .stages.route import Fork
from .timing import Timing, size_queues, stops

_TRIES = 8


def place_queues(graph: Graph) -> None:
    """Queues where they are needed: by the longest way (`Graph.add_queues`), on every way where a design stops so."""
    graph.add_queues()
    if any(isinstance(node.stage, Fork) for node in graph.nodes.values()) and stops(graph):
        graph.add_every_queue()


def fit(graph: Graph, limits: Limits, resources: Resources) -> Timing:
    """Fold a design under limits and make its queues as deep as they have to be; returns its timing.

    The depth of the queues follows from the folding and takes resources of its own: what is above the limits then is
    taken from what the next folding may use. Raises UsageError where no folding meets the limits, saying the nearest
    that does: its cycles are those of the whole design, in which stages wait for one another.
    """
    narrow = {name: node.stage for name, node in graph.nodes.items()}
    spends = limits.luts is not None or limits.area_um2 is not None
    allowed, timing = limits, None
    for _ in range(_TRIES):
        for name, stage in narrow.items():
            graph.nodes[name].stage = stage
        fastest = _folded(graph, allowed, limits, resources)
        timing = size_queues(graph)
        late = 0 if limits.cycles is None else ceil(timing.interval) - limits.cycles
        taken = resources(graph) if spends else Limits()
        over = exceeds(taken, limits)
        if late <= 0 and not over:
            return timing
        if fastest is not None and not over and limits.cycles is not None:
            raise TooSlowError(limits.cycles, fastest.why, ceil(timing.interval))
        allowed = Limits(
            allowed.cycles if allowed.cycles is None or fastest else allowed.cycles - max(0, late),
            _less(allowed.luts, taken.luts, limits.luts),
            _less(allowed.area_um2, taken.area_um2, limits.area_um2),
        )
    assert timing is not None
    raise UsageError(
        f"no folding within the limits was found in {_TRIES} tries: the last gives an input every "
        f"{ceil(timing.interval)} cycles and takes {named(resources(graph))}"
    )


def _folded(graph: Graph, allowed: Limits, limits: Limits, resources: Resources) -> TooSlowError | None:
    """Fold a design; what says why, where it is as fast as it can be and still too slow for what is allowed."""
    try:
        fold(graph, allowed, resources)
    except TooSlowError as error:
        return error
    except UsageError as error:
        if allowed == limits:
            raise
        raise UsageError(f"{error} (what its queues need is taken off the limits)") from None
    return None


def _less(allowed: float | None, taken: float | None, limit: float | None) -> float | None:
    """What the next folding may take of a resource."""
    if allowed is None or taken is None or limit is None:
        return allowed
    return allowed - max(0.0, taken - limit)
