"""Models of two inputs whose ways cross: through one fork, through two, and through several stages that join them."""

import pytest
import torch
from torch import Tensor, nn

import mxloom
from mxloom.backends.dataflow.rounds import predicted_cycles
from mxloom.backends.dataflow.simulation.arc import ArcSimulator
from mxloom.backends.dataflow.simulation.traffic import NO_STALLS, Stalls
from mxloom.backends.dataflow.verification import compare
from mxloom.compiler.hardware import hardware

ROWS, SIZE, RUNS = 5, 16, 8
RECIPE = {"quantize": [{"weights": "mxint8", "activations": "mxint8"}], "passes": ["legalize-hardware"]}


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q, self.r = nn.Linear(SIZE, SIZE), nn.Linear(SIZE, SIZE)


class Crossed(Layers):
    """Each result needs the whole of one input's row before it takes the other's first number."""

    def forward(self, i: Tensor, o: Tensor) -> tuple[Tensor, Tensor]:
        return self.q(i) + o, self.r(o) + i


class Late(Layers):
    """Two ways from `o` are as many stages long, and the second needs a whole row where the first needs a number."""

    def forward(self, i: Tensor, o: Tensor) -> Tensor:
        return self.q(i) * o + self.r(o)


class Joined(Layers):
    """Ways of both inputs that have been joined are joined again."""

    def forward(self, i: Tensor, o: Tensor) -> tuple[Tensor, Tensor]:
        return self.q(torch.relu(self.r(i))) + o, self.r(o) + i * o


class Returned(Layers):
    """An input that comes out again."""

    def forward(self, i: Tensor, o: Tensor) -> tuple[Tensor, Tensor]:
        return i, self.q(i) * o


def random(seed: int, sequences: int = 1) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(sequences, ROWS, SIZE, generator=generator) for name in "io"}


@pytest.mark.parametrize("kind", [Crossed, Late, Joined, Returned])
def test_inputs_whose_ways_cross_never_wait_for_one_another_for_good(kind: type[Layers]) -> None:
    """Every beat equals the reference, every cycle is as predicted, and no stage waits more than for the slowest."""
    found = hardware(mxloom.compile(kind().eval(), RECIPE, example=random(0, 3)), positions=1)
    given = found.vectors(RUNS, [random(seed) for seed in range(RUNS)])
    simulator = ArcSimulator(found.text, found.graph.input_streams, found.graph.output_streams)
    for stalls in (NO_STALLS, Stalls.random(0.2)):
        outcome = compare(simulator, found.graph, given, stalls)
        assert outcome.is_equal, outcome
        assert outcome.beats == RUNS * ROWS * SIZE * len(found.graph.outputs)
        if stalls is NO_STALLS:
            work = predicted_cycles(found.graph, RUNS).work
            assert (outcome.latency, outcome.cycles) == (found.timing.latency, work)
    slowest = max(node.stage.cycles for node in found.graph.nodes.values())
    assert found.timing.interval == pytest.approx(slowest, rel=0.05)
