"""Stacked layers as one design: every beat and every predicted cycle is right."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import mxloom
from mxloom.backends.dataflow.simulation.arc import ArcSimulator
from mxloom.backends.dataflow.simulation.traffic import NO_STALLS, Stalls
from mxloom.backends.dataflow.verification import compare
from mxloom.compiler.hardware import Hardware, hardware
from mxloom.dialects.operations._operation import Operation
from mxloom.passes._sites import module_name

MODEL = Path(__file__).parents[2] / "examples" / "models" / "kjv-2m"


class Layer(nn.Module):
    """A residual layer with a norm; sizes are no powers of two."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(24), nn.Linear(24, 40), nn.Linear(40, 24)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(self.norm(x))))


class Stack(nn.Module):
    """Layers under one name, and something before and behind them."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.first = nn.Linear(7, 24)
        self.layers = nn.ModuleList(Layer() for _ in range(count))
        self.last = nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for layer in self.layers:
            x = layer(x)
        return self.last(x)


def recipe(option: str = "") -> dict[str, object]:
    return {
        "version": 1,
        "quantize": [{"weights": "mxint8", "activations": "mxint8"}],
        "passes": [f"legalize-hardware{option}"],
    }


def check(design: Hardware, count: int, stalls: tuple[Stalls, ...]) -> int:
    """Compare the design with the reference, and its cycles with those predicted; returns the beats."""
    given = design.vectors(count)
    simulator = ArcSimulator(design.text, design.graph.input_streams, design.graph.output_streams)
    beats = 0
    for each in stalls:
        outcome = compare(simulator, design.graph, given, each)
        assert outcome.is_equal, outcome
        beats += outcome.beats
        if each is NO_STALLS:
            assert outcome.latency == design.timing.latency
            assert outcome.interval == pytest.approx(design.timing.interval, abs=0.5)
    return beats


def test_two_layers_are_one_design() -> None:
    torch.manual_seed(0)
    example = torch.randn((2, 3, 7), generator=torch.Generator().manual_seed(0))
    design = hardware(mxloom.compile(Stack(2).eval(), recipe(), example={"x": example}), "layers")
    assert check(design, 6, (NO_STALLS, Stalls.random(0.2))) == 2 * 6 * 3 * 24
    modules = {module_name(op) for op in design.module.walk() if isinstance(op, Operation)}
    assert any(name.startswith("layers.1") for name in modules) and "last" not in modules


@pytest.mark.slow
def test_all_layers_of_the_embedded_model_are_one_design() -> None:
    design = hardware(mxloom.compile(MODEL, recipe()), "model.layers", positions=2)
    assert check(design, 2, (NO_STALLS,)) == 2 * 2 * 192
    assert sum(node.name.endswith("gate_proj_linear") for node in design.graph.nodes.values()) == 4
