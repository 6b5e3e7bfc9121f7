"""Queues on every ring of streams: designs of any shape come to no stop, and their queues have an end."""

import random

import pytest

from mxloom.backends.dataflow.graph import Boundary, Graph, Place
from mxloom.backends.dataflow.sizing import place_queues
from mxloom.backends.dataflow.stages.normalize import Normalize
from mxloom.backends.dataflow.stages.pointwise import Binary, Convert
from mxloom.backends.dataflow.stages.route import Fifo
from mxloom.backends.dataflow.timing import predicted, size_queues
from mxloom.dialects.integer import Point

P = Point(24, 12)
BEATS = 32


def drawn(seed: int) -> Graph:
    """Stages that read any streams before them: of single numbers, of rows, and of two streams."""
    chance, graph = random.Random(seed), Graph()
    graph.inputs = [Boundary(f"x{place}", P, (BEATS,)) for place in range(chance.randint(1, 3))]
    streams = [Place("", each.name) for each in graph.inputs]
    for _ in range(chance.randint(3, 10)):
        rows = chance.choice((1, 2, 4))
        stage = chance.choice(
            [
                Convert(P, P, BEATS),
                Normalize(P, P, rows, BEATS // rows, 1e-5, None),
                *2 * [Binary("add", P, P, P, BEATS)],
            ]
        )
        node = graph.add("stage", stage, "x")
        for name in stage.inputs:
            graph.connect(chance.choice(streams), Place(node.name, name))
        streams.append(Place(node.name, "out"))
    read = graph.readers()
    for place, stream in enumerate(each for each in streams if each not in read and each.node):
        graph.outputs.append(Boundary(f"y{place}", P, (BEATS,)))
        graph.connect(stream, Place("", f"y{place}"))
    graph.add_forks()
    return graph


def slowest(graph: Graph) -> int:
    return max(node.stage.cycles for node in graph.nodes.values())


def test_no_design_comes_to_a_stop() -> None:
    """By the longest ways alone some would."""
    crossed = 0
    for seed in range(80):
        graph = drawn(seed)
        place_queues(graph)
        size_queues(graph)
        assert predicted(graph, 12).interval >= BEATS, seed
        crossed += graph.is_queued_everywhere
    assert crossed


@pytest.mark.parametrize("seed", range(20))
def test_queues_on_every_ring_need_no_more_than_a_run_each(seed: int) -> None:
    """A whole run's places are enough for no stop, as `add_every_queue` says."""
    graph = drawn(seed)
    graph.add_every_queue()
    assert {n.stage.depth for n in graph.nodes.values() if isinstance(n.stage, Fifo)} <= {BEATS}
    predicted(graph, 4)


@pytest.mark.parametrize("seed", range(20))
def test_queues_of_the_sizes_that_are_chosen_hold_nothing_up(seed: int) -> None:
    """However many inputs come: were a stream to run ahead of the others, its queue would be full some time."""
    graph = drawn(seed)
    graph.add_every_queue()
    size_queues(graph)
    for runs in (16, 32):
        assert predicted(graph, runs).interval == pytest.approx(slowest(graph), rel=0.05)
