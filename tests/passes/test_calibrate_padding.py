"""`calibrate` leaves padding out of every statistic, and a site that no data reaches is an error (P4, P5)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from mxloom.backends.weight_store import WeightStore
from mxloom.compiler.driver import import_source
from mxloom.compiler.model_source import open_model
from mxloom.dialects.errors import MxloomError
from mxloom.dialects.mx import parse_module
from mxloom.passes._context import CompileContext
from mxloom.passes._observed import plan_of
from mxloom.passes._sites import sites
from mxloom.passes._statistics import Statistics, statistics_of
from mxloom.passes.calibrate import Calibrate

from .calibrated import collected, near, of_text, site_in

TOKENS = """func.func @f(%x: tensor<BxTx2xf32>, %attention_mask: tensor<BxTxi64>) -> tensor<BxTx3xf32> {
  %w = mx.parameter "w" : tensor<3x2xf32>
  %y = mx.linear %x, %w : (tensor<BxTx2xf32>, tensor<3x2xf32>) -> tensor<BxTx3xf32>
  func.return %y : tensor<BxTx3xf32> }"""

# Field case P4: a sequence of three tokens, and one of one token that is padded to three.
X = torch.tensor([[[1.0, 2.0], [3.0, -1.0], [0.0, 1.0]], [[2.0, 2.0], [5.0, 5.0], [5.0, 5.0]]])
MASK = torch.tensor([[1, 1, 1], [1, 0, 0]])
HOLES = torch.tensor([[1, 0, 1, 1], [1, 0, 0, 0]])
W = {"w": torch.tensor([[1.0, 0.5], [-1.0, 2.0], [0.25, 1.0]])}


def text(batch: str, tokens: str) -> str:
    return TOKENS.replace("B", batch).replace("T", tokens)


LAYOUTS: dict[str, tuple[str, Tensor, Tensor]] = {
    "on the right": (text("?", "?"), X, MASK),
    "on the left": (text("?", "?"), X.flip(1), MASK.flip(1)),
    "in the middle": (text("?", "?"), torch.stack([X[[0, 1, 0, 0], [0, 1, 1, 2]], X[1, [0, 1, 1, 1]]]), HOLES),
    "in sizes that are fixed": (text("2", "3"), X, MASK),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_padding_is_in_no_statistic(layout: str) -> None:
    """Over four tokens H = 2 X^T X / 4 = [[7, 1.5], [1.5, 5]], the largest are [3, 2], the mean magnitudes 1.5."""
    module, x, mask = LAYOUTS[layout]
    found, site = of_text(module, W, [x, mask], fisher="kl")
    weight, given = site("y.weight"), site("y.input")
    assert found.hessian(weight).tolist() == [[7.0, 1.5], [1.5, 5.0]]
    assert found.hessian(given).tolist() == [[7.0, 1.5], [1.5, 5.0]]
    inputs = found.inputs(weight)
    assert inputs.rows == 4
    assert inputs.largest.tolist() == [3.0, 2.0]
    assert inputs.mean_magnitude.tolist() == [1.5, 1.5]
    assert (inputs.minimum.tolist(), inputs.maximum.tolist()) == ([0.0, -1.0], [3.0, 2.0])
    assert inputs.percentile(1.0).tolist() == [3.0, 2.0]
    # L = r . y over the tokens that are data: dL/dx = W^T r, so its mean square lies between its extremes over r.
    signs = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0])] * 3)
    squares = (signs @ W["w"]).square()
    assert found.rows("fisher", given) == 4
    assert bool((found.fisher(given) >= squares.amin(0) - 1e-6).all())
    assert bool((found.fisher(given) <= squares.amax(0) + 1e-6).all())
    # The second sequence's one token adds x^2 = 4 (dL/dw = r x^T), the first sequence at most (sum |x|)^2.
    bound = (4 + X[0].abs().sum(0).square()) / 2
    assert bool((found.fisher(weight) <= bound + 1e-6).all())


def test_a_batch_and_its_sequences_one_by_one_are_the_same_to_the_bit() -> None:
    module = text("?", "?")
    batch, site = of_text(module, W, [X, MASK], fisher="kl")
    alone, other = of_text(module, W, [X[:1], MASK[:1]], [X[1:, :1], MASK[1:, :1]], fisher="kl")
    for operand in ("y.weight", "y.input"):
        assert torch.equal(batch.hessian(site(operand)), alone.hessian(other(operand)))
        assert torch.equal(batch.fisher(site(operand)), alone.fisher(other(operand)))
        assert torch.equal(batch.inputs(site(operand)).mean, alone.inputs(other(operand)).mean)


IDS = torch.tensor([[5, 9, 3, 2, 7, 8, 2, 2], [4, 2, 6, 2, 2, 2, 2, 2]])
REAL = torch.tensor([[1, 1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0, 0, 0]])
"""Token 2 ends a text and pads it: the fourth of the second row is real by its length."""


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": 16, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    heads: dict[str, Any] = {"num_attention_heads": 2, "num_key_value_heads": 1, "attn_implementation": "eager"}
    config = transformers.LlamaConfig(**sizes, **heads, pad_token_id=2, eos_token_id=2)
    source = open_model(
        transformers.LlamaForCausalLM(config).eval(), example={"input_ids": IDS, "attention_mask": REAL}
    )
    return import_source(source), source.weights


def same(one: Statistics, other: Statistics, module: Any) -> bool:
    every = [site for site in sites(module) if not site.is_probabilities]
    return all(torch.equal(one.fisher(site), other.fisher(site)) for site in every)


def test_an_end_of_text_is_data_although_it_is_what_pads(model: Any) -> None:
    module, weights = model
    padded = collected(module, weights, [[IDS, REAL]])
    alone = collected(module, weights, [[IDS[:1], REAL[:1]], [IDS[1:, :4], REAL[1:, :4]]])
    site = site_in(module)("model.layers.0.mlp.down_proj.weight")
    assert padded.inputs(site).rows == 8 + 4
    assert torch.equal(padded.hessian(site), alone.hessian(site))
    assert same(padded, alone, module)
    without = collected(module, weights, [[IDS[:1], REAL[:1]], [IDS[1:, :3], REAL[1:, :3]]])
    assert not same(padded, without, module), "the end of the text is predicted, and is a row"


def test_padding_before_a_text_changes_nothing(model: Any) -> None:
    module, weights = model
    before = torch.cat([IDS[1:, 4:], IDS[1:, :4]], 1), torch.cat([REAL[1:, 4:], REAL[1:, :4]], 1)
    assert same(
        collected(module, weights, [list(before)]), collected(module, weights, [[IDS[1:, :4], REAL[1:, :4]]]), module
    )


def test_rows_that_cannot_be_told_to_be_padding_are_refused() -> None:
    """Rows in an order of their own, beside padding that cannot be cut off."""
    module = """func.func @f(%x: tensor<1x3x2xf32>, %attention_mask: tensor<1x3xi64>) -> tensor<6x3xf32> {
      %w = mx.parameter "w" : tensor<3x2xf32>
      %both = mx.concat [%x, %x], dim = 1 : (tensor<1x3x2xf32>, tensor<1x3x2xf32>) -> tensor<1x6x2xf32>
      %rows = mx.reshape %both, shape = [6, 2] : (tensor<1x6x2xf32>) -> tensor<6x2xf32>
      %y = mx.linear %rows, %w : (tensor<6x2xf32>, tensor<3x2xf32>) -> tensor<6x3xf32>
      func.return %y : tensor<6x3xf32> }"""
    with pytest.raises(MxloomError, match=r"y\.input: its rows \[6\] cannot be told to be tokens of \[1, 3\]"):
        of_text(module, W, [X[1:], MASK[1:]], kinds=("hessian",))
    found, site = of_text(module, W, [X[:1], MASK[:1]], kinds=("hessian",))
    rows = X[0].double()
    assert near(found.hessian(site("y.weight")), 2 * rows.T @ rows / 3)


NOTHING = """func.func @f(%x: tensor<?x2xf32>) -> tensor<?x3xf32> {
  %w = mx.parameter "w" : tensor<3x2xf32>
  %seen = mx.linear %x, %w : (tensor<?x2xf32>, tensor<3x2xf32>) -> tensor<?x3xf32>
  %none = mx.slice %x, start = 0, end = 0 : (tensor<?x2xf32>) -> tensor<?x2xf32>
  %v = mx.parameter "v" : tensor<3x2xf32>
  %unseen = mx.linear %none, %v : (tensor<?x2xf32>, tensor<3x2xf32>) -> tensor<?x3xf32>
  %all = mx.concat [%seen, %unseen] : (tensor<?x3xf32>, tensor<?x3xf32>) -> tensor<?x3xf32>
  func.return %all : tensor<?x3xf32> }"""


@pytest.mark.parametrize("kind", ["ranges", "hessian", "fisher"])
def test_a_site_that_is_reached_0_times_is_an_error(kind: str) -> None:
    module = parse_module(NOTHING)
    weights = WeightStore.from_state_dict({"w": W["w"], "v": W["w"] + 1})
    ctx = CompileContext(weights=weights, calibration=lambda samples: [[X[0]]])
    with pytest.raises(MxloomError, match=r"unseen\.input was reached 0 times in calibration \(tokens 0\)"):
        Calibrate(kinds=(kind,)).apply(ctx, module)
    found, site = statistics_of(ctx, module, "clip", kind), site_in(module)
    ask = {"ranges": found.inputs, "hessian": found.hessian, "fisher": found.fisher}[kind]
    ask(site("seen.weight"))
    if kind == "fisher":
        assert not found.fisher(site("unseen.weight")).any()
        with pytest.raises(MxloomError, match=r"unseen\.input was reached 0 times in calibration \(tokens 0\)"):
            ask(site("unseen.input"))
        return
    with pytest.raises(MxloomError, match=r"unseen\.weight was reached 0 times in calibration \(tokens 0\)"):
        ask(site("unseen.weight"))


def test_a_sequence_without_data_is_an_error() -> None:
    with pytest.raises(MxloomError, match="calibration input 1: its attention_mask is 0 everywhere"):
        of_text(text("?", "?"), W, [X[:1], MASK[:1]], [X[1:], 0 * MASK[1:]])


def test_what_is_observed_is_named_once_for_each_value() -> None:
    plan = plan_of(parse_module(text("?", "?")))
    assert list(plan.values) == list(plan.products) == ["y.input"]
    assert list(plan.gradients) == ["y.input", "y.weight"]
