"""A small CNN as hardware: every beat equals the reference, and its cycles are those that were predicted."""

import pytest
import torch
from torch import Tensor, nn

import mxloom
from mxloom.backends.dataflow.folding import interval
from mxloom.backends.dataflow.graph import Graph
from mxloom.backends.dataflow.lowering import lower
from mxloom.backends.dataflow.rtl import circuit_text
from mxloom.backends.dataflow.simulation.arc import ArcSimulator
from mxloom.backends.dataflow.simulation.traffic import NO_STALLS, Stalls
from mxloom.backends.dataflow.timing import predicted
from mxloom.backends.dataflow.verification import compare, vectors
from mxloom.backends.static import static
from mxloom.dialects.errors import MxloomError

PICTURES = 4


class Cnn(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.features = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 16, 3, stride=2), nn.ReLU()
        )
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(torch.flatten(self.pool(self.features(x)), 1))


class Windows(nn.Module):
    """What the other has not: padded and overlapping maxima, means of windows, a mean of dimensions, one dimension."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.first = nn.Conv2d(2, 6, (2, 3), stride=(1, 2), padding=(1, 2), dilation=(2, 1))
        self.largest = nn.MaxPool2d(3, stride=2, padding=1)
        self.means = nn.AvgPool2d((2, 3), stride=(2, 1))
        self.along = nn.Conv1d(6, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.means(self.largest(self.first(x)))
        return self.along(x.flatten(2)).mean(-1)


def design(model: nn.Module, weights: str, activations: str, x: Tensor) -> tuple[mxloom.Compiled, Graph]:
    rules = [{"weights": weights, "activations": activations}]
    recipe = {"version": 1, "quantize": rules, "passes": ["legalize-hardware"]}
    compiled = mxloom.compile(model.eval(), recipe, example={"x": x})
    module, store, assumed = static(compiled.module, compiled.weights, [(1, *x.shape[1:])])
    assert assumed == []
    graph = lower(module, store)
    graph.add_forks()
    graph.add_queues()
    return compiled, graph


@pytest.mark.parametrize(
    ("model", "shape", "weights", "activations"),
    [
        (Cnn, (3, 12, 12), "mxint8", "mxint8"),
        pytest.param(Cnn, (3, 12, 12), "mxfp4", "mxint8", marks=pytest.mark.slow),
        pytest.param(Cnn, (3, 12, 12), "int8_channel", "mxint8", marks=pytest.mark.slow),
        (Windows, (2, 9, 11), "mxint8", "mxint8"),
    ],
)
def test_a_cnn_equals_the_reference(
    model: type[nn.Module], shape: tuple[int, ...], weights: str, activations: str
) -> None:
    generator = torch.Generator().manual_seed(1)
    pictures = [torch.randn(1, *shape, generator=generator) for _ in range(PICTURES)]
    compiled, graph = design(model(), weights, activations, torch.cat(pictures))
    module, store, _ = static(compiled.module, compiled.weights, [(1, *shape)])
    simulator = ArcSimulator(circuit_text(graph.module("cnn")), graph.input_streams, graph.output_streams)
    given = vectors(module, store, graph, [(each,) for each in pictures])
    for stalls in (NO_STALLS, Stalls.random(0.3), Stalls.random(0.7)):
        outcome = compare(simulator, graph, given, stalls)
        assert outcome.is_equal, outcome
        assert outcome.beats == PICTURES * compiled(pictures[0]).numel()
        if stalls is NO_STALLS:
            assert outcome.interval == pytest.approx(predicted(graph, PICTURES).interval, abs=0.5)
            assert interval(graph) <= outcome.interval + 0.5


@pytest.mark.parametrize(
    ("pool", "reason"),
    [
        (nn.MaxPool2d(2, ceil_mode=True), "ceil_mode: windows that begin in a picture and end behind it"),
        (nn.AvgPool2d(2, ceil_mode=True), "its windows lie inside: no padding, no ceil_mode"),
        (nn.AvgPool2d(3, padding=1), "its windows lie inside: no padding, no ceil_mode"),
        (nn.AvgPool2d(3, padding=1, count_include_pad=False), "its windows lie inside: no padding, no ceil_mode"),
        (nn.AdaptiveAvgPool2d((2, 3)), r"its windows have one known size: \[7, 7\] gives no \[2, 3\]"),
    ],
)
def test_windows_without_hardware_are_named(pool: nn.Module, reason: str) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.pool = nn.Conv2d(1, 2, 2), pool

        def forward(self, x: Tensor) -> Tensor:
            return self.pool(self.conv(x))

    with pytest.raises(MxloomError, match=rf"(?s)pool.*{reason}"):
        design(Model(), "mxint8", "mxint8", torch.randn(2, 1, 8, 8))
