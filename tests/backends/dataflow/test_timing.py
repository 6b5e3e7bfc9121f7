"""Predicted cycles against simulated ones: every beat in and out, stage by stage and in chains, cycle for cycle."""

import numpy as np
import pytest

from mxloom.backends.dataflow.codes import operand_code
from mxloom.backends.dataflow.dot_product import DotProduct
from mxloom.backends.dataflow.float_sum import FloatSum
from mxloom.backends.dataflow.folding import interval
from mxloom.backends.dataflow.graph import CONFIG, Boundary, Graph, Place
from mxloom.backends.dataflow.rtl import circuit_text
from mxloom.backends.dataflow.simulation.arc import ArcSimulator
from mxloom.backends.dataflow.simulation.traffic import NO_STALLS, Phase, word_bytes
from mxloom.backends.dataflow.stages._stream import Stage
from mxloom.backends.dataflow.stages.contraction import Contraction
from mxloom.backends.dataflow.stages.normalize import Normalize
from mxloom.backends.dataflow.stages.pointwise import Binary, Convert
from mxloom.backends.dataflow.stages.quantize import Quantize
from mxloom.backends.dataflow.stages.quantize_mixed import QuantizeMixed
from mxloom.backends.dataflow.stages.quantize_scaled import QuantizeScaled
from mxloom.backends.dataflow.stages.rope import Rope
from mxloom.backends.dataflow.stages.route import Axis, Fifo, Fork, Reorder
from mxloom.backends.dataflow.stages.select import Select
from mxloom.backends.dataflow.stages.softmax import Softmax
from mxloom.backends.dataflow.stages.table import Activation
from mxloom.backends.dataflow.timing import predicted, size_queues
from mxloom.backends.dataflow.window import Window
from mxloom.dialects.errors import MxloomError
from mxloom.dialects.instances import format_of
from mxloom.dialects.integer import Point, Table

P = Point(24, 12)
INT8 = operand_code(format_of("mxint8", rank=2), 64)
MIXED = operand_code(format_of("mixed<!mx.block<32xf4E2M1FN>, !mx.block<32xf8E4M3FN>>", rank=2), 64)
NVFP4 = operand_code(format_of("!mx.block<16xf4E2M1FN, f8E4M3FN>", rank=2), 70)
UNIT = DotProduct(INT8, INT8, 32, 32, Window(36, -20))


def f32(partials: int, size: int, lanes: int = 32, bias: Point | None = None) -> DotProduct:
    return DotProduct(INT8, INT8, lanes, 32, FloatSum(partials, -(-size // 32), P), bias)


SILU = Table("silu", P, P, 8)
RUNS = 3

ALONE: dict[str, Stage] = {
    "convert": Convert(P, P, 20),
    "scaled": Convert(P, P, 20, 3),
    "activation": Activation(SILU, 20),
    "add": Binary("add", P, P, P, 20),
    "add what is kept": Binary("add", P, P, P, 20, 5),
    "quantize": Quantize(P, INT8, 32, 5, 64),
    "quantize, ragged": Quantize(P, INT8, 32, 5, 70),
    "quantize, 8 lanes": Quantize(P, INT8, 8, 5, 70),
    "quantize, mixed": QuantizeMixed(P, MIXED, 32, 5, 64, 1.0),
    "quantize, mixed and ragged": QuantizeMixed(P, MIXED, 32, 5, 70, 1.0),
    "quantize, scaled": QuantizeScaled(P, NVFP4, 16, 5, 70),
    "RMSNorm": Normalize(P, P, 5, 16, 1e-5, None),
    "RMSNorm with weight": Normalize(P, P, 5, 16, 1e-5, Point(16, 12)),
    "LayerNorm": Normalize(P, P, 5, 16, 1e-5, Point(16, 12), Point(16, 12), centred=True),
    "softmax": Softmax(P, P, 5, 12, 8),
    "rope": Rope(P, P, Point(16, 14), 6, 8, 3),
    "reorder": Reorder(24, 12, (Axis(4, 1), Axis(3, 4)), 2),
    "reorder and fill": Reorder(24, 12, (Axis(4, 1), Axis(5, 4, 3)), 2),
    "queue": Fifo(24, 5, 40),
    "selection": Select(24, 3, 4, 5, 1, 2),
    "the last ones": Select(24, 3, 4, 5, 3, 1),
    "linear": Contraction(UNIT, 4, 7, 64, P),
    "linear, 2 units": Contraction(UNIT, 4, 7, 64, P, 2),
    "linear, 5 units": Contraction(UNIT, 4, 7, 64, P, 5),
    "linear, 7 units": Contraction(UNIT, 4, 7, 64, P, 7),
    "matmul": Contraction(UNIT, 4, 6, 64, P, 1, dynamic=True, runs=2),
    "matmul, 2 units": Contraction(UNIT, 4, 6, 64, P, 2, dynamic=True, runs=2),
    "linear, f32": Contraction(f32(1, 200), 4, 7, 200, P),
    "linear, f32 in 2 sums, a short segment": Contraction(f32(2, 130, 8), 4, 7, 130, P, 2),
    "linear, f32 in 8 sums, bias": Contraction(f32(8, 200, bias=Point(24, 8)), 4, 7, 200, P, 3),
    "matmul of one row": Contraction(UNIT, 1, 6, 64, P, 3, dynamic=True, runs=2),
}
CHAINS: dict[str, list[Stage]] = {
    "queue before a slow stage": [Fifo(24, 5, 48), Normalize(P, P, 3, 16, 1e-5, None)],
    "quantized products": [
        Quantize(P, INT8, 32, 4, 64),
        Contraction(UNIT, 4, 64, 64, P, 4),
        Quantize(P, INT8, 32, 4, 64),
        Contraction(UNIT, 4, 7, 64, P, 3),
    ],
    "stages that stall each other": [
        Convert(P, P, 48, 3),
        Normalize(P, P, 3, 16, 1e-5, None),
        Binary("add", P, P, P, 48),
        Activation(SILU, 48),
        Softmax(P, P, 3, 16, 8),
    ],
    "a selection before a slow stage": [
        Convert(P, P, 96, 3),
        Select(24, 3, 2, 16, 1, 1),
        Normalize(P, P, 3, 16, 1e-5, None),
        Select(24, 3, 4, 4, 0, 3),
    ],
    "units that wait to send": [
        Contraction(UNIT, 4, 16, 64, P, 16),
        Normalize(P, P, 4, 16, 1e-5, None),
        Reorder(24, 16, (Axis(4, 1), Axis(4, 4)), 4),
        Quantize(P, INT8, 32, 1, 64),
        Contraction(UNIT, 1, 7, 64, P, 7),
    ],
}


def chain(stages: list[Stage]) -> Graph:
    """Stages one behind the other; second operands come from outside."""
    graph, place = Graph(), None
    for index, stage in enumerate(stages):
        node = graph.add("stage", stage, f"s{index}", _zeros if stage.memories else None)
        for stream, width in stage.inputs.items():
            if place is not None and stream in ("in", "a"):
                graph.connect(place, Place(node.name, stream))
            else:
                name = f"x{index}{stream}"
                graph.inputs.append(Boundary(name, Point(width, 0), (stage.beats[stream],)))
                graph.connect(Place("", name), Place(node.name, stream))
        place = Place(node.name, "out")
    assert place is not None
    return _ended(graph, place)


def _zeros(stage: Stage) -> list[np.ndarray]:
    return [np.zeros((memory.depth, word_bytes(memory.width)), np.uint8) for memory in stage.memories]


def _ended(graph: Graph, place: Place) -> Graph:
    graph.outputs.append(Boundary("y", Point(graph.width(place), 0), (graph.beats(place),)))
    graph.connect(place, Place("", "y"))
    return graph


def simulated(graph: Graph, runs: int) -> dict[str, list[int]]:
    """The cycle of every beat in and out, from the first beat in on."""
    device = ArcSimulator(circuit_text(graph.module("top")), graph.input_streams, graph.output_streams)
    random = np.random.default_rng(0)
    given: dict[str, np.ndarray] = {}
    for each in graph.inputs:
        beats = random.integers(0, 256, (runs * each.shape[0], word_bytes(each.point.width)), dtype=np.uint8)
        beats[:, -1] &= 0xFF >> (-each.point.width % 8)
        given[each.name] = beats
    load = [Phase({CONFIG: graph.configuration()})] if graph.loaded else []
    expected = {each.name: runs * each.shape[0] for each in graph.outputs}
    run = device.run([*load, Phase(given, expected)], NO_STALLS)
    starts = min(int(run.taken[each.name][0]) for each in graph.inputs)
    ins = {each.name: run.taken[each.name] - starts for each in graph.inputs}
    return {name: cycles.tolist() for name, cycles in {**ins, "y": run.given["y"] - starts}.items()}


@pytest.mark.parametrize("name", ALONE)
def test_a_stage_takes_and_gives_every_beat_when_predicted(name: str) -> None:
    graph = chain([ALONE[name]])
    assert predicted(graph, RUNS).beats == simulated(graph, RUNS)


@pytest.mark.parametrize("name", ALONE)
def test_a_stage_alone_needs_the_cycles_of_its_formula(name: str) -> None:
    stage = ALONE[name]
    assert predicted(chain([stage]), 5).interval == pytest.approx(stage.cycles, abs=0.5)


@pytest.mark.parametrize("name", CHAINS)
def test_chains_of_stages_stall_as_predicted(name: str) -> None:
    graph = chain(CHAINS[name])
    assert predicted(graph, RUNS).beats == simulated(graph, RUNS)


def parted(depth: int) -> Graph:
    """A fork whose ways meet again: a slow one of whole rows, and a queue."""
    graph = Graph()
    graph.inputs.append(Boundary("x", P, (32,)))
    fork, queue = graph.add("fork", Fork(24, 2, 32), "x"), graph.add("queue", Fifo(24, depth, 32), "x")
    norm, add = (
        graph.add("norm", Normalize(P, P, 2, 16, 1e-5, None), "x"),
        graph.add("add", Binary("add", P, P, P, 32), "x"),
    )
    for source, target in [
        (Place("", "x"), Place(fork.name, "in")),
        (Place(fork.name, "out0"), Place(norm.name, "in")),
        (Place(fork.name, "out1"), Place(queue.name, "in")),
        (Place(norm.name, "out"), Place(add.name, "a")),
        (Place(queue.name, "out"), Place(add.name, "b")),
    ]:
        graph.connect(source, target)
    return _ended(graph, Place(add.name, "out"))


@pytest.mark.parametrize("depth", [17, 20, 33, 60])
def test_queues_hold_up_what_they_cannot_take(depth: int) -> None:
    graph = parted(depth)
    assert predicted(graph, RUNS).beats == simulated(graph, RUNS)


def test_queues_are_as_deep_as_the_other_way_is_long() -> None:
    """With such queues the slowest stage alone sets the pace; a row less holds it up."""
    graph = parted(1)
    with pytest.raises(MxloomError, match=r"the design comes to a stop: .* wait for good"):
        predicted(graph)
    timing = size_queues(graph)
    assert timing.interval == interval(graph) == predicted(graph, 8).interval
    assert predicted(graph, RUNS).beats == simulated(graph, RUNS)
    (depth,) = timing.queued.values()
    assert predicted(parted(depth - 15)).interval > timing.interval
