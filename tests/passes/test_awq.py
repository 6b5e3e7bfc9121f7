"""`awq`: the golden's losses and scale, never worse than without, the float function, clipping behind it."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import mxloom
from mxloom.backends.reference import Interpreter
from mxloom.compiler.driver import run_pipeline
from mxloom.dialects.errors import MxloomError, UsageError
from mxloom.dialects.operations.parameter import ParameterOp
from mxloom.passes._bare import bare
from mxloom.passes._context import CompileContext
from mxloom.passes._smoothing import groups_of
from mxloom.passes._statistics import statistics_of
from mxloom.passes.awq import Awq, Scaled, best_scale, scale_at

from .scaled_models import TOKENS, Captured, assert_same, captured, model

X = torch.tensor([[0.1, 8, 0.2, 0.1], [0.2, -6, 0.1, 0.3]])
W = torch.tensor([[0.9, 0.31, -0.52, 0.11], [0.05, -0.23, 0.77, -0.64]])
LOSSES = {0.0: 0.07297467, 0.25: 0.01506479, 0.5: 0.00067403, 0.75: 0.00339948, 1.0: 0.01069639}
BEST = [0.382603, 2.613676, 0.382603, 0.441792]
"""int4 with one scale a row, absmax / 7; the mean squared error of both outputs over both inputs."""


class One(nn.Module):
    def __init__(self, outputs: int, inputs: int) -> None:
        super().__init__()
        self.linear = nn.Linear(inputs, outputs, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


def searched(weight: Tensor, x: Tensor, format: str, grid: int) -> Scaled:
    """The best scale of one linear that reads the model's input."""
    held = captured(One(*weight.shape), {"x": x})
    held.weights.put("linear.weight", weight)
    run_pipeline(held.module, held.weights, f'quantize{{weights="{format}"}}')
    ctx = CompileContext(weights=held.weights, calibration=lambda _: [[x]])
    (group,) = groups_of(held.module)
    assert group.fold is not None
    return best_scale(group.fold, held.weights, statistics_of(ctx, held.module, "awq", "ranges", "hessian"), grid)


def test_the_losses_and_the_scale_of_the_golden() -> None:
    found = searched(W, X, "int4_channel", 4)
    assert found.errors == pytest.approx(LOSSES, rel=1e-5)
    assert found.alpha == 0.5
    assert found.scale.tolist() == pytest.approx(BEST, rel=2e-6)


def test_the_scale_is_centred_and_leaves_dead_channels() -> None:
    found = scale_at(np.array([4.0, 0.0, 1.0, 16.0]), 0.5)
    assert found.tolist() == pytest.approx([2 / 2, 1, 1 / 2, 4 / 2])
    assert scale_at(np.zeros(3), 0.7).tolist() == [1, 1, 1]
    assert scale_at(np.array([3.0, 5.0]), 0.0).tolist() == [1, 1]


@pytest.mark.parametrize("format", ["mxfp4", "nvfp4", "mxint4", "int4_channel", "int8_tensor", "ternary"])
def test_the_error_is_that_of_the_outputs_and_never_above_that_without(format: str) -> None:
    """Against the outputs themselves, in f64; the least of a grid that holds 0."""
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(24, 64, generator=generator)
    x = torch.randn(50, 64, generator=generator) * torch.linspace(-2, 3, 64).exp()
    found = searched(weight, x, format, 5)
    assert list(found.errors) == [0, 0.2, 0.4, 0.6, 0.8, 1]
    assert found.errors[found.alpha] == min(found.errors.values()) <= found.errors[0]
    for alpha in (0.0, 0.6):
        s = torch.from_numpy(scale_at(x.abs().mean(0).numpy(), alpha))
        rounded = mxloom.fake_quantize((weight * s).float(), format).double()
        lost = x.double() @ (rounded / s - weight.double()).T
        assert found.errors[alpha] == pytest.approx(float(lost.square().mean()), rel=1e-4)


class Normed(nn.Module):
    """A norm whose gain makes some channels large, two linears that read it, and a third behind a product."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.gate, self.up = nn.LayerNorm(32), nn.Linear(32, 48), nn.Linear(32, 48, bias=False)
        self.down = nn.Linear(48, 32)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return self.down(nn.functional.silu(self.gate(y)) * self.up(y))


NORMED_X = torch.randn(64, 32, generator=torch.Generator().manual_seed(2))


def normed() -> Captured:
    held = captured(Normed(), {"x": NORMED_X})
    gain = torch.linspace(-2.5, 2.5, 32).exp()
    held.weights.put("norm.weight", gain)
    return held


def applied(held: Captured, options: Awq, rules: str) -> CompileContext:
    run_pipeline(held.module, held.weights, rules)
    ctx = CompileContext(weights=held.weights, calibration=lambda _: [held.inputs])
    options.apply(ctx, held.module)
    held.module.verify()
    return ctx


def outputs_in_float(held: Captured) -> list[Tensor]:
    """What the module computes without its casts."""
    module, _ = bare(held.module, held.weights)
    return Interpreter(module, held.weights)(*held.inputs)


def error(held: Captured, wanted: list[Tensor]) -> float:
    return float((held.outputs()[0] - wanted[0]).square().mean())


@pytest.mark.parametrize("format", ["int4_channel", "mxfp4", "nvfp4"])
def test_rounding_loses_less_and_with_clipping_less_still(format: str) -> None:
    rules = f"quantize{{weights={format}}}"
    wanted = normed().outputs()
    plain, scaled, clipped = normed(), normed(), normed()
    run_pipeline(plain.module, plain.weights, rules)
    ctx = applied(scaled, Awq(clip=False), rules)
    assert_same(outputs_in_float(scaled), wanted)
    assert not any(line.startswith("awq: left") for line in ctx.notes)
    applied(clipped, Awq(), rules)
    assert error(scaled, wanted) < error(plain, wanted)
    assert error(clipped, wanted) < error(scaled, wanted)


def test_clipping_chooses_by_the_inputs_as_they_are_by_then() -> None:
    """The scales are those that `clip` would choose for a module whose norm and weights are scaled already."""
    held, again = normed(), normed()
    rules = "quantize{weights=int4_channel}"
    applied(held, Awq(), rules)
    applied(again, Awq(clip=False), rules)
    run_pipeline(again.module, again.weights, "clip{metric=hessian}", calibration=lambda _: [again.inputs])
    for name in ("gate.weight", "up.weight", "down.weight"):
        torch.testing.assert_close(again.weights[f"{name}.scales"], held.weights[f"{name}.scales"], rtol=2e-6, atol=0)
    assert_same(held.outputs(), again.outputs())


@pytest.mark.parametrize("name", ["llama_tied", "gemma", "phi3", "gpt2", "bert", "vit", "mixtral"])
def test_the_float_function_stays(name: str) -> None:
    held = model(name)
    before, tied = held.outputs(), held.weights.aliases
    whole = [torch.ones_like(t) if t is TOKENS["attention_mask"] else t for t in held.inputs]
    run_pipeline(held.module, held.weights, "quantize{weights=mxfp4 activations=mxint8}")
    ctx = CompileContext(weights=held.weights, calibration=lambda _: [whole])
    Awq(grid=4, clip=False).apply(ctx, held.module)
    held.module.verify()
    assert_same(outputs_in_float(held), before)
    assert any("1/s into" in line and "alpha" in line for line in ctx.notes)
    assert tied == held.weights.aliases or name == "llama_tied"


class Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 6, 3, groups=2), nn.Conv2d(6, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.third(torch.relu(self.second(torch.relu(self.first(x)))))


def test_convolutions_in_groups_too() -> None:
    held = captured(Convolutions(), {"x": torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(5))})
    wanted = held.outputs()
    plain = captured(Convolutions(), {"x": held.inputs[0]})
    rules = "quantize{weights=int4_channel}"
    run_pipeline(plain.module, plain.weights, rules)
    ctx = applied(held, Awq(), rules)
    assert error(held, wanted) < error(plain, wanted)
    assert [line.split(":")[1].split()[0] for line in ctx.notes if "1/s into" in line] == ["second", "third"]
    assert any(line.startswith("awq: left first") and "x is an input of the model" in line for line in ctx.notes)
    assert any("kept as their rule has them: second.weight" in line for line in ctx.notes)


def _masked(held: Captured) -> list[Tensor]:
    return [held.inputs[0], torch.zeros_like(held.inputs[1])]


@pytest.mark.parametrize(
    ("rules", "options", "inputs", "message"),
    [
        ("", Awq(), lambda held: held.inputs, "no weight has a format yet.* after `quantize`"),
        ("quantize{activations=mxint8}", Awq(), lambda held: held.inputs, "no weight has a format yet"),
        ("quantize{weights=mxfp4}", Awq(match="*.nothing"), lambda held: held.inputs, "matches 0 of 8 modules"),
        ("quantize{weights=mxfp4}", Awq(), _masked, "tokens 0"),
    ],
)
def test_what_has_no_effect_is_refused(
    rules: str, options: Awq, inputs: Callable[[Captured], list[Tensor]], message: str
) -> None:
    held = model("llama")
    run_pipeline(held.module, held.weights, rules)
    ctx = CompileContext(weights=held.weights, calibration=lambda _: [inputs(held)])
    with pytest.raises(MxloomError, match=message):
        options.apply(ctx, held.module)


def test_a_grid_of_no_steps_is_refused() -> None:
    with pytest.raises(UsageError, match="whole number from 1 to 1000, got 0"):
        Awq(grid=0)


def test_nothing_to_fold_is_refused() -> None:
    held = captured(One(4, 8), {"x": torch.randn(3, 8)})
    with pytest.raises(UsageError, match=r"(?s)awq: none of 1 groups.*x is an input of the model"):
        applied(held, Awq(), "quantize{weights=mxfp4}")


def test_a_table_that_the_head_shares_keeps_its_values() -> None:
    held = model("llama_tied")
    name = held.weights.canonical("model.embed_tokens.weight")
    table = held.weights[name].clone()
    applied(held, Awq(grid=2, clip=False), "quantize{match=lm_head weights=int4_channel}")
    assert held.weights[name].equal(table)
    sources = [op.source.data for op in held.module.walk() if isinstance(op, ParameterOp)]
    assert f"{name}.scaled" in sources
