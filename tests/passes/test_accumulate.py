"""`accumulate`: accumulators of linear layers whose operands have codes; nothing without effect."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import mxloom
from mxloom.backends.reference import Interpreter
from mxloom.dialects.errors import MxloomError, UsageError
from mxloom.dialects.operations.contraction import LinearOp


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(64, 64), nn.Linear(64, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.relu(self.first(x)))


X = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))


def accumulators(compiled: mxloom.Compiled) -> list[str | None]:
    layers = [op for op in compiled.module.walk() if isinstance(op, LinearOp)]
    return [None if layer.acc is None else layer.acc.label for layer in layers]


def test_mode_exact_is_the_pass_at_the_end() -> None:
    compiled = mxloom.compile(Layers(), weights="mxfp4", activations="mxint8", example={"x": X}, mode="exact")
    assert compiled.pipeline == "quantize{weights=mxfp4 activations=mxint8},accumulate"
    assert accumulators(compiled) == ["f32", "f32"]
    assert compiled.coverage().accumulators == {"f32": 1.0}
    assert "100.0% of MACs summed exactly inside blocks, blocks added in f32" in compiled.coverage().summary()


def test_a_recipe_chooses_layers_and_formats() -> None:
    recipe = {
        "quantize": [{"match": "first", "weights": "mxint8", "activations": "mxint8"}],
        "passes": ["accumulate{format=e8m13 rounding=rtz partials=4}"],
    }
    compiled = mxloom.compile(Layers(), recipe, example={"x": X})
    assert accumulators(compiled) == ["e8m13 rtz x 4", None]
    assert compiled.coverage().accumulators == {"e8m13 rtz x 4": 0.5, "torch": 0.5}
    assert compiled.coverage().torch_sums == (("second", 0.5),)
    assert "blocks added in e8m13 rtz x 4; in torch's f32: second 50.0%" in compiled.coverage().summary()


class Computed(Layers):
    """Weights and biases that the model computes, in the ways that models do."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        whole = torch.nn.functional.linear(x, self.first.weight + self.second.weight)
        part = torch.nn.functional.linear(whole[:, :33], self.first.weight[:, :33])
        biased = torch.nn.functional.linear(part, self.first.weight, self.first.bias * 2)
        return self.second(biased)


def test_layers_with_computed_weights_keep_the_sum_of_torch() -> None:
    """Found by hand: they were compiled, and refused when the model was called."""
    compiled = mxloom.compile(Computed(), weights="mxfp4", activations="mxint8", example={"x": X}, mode="exact")
    assert accumulators(compiled) == [None, None, None, "f32"]
    x = X[:2]
    assert torch.equal(compiled(x), Interpreter(compiled.module, compiled.weights)(x)[0])
    recipe = {"passes": ["quantize{weights=mxfp4 activations=mxint8},accumulate{match=linear}"]}
    with pytest.raises(MxloomError, match="the weight is computed in the model"):
        mxloom.compile(Computed(), recipe, example={"x": X})


def test_the_first_match_decides() -> None:
    passes = ["accumulate{match=first format=bf16},accumulate{partials=2}"]
    compiled = mxloom.compile(
        Layers(), {"quantize": [{"weights": "mxint8", "activations": "mxint8"}], "passes": passes}, example={"x": X}
    )
    assert accumulators(compiled) == ["bf16", "f32 x 2"]


@pytest.mark.parametrize(
    ("passes", "message"),
    [
        ("accumulate", "no layer takes an accumulator: the input is f32, not quantized"),
        ("quantize{weights=mxfp4},accumulate", "the input is f32, not quantized"),
        ("quantize{weights=mxfp4 activations=mxint8},accumulate{match=third}", "'third' matches 0 of 2 linear layers"),
        ("quantize{weights=mxfp4 activations=mxint8},accumulate{format=f16}", 'no accumulator is called "f16"'),
        ("quantize{weights=mxfp4 activations=mxint8},accumulate{partials=0}", "at least one partial sum, got 0"),
    ],
)
def test_a_pass_without_effect_is_refused(passes: str, message: str) -> None:
    with pytest.raises(MxloomError, match=message):
        mxloom.compile(Layers(), {"passes": [passes]}, example={"x": X})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mode": "exact"}, "mode exact needs quantized operands"),
        ({"mode": "precise", "weights": "mxfp4"}, "mode is fast or exact, got 'precise'"),
        ({"mode": "exact", "weights": "mxfp4"}, "the input is f32, not quantized"),
        (
            {
                "mode": "exact",
                "recipe": {"passes": ["quantize{weights=mxfp4 activations=mxint8},accumulate{format=bf16}"]},
            },
            "state an accumulator already",
        ),
    ],
)
def test_modes_that_mean_nothing_are_refused(arguments: dict[str, str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        mxloom.compile(Layers(), example={"x": X}, **arguments)  # pyright: ignore[reportArgumentType]
