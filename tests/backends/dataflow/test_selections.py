"""Parts of streams in whole designs: slices, selections and splits along every dimension and behind other orders."""

import pytest
import torch

from mxloom.backends.dataflow.graph import Graph
from mxloom.backends.dataflow.lowering import lower
from mxloom.backends.dataflow.rtl import circuit_text
from mxloom.backends.dataflow.simulation.arc import ArcSimulator
from mxloom.backends.dataflow.simulation.traffic import NO_STALLS, Stalls
from mxloom.backends.dataflow.timing import size_queues
from mxloom.backends.dataflow.verification import compare, vectors
from mxloom.backends.weight_store import WeightStore
from mxloom.dialects.errors import MxloomError
from mxloom.dialects.mx import parse_module

X = "!mx.fixed<24, 12>"


def text(lines: str, result: str) -> str:
    """A function from x [3, 5, 7] to y, whose shape `result` says."""
    return f"""func.func @f(%x: tensor<3x5x7x{X}>) -> tensor<{result}x{X}> attributes {{outputs = ["y"]}} {{
{lines}
  func.return %y : tensor<{result}x{X}>
}}""".replace("T<", "tensor<").replace("xX>", f"x{X}>")


TRANSPOSED = "%t = mx.transpose %x, dim0 = 0, dim1 = 2 : (T<3x5x7xX>) -> T<7x5x3xX>\n"
ALL = "%s = mx.slice %x, dim = 1, start = 0, end = 5 : (T<3x5x7xX>) -> T<3x5x7xX>\n"
MODULES = {
    "a slice of the last dimension": (
        "%y = mx.slice %x, dim = 2, start = 2, end = 5 : (T<3x5x7xX>) -> T<3x5x3xX>",
        "3x5x3",
    ),
    "a slice of the first": ("%y = mx.slice %x, dim = 0, start = 1, end = 9 : (T<3x5x7xX>) -> T<2x5x7xX>", "2x5x7"),
    "a slice from behind": ("%y = mx.slice %x, dim = 1, start = -2 : (T<3x5x7xX>) -> T<3x2x7xX>", "3x2x7"),
    "all of it": (ALL + "%y = mx.relu %s : (T<3x5x7xX>) -> T<3x5x7xX>", "3x5x7"),
    "a selection": ("%y = mx.select %x, dim = 1, index = 3 : (T<3x5x7xX>) -> T<3x7xX>", "3x7"),
    "the last one": ("%y = mx.select %x, dim = 2, index = -1 : (T<3x5x7xX>) -> T<3x5xX>", "3x5"),
    "a slice of what was transposed": (
        TRANSPOSED + "%y = mx.slice %t, dim = 1, start = 1, end = 4 : (T<7x5x3xX>) -> T<7x3x3xX>",
        "7x3x3",
    ),
    "a selection of what was transposed": (
        TRANSPOSED + "%y = mx.select %t, dim = 2, index = 1 : (T<7x5x3xX>) -> T<7x5xX>",
        "7x5",
    ),
    "a slice of a slice": (
        TRANSPOSED
        + "%s = mx.slice %t, dim = 0, start = 1, end = 6 : (T<7x5x3xX>) -> T<5x5x3xX>\n"
        + "%y = mx.slice %s, dim = 2, start = 1, end = 3 : (T<5x5x3xX>) -> T<5x5x2xX>",
        "5x5x2",
    ),
    "parts that meet again": (
        "%a, %b, %c = mx.split %x, split_sizes = [3, 1, 3], dim = 2 "
        ": (T<3x5x7xX>) -> (T<3x5x3xX>, T<3x5x1xX>, T<3x5x3xX>)\n"
        "%y = mx.sub %a, %c : (T<3x5x3xX>, T<3x5x3xX>) -> T<3x5x3xX>",
        "3x5x3",
    ),
}


def built(module: str) -> Graph:
    graph = lower(parse_module(module), WeightStore())
    graph.add_forks()
    graph.add_queues()
    return graph


@pytest.mark.parametrize("name", MODULES)
def test_parts_equal_the_reference(name: str) -> None:
    module = text(*MODULES[name])
    graph = built(module)
    timing = size_queues(graph)
    generator = torch.Generator().manual_seed(1)
    inputs = [(torch.randn(3, 5, 7, generator=generator) * 100,) for _ in range(4)]
    given = vectors(parse_module(module), WeightStore(), graph, inputs)
    simulator = ArcSimulator(circuit_text(graph.module("part")), graph.input_streams, graph.output_streams)
    for stalls in (NO_STALLS, Stalls.random(0.3)):
        outcome = compare(simulator, graph, given, stalls)
        assert outcome.is_equal, outcome
        if stalls is NO_STALLS:
            assert (outcome.latency, outcome.interval) == (timing.latency, timing.interval)


def test_what_takes_no_run_of_numbers_is_refused() -> None:
    with pytest.raises(MxloomError, match="it gives back what it is given"):
        built(text(ALL.strip().replace("%s", "%y"), "3x5x7"))
    with pytest.raises(MxloomError, match=r"y \(mx\.slice\): every 2th number of a stream has no hardware"):
        built(text("%y = mx.slice %x, dim = 2, start = 0, end = 7, step = 2 : (T<3x5x7xX>) -> T<3x5x4xX>", "3x5x4"))
