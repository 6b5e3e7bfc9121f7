"""Pooling: the stage against torch and `dialects.integer`, however streams stall."""

import pytest
import torch

from mxloom.backends.dataflow.arithmetic import reciprocal
from mxloom.backends.dataflow.rtl import circuit_text
from mxloom.backends.dataflow.simulation.arc import ArcSimulator
from mxloom.backends.dataflow.simulation.traffic import NO_STALLS, Stalls
from mxloom.backends.dataflow.stages.patches import Patches, Sliding
from mxloom.backends.dataflow.stages.pool import Pool
from mxloom.backends.dataflow.timing import predicted
from mxloom.dialects import integer
from mxloom.dialects.integer import Point

from .stages import codes_of, compare, spread
from .test_timing import chain, simulated

P = Point(24, 12)
STALLS = {"none": NO_STALLS} | {f"random {p}": Stalls.random(p) for p in (0.3, 0.7)}
SHAPES = [(40, 1, 1), (40, 4, 1), (30, 7, 1), (9, 12, 2), (5, 49, 3), (3, 36, 16)]


@pytest.mark.parametrize(("runs", "count", "inner"), SHAPES)
def test_the_largest(runs: int, count: int, inner: int) -> None:
    x = spread((2, runs, count, inner), 24, 3)
    stage = Pool("max", P, P, runs, count, inner)
    compare(stage, {"in": codes_of(x, 24)}, {"out": codes_of(x.amax(2), 24)}, stalls=STALLS)


def test_the_largest_in_another_format() -> None:
    x = spread((200, 9), 24, 3)
    expected = integer.requantized(x.amax(1), 12, Point(20, 9))
    compare(
        Pool("max", P, Point(20, 9), 200, 9), {"in": codes_of(x, 24)}, {"out": codes_of(expected, 20)}, stalls=STALLS
    )


@pytest.mark.parametrize(("runs", "count", "inner"), SHAPES)
@pytest.mark.parametrize("result", [P, Point(24, 15), Point(16, 3), Point(8, -6)])
def test_means(runs: int, count: int, inner: int, result: Point) -> None:
    x = spread((2, runs, count, inner), 24, 3)
    expected = integer.mean(x.sum(2), count, P, result)
    stage = Pool("mean", P, result, runs, count, inner)
    compare(stage, {"in": codes_of(x, 24)}, {"out": codes_of(expected, result.width)}, stalls=STALLS)


def test_a_mean_of_narrow_numbers_far_from_their_point() -> None:
    """20 places to the right of 8 bits: nothing but the rounding of halves is left."""
    x = torch.arange(-128, 128)
    given, result = Point(8, 10), Point(24, -10)
    expected = integer.mean(x * 3, 3, given, result)
    stage = Pool("mean", given, result, 256, 3)
    compare(stage, {"in": codes_of(x.repeat_interleave(3), 8)}, {"out": codes_of(expected, 24)}, stalls=STALLS)


@pytest.mark.parametrize("divisor", [3, 5, 7, 9, 25, 49, 121, 3135])
def test_a_product_with_the_reciprocal_divides(divisor: int) -> None:
    """Where the quotient steps, and at the ends: x // d of Python's integers."""
    factor, places = reciprocal(divisor, 30)
    numbers = {n * divisor + e for n in range(0, (1 << 30) // divisor, 99991) for e in (-1, 0, 1)} | {(1 << 30) - 1}
    assert all(x * factor >> places == x // divisor for x in numbers if 0 <= x < 1 << 30)


@pytest.mark.parametrize(
    ("lines", "columns"),
    [
        (Sliding(8, 2, 2), Sliding(6, 2, 2)),
        (Sliding(9, 3, 2, 1), Sliding(7, 3, 2, 1)),
        (Sliding(7, 2, 1, 0, 2), Sliding(5, 3, 1, 1)),
    ],
)
def test_padding_never_wins(lines: Sliding, columns: Sliding) -> None:
    """All numbers are negative, the lowest among them: torch's padding is minus infinity."""
    x = -spread((2, 3, lines.size, columns.size), 24, 3).abs().clamp(max=(1 << 23) - 1) - 1
    kernel, stride, padding, dilation = (
        (getattr(lines, name), getattr(columns, name)) for name in ("kernel", "stride", "padding", "dilation")
    )
    expected = torch.nn.functional.max_pool2d(x.double(), kernel, stride, padding, dilation).to(torch.int64)
    windows = Patches(24, 3, lines, columns, 1, by_channel=True, fill=-(1 << 23))
    count = lines.kernel * columns.kernel
    graph = chain([windows, Pool("max", P, P, windows.beats["out"] // count, count)])
    device = ArcSimulator(circuit_text(graph.module("top")), graph.input_streams, graph.output_streams)
    given, found = codes_of(x.permute(0, 2, 3, 1), 24), codes_of(expected.permute(0, 2, 3, 1), 24)
    compare(windows, {"x0in": given}, {"y": found}, stalls=STALLS, device=device)


@pytest.mark.parametrize("stage", [Pool("max", P, P, 6, 4), Pool("mean", P, P, 3, 4, 5), Pool("mean", P, P, 5, 1)])
def test_cycles_are_those_of_the_formula_and_of_the_prediction(stage: Pool) -> None:
    graph = chain([stage])
    assert predicted(graph, 3).beats == simulated(graph, 3)
    assert predicted(graph, 5).interval == stage.cycles
