"""`correct-bias`: over the calibration inputs the mean of each output is what it was before weights were rounded."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import mxloom
from mxloom.backends.reference import Interpreter
from mxloom.compiler.artefact import load, save
from mxloom.compiler.driver import run_pipeline
from mxloom.dialects.errors import MxloomError, UsageError
from mxloom.passes._context import CompileContext
from mxloom.passes.correct_bias import CorrectBias

from .scaled_models import TOKENS, Captured, captured, model


def corrected(held: Captured, rules: str, batches: list[Tensor], match: str = "*") -> CompileContext:
    """The module with formats and corrected biases; each batch is one calibration input."""
    run_pipeline(held.module, held.weights, rules, calibration=lambda _: [[batch] for batch in batches])
    ctx = CompileContext(weights=held.weights, calibration=lambda _: [[batch] for batch in batches])
    CorrectBias(match).apply(ctx, held.module)
    held.module.verify()
    return ctx


class Layer(nn.Module):
    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.linear = nn.Linear(64, 24, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


def shifted(*shape: int) -> Tensor:
    """Inputs with a mean of their own in each channel."""
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(*shape, generator=generator)
    middle = torch.randn(shape[1] if len(shape) == 4 else shape[-1], generator=generator)
    return x + (middle[:, None, None] if len(shape) == 4 else middle)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    "rules", ["quantize{weights=mxfp4}", "quantize{weights=int4_channel},clip", "quantize{weights=ternary}"]
)
def test_the_mean_error_of_a_linear_layer_is_0(rules: str, bias: bool) -> None:
    """Whoever has chosen the codes, over all inputs together, in batches of different lengths."""
    x = shifted(60, 64)
    held = captured(Layer(bias), {"x": x})
    wanted = held.outputs([x])[0]
    run_pipeline(plain := held.module.clone(), weights := held.weights.copy(), rules)
    before = (Interpreter(plain, weights)(x)[0] - wanted).mean(0)
    corrected(held, rules, [x[:40], x[40:]])
    after = (held.outputs([x])[0] - wanted).mean(0)
    assert before.abs().max() > 0.05
    assert after.abs().max() < 1e-5
    assert ("linear.weight.bias" in held.names()) == (not bias)


class Convolution(nn.Module):
    def __init__(self, kernel: int, groups: int = 1, padding: int = 0, stride: int = 1, bias: bool = True) -> None:
        super().__init__()
        self.conv = nn.Conv2d(6, 12, kernel, groups=groups, padding=padding, stride=stride, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


@pytest.mark.parametrize("groups", [1, 2])
def test_the_mean_error_of_a_convolution_of_one_pixel_is_0(groups: int) -> None:
    x = shifted(5, 6, 7, 7)
    held = captured(Convolution(1, groups, bias=False), {"x": x})
    wanted = held.outputs()[0]
    corrected(held, "quantize{weights=int4_channel}", [x])
    assert (held.outputs()[0] - wanted).mean((0, 2, 3)).abs().max() < 1e-5


@pytest.mark.parametrize(("padding", "stride", "groups"), [(0, 1, 1), (1, 1, 1), (2, 1, 2), (1, 2, 3), (0, 3, 6)])
def test_windows_see_the_mean_of_a_channel_wherever_they_lie_on_the_image(
    padding: int, stride: int, groups: int
) -> None:
    """Exact for images of one colour: padding included, by what torch's own convolution makes of them."""
    own = Convolution(3, groups, padding, stride)
    x = shifted(1, 6, 1, 1).expand(2, 6, 9, 9).contiguous()
    held = captured(own, {"x": x})
    wanted = held.outputs()[0]
    corrected(held, "quantize{weights=int4_channel}", [x])
    assert (held.outputs()[0] - wanted).mean((0, 2, 3)).abs().max() < 1e-5


def test_the_formula_of_the_paper_for_windows_without_padding() -> None:
    """b + sum over channels of E[x_c] times the sum of the kernel's error, f64."""
    x = shifted(4, 6, 8, 8)
    held = captured(Convolution(3), {"x": x})
    weight, bias = held.weights["conv.weight"].double(), held.weights["conv.bias"].double()
    corrected(held, "quantize{weights=int4_channel}", [x])
    rounded = mxloom.fake_quantize(weight.float().flatten(1), "int4_channel").reshape(weight.shape).double()
    wanted = bias + (weight - rounded).sum((2, 3)) @ x.double().mean((0, 2, 3))
    torch.testing.assert_close(held.weights["conv.bias"].double(), wanted, rtol=1e-6, atol=1e-7)


class Shared(nn.Module):
    """One bias for two layers, one of them rounded."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(8, 8), nn.Linear(8, 8)
        self.two.bias = self.one.bias

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.one(x), self.two(x)], -1)


def test_a_bias_with_another_reader_stays() -> None:
    x = shifted(30, 8)
    held = captured(Shared(), {"x": x})
    wanted = held.outputs()[0]
    corrected(held, "quantize{match=two weights=mxfp4}", [x])
    found = held.outputs()[0]
    assert found[:, :8].equal(wanted[:, :8])
    assert (found - wanted).mean(0).abs().max() < 1e-5
    assert "one.bias.corrected" in held.names()


def test_every_layer_of_a_model_is_corrected_for_its_own_inputs() -> None:
    """Perplexity aside: the mean of all logits, over tokens, comes nearer."""
    held = model("gpt2")
    whole = [held.inputs[0], torch.ones_like(held.inputs[1])]
    wanted = held.outputs(whole)[0].mean((0, 1))
    run_pipeline(held.module, held.weights, "quantize{weights=mxfp4}")
    before = held.outputs(whole)[0].mean((0, 1)) - wanted
    ctx = CompileContext(weights=held.weights, calibration=lambda _: [whole])
    CorrectBias().apply(ctx, held.module)
    after = held.outputs(whole)[0].mean((0, 1)) - wanted
    assert after.square().mean() < 0.25 * before.square().mean()
    assert ctx.notes == ["correct-bias: 5 biases corrected, 1 of them new"]


def test_experts_keep_their_biases_and_it_is_told() -> None:
    held = model("mixtral")
    whole = [held.inputs[0], torch.ones_like(held.inputs[1])]
    run_pipeline(held.module, held.weights, "quantize{weights=mxfp4}")
    ctx = CompileContext(weights=held.weights, calibration=lambda _: [whole])
    CorrectBias().apply(ctx, held.module)
    left = [line for line in ctx.notes if "left" in line]
    assert len(left) == 2
    assert all("experts" in line and "which tokens reach an expert" in line for line in left)


@pytest.mark.parametrize(
    ("rules", "match", "message"),
    [
        ("", "*", "no weight has a format yet"),
        ("quantize{activations=mxint8}", "*", "no weight has a format yet"),
        ("quantize{weights=mxfp4}", "third", "'third' matches no rounded weight"),
        ('quantize{match="*experts*" weights=mxfp4}', "*", "(?s)none of 2 rounded weights has a bias.*which tokens"),
    ],
)
def test_what_has_no_effect_is_refused(rules: str, match: str, message: str) -> None:
    held = model("mixtral" if "experts" in rules else "llama")
    run_pipeline(held.module, held.weights, rules)
    ctx = CompileContext(weights=held.weights, calibration=lambda _: [held.inputs])
    with pytest.raises(UsageError, match=message):
        CorrectBias(match).apply(ctx, held.module)


def test_without_a_token_of_data_it_is_refused() -> None:
    """Field case P5."""
    held = model("llama")
    run_pipeline(held.module, held.weights, "quantize{weights=mxfp4}")
    ctx = CompileContext(weights=held.weights, calibration=lambda _: [[held.inputs[0], 0 * held.inputs[1]]])
    with pytest.raises(MxloomError, match="tokens 0"):
        CorrectBias().apply(ctx, held.module)


def test_what_is_saved_is_loaded_and_hugging_face_models_have_it(tmp_path) -> None:
    held = model("llama")
    held.source.loaded().save_pretrained(tmp_path / "own")
    recipe = {"quantize": [{"weights": "int4_channel", "activations": "mxint8"}], "passes": ["clip,correct-bias"]}
    made = mxloom.compile(tmp_path / "own", recipe, calibration=[{"input_ids": TOKENS["input_ids"]}])
    again = load(save(made, tmp_path / "a"))
    assert "lm_head.weight.bias" in str(again.module)
    logits = made(**TOKENS).logits
    assert again(**TOKENS).logits.equal(logits)
    with torch.no_grad():
        assert made.to_hf()(**TOKENS, use_cache=False).logits.equal(logits)
