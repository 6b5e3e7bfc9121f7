"""Models whose linear layers add up in f32, as hardware: every beat equals the reference, and so does emulation."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mxloom
from mxloom.backends.dataflow.float_sum import FloatSum
from mxloom.backends.dataflow.simulation.arc import ArcSimulator
from mxloom.backends.dataflow.simulation.traffic import NO_STALLS, Stalls
from mxloom.backends.dataflow.stages.contraction import Contraction
from mxloom.backends.dataflow.verification import compare
from mxloom.backends.reference import Interpreter
from mxloom.compiler.hardware import Hardware, hardware
from mxloom.dialects.errors import MxloomError, UsageError

ROWS = 4


class Gated(nn.Module):
    """A gated MLP with a linear layer before it; 200 and 130 are no multiples of a block."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(200, 130)
        self.gate, self.up = nn.Linear(130, 70, bias=False), nn.Linear(130, 70)
        self.down = nn.Linear(70, 40)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.down(torch.nn.functional.silu(self.gate(x)) * self.up(x))


def compiled(options: str, weights: str = "mxfp4", activations: str = "mxint8", *before: str) -> mxloom.Compiled:
    recipe: dict[str, Any] = {
        "version": 1,
        "quantize": [{"weights": weights, "activations": activations}],
        "passes": [*before, f"legalize-hardware{{{options}}}"],
    }
    example = torch.randn(2, ROWS, 200, generator=torch.Generator().manual_seed(1))
    return mxloom.compile(Gated().eval(), recipe, example={"x": example})


def accumulators(found: Hardware) -> list[FloatSum]:
    stages = [node.stage for node in found.graph.nodes.values()]
    units = [stage.unit.accumulator for stage in stages if isinstance(stage, Contraction)]
    return [each for each in units if isinstance(each, FloatSum)]


@pytest.mark.parametrize(
    ("weights", "activations", "partials"),
    [
        ("mxint8", "mxint8", 4),
        pytest.param("mxfp4", "mxint8", 1, marks=pytest.mark.slow),
        pytest.param("mxfp8_e4m3", "mxfp8_e5m2", 8, marks=pytest.mark.slow),
    ],
)
def test_emulation_reference_and_hardware_agree(weights: str, activations: str, partials: int) -> None:
    typed = compiled(f"accumulator=f32 partials={partials}", weights, activations)
    found = hardware(typed, positions=ROWS)
    assert [each.partials for each in accumulators(found)] == [partials] * 4
    generator = torch.Generator().manual_seed(2)
    inputs = [torch.randn(1, ROWS, 200, generator=generator) for _ in range(8)]
    for each in inputs:
        (expected,) = Interpreter(typed.module, typed.weights)(each)
        assert torch.equal(typed(each), expected)
    given = found.vectors(8, [{"x": each} for each in inputs])
    simulator = ArcSimulator(found.text, found.graph.input_streams, found.graph.output_streams)
    for stalls in (NO_STALLS, Stalls.random(0.1)):
        outcome = compare(simulator, found.graph, given, stalls)
        assert outcome.is_equal, outcome
        assert outcome.beats == 8 * ROWS * 40
        if stalls is NO_STALLS:
            assert outcome.latency == found.timing.latency
            assert outcome.interval == pytest.approx(found.timing.interval, abs=0.5)


def test_a_layer_keeps_the_accumulator_that_it_states() -> None:
    stated = compiled("accumulator=f32 partials=2", "mxint8", "mxint8", 'accumulate{match="*up" partials=4}')
    assert sorted(each.partials for each in accumulators(hardware(stated))) == [2, 2, 2, 4]


def test_what_hardware_does_not_add_up_in_f32_is_named() -> None:
    with pytest.raises(MxloomError, match=r"first: .*the scales of .* are no powers of two"):
        compiled("accumulator=f32", "int8_channel", "mxint8")
    with pytest.raises(MxloomError, match=r"up: it adds up in bf16, and hardware in f32 or in windows"):
        compiled("accumulator=f32", "mxint8", "mxint8", 'accumulate{match="*up" format=bf16}')
    with pytest.raises(UsageError, match=r'accumulator is "window" or "f32", got "f16"'):
        compiled("accumulator=f16")
