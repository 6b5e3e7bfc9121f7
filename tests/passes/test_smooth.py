"""`smooth`: SmoothQuant's scales, folded or at run time; the float function stays, its rounding gets better."""

from __future__ import annotations

from typing import cast

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from xdsl.ir import TypeAttribute

import mxloom
from mxloom.compiler.artefact import load, save
from mxloom.compiler.compiled import Compiled
from mxloom.compiler.driver import run_pipeline
from mxloom.dialects.errors import MxloomError, UsageError
from mxloom.dialects.formats import encode_tensor
from mxloom.passes._context import CompileContext
from mxloom.passes._given import narrow_weights, set_given, wide_weight
from mxloom.passes.smooth import Smooth, smoothing

from .scaled_models import TOKENS, assert_same, model

X = [[1.0, -16, 2, 6], [-2, 8, -1, -9]]
W = [[2.0, 1, -2], [1, -1, -1], [2, -1, -2], [-1, -1, 1]]
"""SmoothQuant, arXiv 2211.10438, figure 5: inputs, and weights [in, out]; s = [1, 4, 1, 3]."""

BOTH = {"weights": "mxint8", "activations": "mxint8"}


class One(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3, bias=False)
        self.linear.weight.data = torch.tensor(W).T.contiguous()

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


def compiled(own: nn.Module, x: Tensor, passes: str, rules: list[dict[str, str]] | None = None) -> Compiled:
    recipe = {"quantize": rules, "passes": [passes]} if rules else {"passes": [passes]}
    return mxloom.compile(own, recipe, example={"x": x}, calibration=[{"x": row[None]} for row in x])


def test_the_scales_of_the_paper() -> None:
    found = smoothing(np.abs(X).max(0), np.abs(W).max(1), 0.5)
    assert found.tolist() == [1, 4, 1, 3]


def test_the_scales_of_the_paper_through_the_pass_and_its_statistics() -> None:
    made = compiled(One(), torch.tensor(X), "smooth{online=true}", [BOTH])
    assert made.weights["linear.weight"].T.tolist() == (torch.tensor(W) * torch.tensor([[1.0], [4], [1], [3]])).tolist()
    assert made.weights["linear.weight.input_scale"].tolist() == [[1, 0.25, 1, pytest.approx(1 / 3)]]
    assert ".scaled_input" in str(made.module)


def test_other_strengths_dead_channels_and_powers_of_two() -> None:
    x, w = np.array([8.0, 0, 3, 2]), np.array([2.0, 5, 0, 0.5])
    assert smoothing(x, w, 0.75).tolist() == pytest.approx([8**0.75 / 2**0.25, 1, 1, 2**0.75 / 0.5**0.25])
    assert smoothing(x, w, 0.0).tolist() == [0.5, 1, 1, 2]
    assert smoothing(x, w, 1.0).tolist() == [8, 1, 1, 2]
    assert smoothing(np.array([5.0, 6, 0.3]), np.ones(3), 1.0, power_of_two=True).tolist() == [4, 8, 0.25]


class Normed(nn.Module):
    """A norm whose gain makes two channels outliers, and three linears that read it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm = nn.LayerNorm(32)
        with torch.no_grad():
            self.norm.weight[3], self.norm.weight[17] = 60.0, -35.0
            self.norm.bias.normal_()
        self.q, self.k, self.v = nn.Linear(32, 32), nn.Linear(32, 16, bias=False), nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return torch.cat([self.q(y), self.k(y), self.v(y)], -1)


NORMED_X = torch.randn(40, 32, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("alpha", [0.3, 0.5, 0.9])
def test_the_formula_over_all_readers_and_the_folded_norm(alpha: float) -> None:
    own = Normed()
    made = compiled(own, NORMED_X, f"smooth{{alpha={alpha}}}")
    y = own.norm(NORMED_X).detach().double()
    joined = torch.cat([own.q.weight, own.k.weight, own.v.weight]).detach().double()
    s = y.abs().amax(0) ** alpha / joined.abs().amax(0) ** (1 - alpha)
    for name, tensor, factor in [
        ("norm.weight", own.norm.weight, 1 / s),
        ("norm.bias", own.norm.bias, 1 / s),
        ("q.weight", own.q.weight, s),
        ("k.weight", own.k.weight, s),
    ]:
        torch.testing.assert_close(made.weights[name].double(), tensor.detach().double() * factor, rtol=2e-6, atol=0)
    assert made.weights["q.bias"].equal(own.q.bias)
    assert_same([made(NORMED_X)], [own(NORMED_X).detach()])


def test_powers_of_two_change_no_bit_of_the_float_function() -> None:
    own = Normed()
    made = compiled(own, NORMED_X, "smooth{power_of_two=true}")
    assert made(NORMED_X).equal(own(NORMED_X))
    assert not made.weights["q.weight"].equal(own.q.weight)


def test_rounding_loses_less_behind_outliers() -> None:
    """int8 with one scale a tensor: the outliers' scale is far too coarse for the other channels."""
    own, rules = Normed(), [{"weights": "int8_tensor", "activations": "int8_tensor"}]
    wanted = own(NORMED_X).detach()
    plain = mxloom.compile(own, {"quantize": rules}, example={"x": NORMED_X})(NORMED_X)
    smoothed = compiled(own, NORMED_X, "smooth", rules)(NORMED_X)
    assert (smoothed - wanted).square().mean() < 0.5 * (plain - wanted).square().mean()


@pytest.mark.parametrize("name", ["llama_tied", "gemma", "gpt2", "gpt_neox", "bert", "vit", "mixtral"])
@pytest.mark.parametrize("options", [Smooth(), Smooth(online=True, alpha=0.8)])
def test_the_float_function_stays(name: str, options: Smooth) -> None:
    held = model(name)
    before = held.outputs()
    whole = [torch.ones_like(t) if t is TOKENS["attention_mask"] else t for t in held.inputs]
    ctx = CompileContext(weights=held.weights, calibration=lambda _: [whole])
    options.apply(ctx, held.module)
    held.module.verify()
    assert_same(held.outputs(), before)
    left = [line for line in ctx.notes if line.startswith("smooth: left")]
    assert any("1/s into" in line for line in ctx.notes)
    assert bool(left) == (not options.online and name in ("gpt2", "gpt_neox", "bert", "vit"))
    assert all("% of MACs): " in line and "online=true" in line for line in left)


def test_only_groups_that_are_rounded_and_matched_are_smoothed() -> None:
    rules = [{"match": "lm_head", "keep": "f32"}, {"weights": "mxfp4", "activations": "mxint8"}]
    held = model("llama")
    recipe = {"quantize": rules, "passes": ['smooth{match="*layers.0*"}']}
    made = mxloom.compile(held.source, recipe, calibration=[TOKENS])
    kept = [name for name in held.weights if made.weights[name].equal(held.weights[name])]
    assert {"lm_head.weight", "model.norm.weight", "model.embed_tokens.weight"} <= set(kept)
    assert "model.layers.0.input_layernorm.weight" not in kept
    with pytest.raises(UsageError, match=r"(?s)none of 1 groups .*lm_head .*: nothing there is rounded"):
        mxloom.compile(held.source, {**recipe, "passes": ["smooth{match=lm_head}"]}, calibration=[TOKENS])


@pytest.mark.parametrize(
    ("passes", "message"),
    [
        ("smooth", r"(?s)none of 1 groups of contractions can be scaled:.*linear \(100.0% of MACs\): x is an input"),
        ("smooth{alpha=1.5}", "alpha is a number from 0 to 1, got 1.5"),
        ("smooth{match=third}", "'third' matches 0 of 1 modules"),
    ],
)
def test_a_pass_that_would_do_nothing_is_refused(passes: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        compiled(One(), torch.tensor(X), passes, [BOTH])


def test_without_data_it_is_refused() -> None:
    held = model("llama")
    with pytest.raises(UsageError, match="'smooth'"):
        Smooth().apply(CompileContext(weights=held.weights), held.module)
    with pytest.raises(UsageError, match="'smooth' reads weights"):
        Smooth().apply(CompileContext(), held.module)


def test_no_token_of_data_is_an_error() -> None:
    """Field case P5."""
    held = model("llama")
    nothing = [held.inputs[0], torch.zeros_like(held.inputs[1])]
    ctx = CompileContext(weights=held.weights, calibration=lambda _: [nothing])
    with pytest.raises(MxloomError, match="tokens 0"):
        Smooth().apply(ctx, held.module)


def test_decided_codes_come_later() -> None:
    """Where a pass has chosen scales or codes, a smoothing scale would have to be rounded into them again."""
    held = model("llama")
    run_pipeline(held.module, held.weights, "quantize{weights=nvfp4 activations=mxint8}")
    for site in narrow_weights(held.module):
        set_given(site, held.weights, encode_tensor(wide_weight(site, held.weights), cast(TypeAttribute, site.format)))
    ctx = CompileContext(weights=held.weights, calibration=lambda _: [held.inputs])
    with pytest.raises(UsageError, match="passes that choose codes or scales come later"):
        Smooth(online=True).apply(ctx, held.module)


def test_what_is_saved_is_loaded(tmp_path) -> None:
    """Norms, a copied table, products at run time: all parts of an artefact."""
    held = model("llama_tied")
    held.source.loaded().save_pretrained(tmp_path / "own")
    recipe = {"quantize": [BOTH], "passes": ["smooth{online=true}"]}
    made = mxloom.compile(tmp_path / "own", recipe, calibration=[TOKENS])
    assert "model.embed_tokens.weight.smoothed" in str(made.module)
    again = load(save(made, tmp_path / "a"))
    assert again(**TOKENS).logits.equal(made(**TOKENS).logits)


def test_hugging_face_models_have_the_folded_scales_and_no_products_between_modules() -> None:
    made = mxloom.compile(model("llama_tied").source, {"quantize": [BOTH], "passes": ["smooth"]}, calibration=[TOKENS])
    with torch.no_grad():
        logits = made.to_hf()(**TOKENS, use_cache=False).logits
    assert logits.equal(made(**TOKENS).logits)
    recipe = {"quantize": [BOTH], "passes": ["smooth{online=true}"]}
    made = mxloom.compile(model("gpt2").source, recipe, calibration=[TOKENS])
    with pytest.raises(MxloomError, match=r"c_proj\.weight\.input_scale, which a pass made, is read by mx\.mul"):
        made.to_hf()
