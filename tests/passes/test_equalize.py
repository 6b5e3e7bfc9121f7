"""`equalize`: both layers of a pair have one range for each channel, and compute what they did."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import mxloom
from mxloom.compiler.driver import run_pipeline
from mxloom.dialects.errors import UsageError
from mxloom.passes._context import CompileContext
from mxloom.passes.equalize import Equalize

from .scaled_models import Captured, assert_same, captured, model

IMAGES = torch.randn(3, 3, 10, 10, generator=torch.Generator().manual_seed(4))


def equalized(held: Captured, match: str = "*") -> list[str]:
    ctx = CompileContext(weights=held.weights)
    Equalize(match).apply(ctx, held.module)
    held.module.verify()
    return ctx.notes


def rows(weight: Tensor) -> Tensor:
    """The largest magnitude of each output channel."""
    return weight.abs().flatten(1).amax(1)


def columns(weight: Tensor, groups: int = 1) -> Tensor:
    """The largest magnitude of each input channel."""
    inputs = weight.shape[1]
    each = weight.abs().flatten(2).amax(2) if weight.ndim > 2 else weight.abs()
    return each.reshape(groups, -1, inputs).amax(1).reshape(-1)


class Mlp(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor] = torch.relu) -> None:
        super().__init__()
        self.function, self.one, self.two = function, nn.Linear(6, 10), nn.Linear(10, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.function(self.one(x)))


@pytest.mark.parametrize(
    "function", [torch.relu, nn.LeakyReLU(0.1), nn.PReLU(), lambda x: 0.5 * x, lambda x: x.clamp(min=0), torch.abs]
)
def test_a_pair_has_the_scale_of_the_paper(function: Callable[[Tensor], Tensor]) -> None:
    """s_i = sqrt(r1_i r2_i) / r2_i in f64; both ranges become sqrt(r1_i r2_i)."""
    held = captured(Mlp(function), {"x": torch.randn(5, 6)})
    first, bias, second = (held.weights[name].double() for name in ("one.weight", "one.bias", "two.weight"))
    before = held.outputs()
    equalized(held)
    s = (rows(first) / columns(second)).sqrt()
    for name, wanted in (("one.weight", first / s[:, None]), ("one.bias", bias / s), ("two.weight", second * s)):
        torch.testing.assert_close(held.weights[name].double(), wanted, rtol=1e-6, atol=0)
    torch.testing.assert_close(rows(held.weights["one.weight"]), columns(held.weights["two.weight"]), rtol=1e-6, atol=0)
    assert_same(held.outputs(), before)


class Chain(nn.Module):
    """A mobile network's block, a batch norm in it, pooling, and a classifier that reads pixels side by side."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.depth = nn.Conv2d(3, 8, 3, bias=False), nn.Conv2d(8, 8, 3, groups=8, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.grouped, self.last = nn.Conv2d(8, 6, 1, groups=2), nn.Linear(6 * 4 * 4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.wide(x)))
        x = nn.functional.leaky_relu(self.depth(x), 0.2)
        x = torch.relu(self.grouped(nn.functional.avg_pool2d(x, 2)))
        return self.last(x.flatten(1))


def test_chains_settle_with_all_ranges_equal() -> None:
    """Depthwise in the middle, a batch norm's gain counted to the layer before it, groups, 16 pixels a channel."""
    held = captured(Chain(), {"x": IMAGES})
    with torch.no_grad():
        held.weights.put("norm.running_var", torch.rand(8) + 0.5)
    before, w = held.outputs(), held.weights
    notes = equalized(held)
    assert any("3 pairs in" in line for line in notes)
    gain = w["norm.weight"].abs() / (w["norm.running_var"] + 1e-5).sqrt()
    pairs = [
        (rows(w["wide.weight"]) * gain, columns(w["depth.weight"], 8)),
        (rows(w["depth.weight"]), columns(w["grouped.weight"], 2)),
        (rows(w["grouped.weight"]), columns(w["last.weight"].reshape(4, 6, 16))),
    ]
    for one, other in pairs:
        torch.testing.assert_close(one, other, rtol=1e-5, atol=0)
    assert_same(held.outputs(), before)


def test_it_holds_when_run_again_and_with_formats_given() -> None:
    held = captured(Chain(), {"x": IMAGES})
    run_pipeline(held.module, held.weights, "quantize{weights=int8_tensor activations=int8_tensor}")
    equalized(held)
    weights = {name: held.weights[name].clone() for name in held.weights}
    equalized(held)
    for name, tensor in weights.items():
        torch.testing.assert_close(held.weights[name], tensor, rtol=1e-5, atol=0)


def test_one_scale_for_a_tensor_loses_less_where_channels_were_uneven() -> None:
    """What the paper is for: weights in int8, one scale for each tensor."""
    torch.manual_seed(6)
    first, second = nn.Conv2d(3, 16, 3, bias=False), nn.Conv2d(16, 8, 3)
    own, s = nn.Sequential(first, nn.ReLU(), second), torch.linspace(-4, 4, 16).exp()
    with torch.no_grad():
        first.weight.mul_(s[:, None, None, None])
        second.weight.div_(s[:, None, None])
    example, wanted = {"input": IMAGES}, own(IMAGES).detach()
    plain = mxloom.compile(own, weights="int8_tensor", example=example)(IMAGES)
    recipe = {"quantize": [{"weights": "int8_tensor"}], "passes": ["equalize"]}
    better = mxloom.compile(own, recipe, example=example)(IMAGES)
    assert (better - wanted).square().mean() < 0.05 * (plain - wanted).square().mean()


def test_channels_of_zeros_stay() -> None:
    held = captured(Mlp(), {"x": torch.randn(5, 6)})
    first = held.weights["one.weight"].clone()
    first[2] = 0
    held.weights.put("one.weight", first)
    before, second = held.outputs(), held.weights["two.weight"].clone()
    equalized(held)
    assert held.weights["two.weight"][:, 2].equal(second[:, 2])
    assert_same(held.outputs(), before)


class Two(nn.Module):
    """Two layers read what one makes."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.three = nn.Linear(6, 10), nn.Linear(10, 4), nn.Linear(10, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.one(x))
        return torch.cat([self.two(y), self.three(y)], -1)


def test_all_that_read_a_layer_count() -> None:
    held = captured(Two(), {"x": torch.randn(5, 6)})
    before = held.outputs()
    equalized(held, "three")
    joined = torch.cat([held.weights["two.weight"], held.weights["three.weight"]])
    torch.testing.assert_close(rows(held.weights["one.weight"]), columns(joined), rtol=1e-6, atol=0)
    assert_same(held.outputs(), before)


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (torch.sigmoid, "mx.sigmoid"),
        (nn.functional.gelu, "mx.gelu"),
        (nn.functional.relu6, "relu6"),
        (lambda x: torch.relu(x) * x.softmax(-1), "softmax"),
        (lambda x: torch.relu(x) + 1, "adds a number"),
    ],
)
def test_only_functions_that_scale_lie_between(function: Callable[[Tensor], Tensor], reason: str) -> None:
    held = captured(Mlp(function), {"x": torch.randn(5, 6)})
    with pytest.raises(UsageError, match=rf"(?s)equalize: none of 2 groups.*x is an input.*{reason}"):
        equalized(held)


def test_transformers_have_no_pairs_and_say_so() -> None:
    with pytest.raises(UsageError, match=r"(?s)made by .*input_layernorm.*lies between the layers"):
        equalized(model("llama"))
