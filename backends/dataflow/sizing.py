"""Folding and queues together: a design that meets its limits with the queues that it then needs."""

from __future__ import annotations

from math import ceil

from ...dialects.errors import UsageError
from .folding import Limits, Resources, exceeds, fold, named
from .graph import Graph
from .timing import Timing, size_queues

_TRIES = 8


def fit(graph: Graph, limits: Limits, resources: Resources) -> Timing:
    """Fold a design under limits and make its queues as deep as they have to be; returns its timing.

    The depth of the queues follows from the folding and takes resources of its own: what is above the limits then is
    taken from what the next folding may use. Raises UsageError, saying the nearest, where no folding meets the limits.
    """
    narrow = {name: node.stage for name, node in graph.nodes.items()}
    allowed, timing = limits, None
    for _ in range(_TRIES):
        for name, stage in narrow.items():
            graph.nodes[name].stage = stage
        try:
            fold(graph, allowed, resources)
        except UsageError as error:
            if allowed == limits:
                raise
            raise UsageError(f"{error} (what its queues need is taken off the limits)") from None
        timing = size_queues(graph)
        late = 0 if limits.cycles is None else ceil(timing.interval) - limits.cycles
        spends = limits.luts is not None or limits.area_um2 is not None
        taken = resources(graph) if spends else Limits()
        if late <= 0 and not exceeds(taken, limits):
            return timing
        allowed = Limits(
            allowed.cycles if allowed.cycles is None else allowed.cycles - max(0, late),
            _less(allowed.luts, taken.luts, limits.luts),
            _less(allowed.area_um2, taken.area_um2, limits.area_um2),
        )
    assert timing is not None
    raise UsageError(
        f"no folding within the limits was found in {_TRIES} tries: the last gives an input every "
        f"{ceil(timing.interval)} cycles and takes {named(resources(graph))}"
    )


def _less(allowed: float | None, taken: float | None, limit: float | None) -> float | None:
    """What the next folding may take of a resource."""
    if allowed is None or taken is None or limit is None:
        return allowed
    return allowed - max(0.0, taken - limit)
