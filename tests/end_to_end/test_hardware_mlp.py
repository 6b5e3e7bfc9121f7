"""Plain torch models as hardware: sizes that are no powers of two, parameters and numbers beside streams."""

import pytest
import torch
from torch import Tensor, nn

import mxloom
from mxloom.backends.dataflow.simulation.arc import ArcSimulator
from mxloom.backends.dataflow.simulation.traffic import NO_STALLS, Stalls
from mxloom.backends.dataflow.verification import compare
from mxloom.compiler.hardware import hardware
from mxloom.dialects.errors import MxloomError


class Positions(nn.Module):
    """Position embeddings, a curve and more around a linear layer: all second operands are parameters or numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(24, 20)
        self.positions = nn.Parameter(torch.randn(1, 5, 24))
        self.gain, self.other = nn.Parameter(torch.randn(20)), nn.Parameter(torch.randn(4, 5))

    def forward(self, x: Tensor) -> Tensor:
        y = (torch.tanh(self.linear(x + self.positions)) + 1.0) * self.gain * 0.3 - 0.25
        y = -y.reshape(-1, 5, 4, 5).transpose(2, 3) / 4 + self.other.T
        return y * torch.sigmoid(1.702 * y)


def mlp() -> nn.Module:
    layers = [nn.Linear(37, 50), nn.ReLU(), nn.Linear(50, 29), nn.GELU(), nn.Linear(29, 41), nn.Tanh()]
    return nn.Sequential(*layers, nn.Linear(41, 23), nn.Sigmoid(), nn.Linear(23, 11))


MODELS = {"mlp": (mlp, "input", (4, 37)), "positions": (Positions, "x", (4, 5, 24))}


FORMATS = {"mxint8": ("mxint8", 0.05), "mxfp4": ("mxint8", 0.3), "nvfp4": ("nvfp4", 0.3)}
"""Of activations beside weights of a format, and the noise over the signal that such numbers may make."""


def compiled(model: nn.Module, name: str, shape: tuple[int, ...], weights: str = "mxint8") -> mxloom.Compiled:
    recipe = {
        "version": 1,
        "quantize": [{"weights": weights, "activations": FORMATS[weights][0]}],
        "passes": ["legalize-hardware"],
    }
    example = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    return mxloom.compile(model.eval(), recipe, example={name: example})


@pytest.mark.parametrize(
    ("kind", "weights"),
    [
        ("mlp", "mxint8"),
        ("positions", "nvfp4"),
        *(pytest.param("mlp", each, marks=pytest.mark.slow) for each in ("mxfp4", "nvfp4")),
        *(pytest.param("positions", each, marks=pytest.mark.slow) for each in ("mxint8", "mxfp4")),
    ],
)
def test_a_model_equals_the_reference(kind: str, weights: str) -> None:
    torch.manual_seed(0)
    build, name, shape = MODELS[kind]
    model = build()
    typed = compiled(model, name, shape, weights)
    found = hardware(typed)
    generator = torch.Generator().manual_seed(1)
    inputs = [torch.randn(shape, generator=generator) for _ in range(8)]
    given = found.vectors(8, [{name: each} for each in inputs])
    simulator = ArcSimulator(found.text, found.graph.input_streams, found.graph.output_streams)
    for stalls in (NO_STALLS, Stalls.random(0.1)):
        outcome = compare(simulator, found.graph, given, stalls)
        assert outcome.is_equal, outcome
        if stalls is NO_STALLS:
            assert outcome.latency == found.timing.latency
            assert outcome.interval == pytest.approx(found.timing.interval, abs=0.5)
    x = torch.cat(inputs)
    with torch.no_grad():
        assert (typed(x) - model(x)).norm() < FORMATS[weights][1] * model(x).norm()


class Less(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.randn(24))

    def forward(self, x: Tensor) -> Tensor:
        return self.gain - x


def test_what_no_stage_computes_is_refused() -> None:
    with pytest.raises(MxloomError, match=r"sub\S* \(mx\.sub\): a parameter less a stream has no hardware"):
        hardware(
            mxloom.compile(Less(), {"version": 1, "passes": ["legalize-hardware"]}, example={"x": torch.ones(4, 24)})
        )
