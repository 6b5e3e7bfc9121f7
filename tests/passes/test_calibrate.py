"""`calibrate` on small modules: formulas in f64, what is wrong or missing, what passes share."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import mxloom
from mxloom.backends.weight_store import WeightStore
from mxloom.dialects.errors import MxloomError, UsageError
from mxloom.dialects.mx import parse_module
from mxloom.passes._context import CompileContext
from mxloom.passes._sites import sites
from mxloom.passes._statistics import forget, statistics_of
from mxloom.passes.calibrate import Calibrate

from .calibrated import collected, near, of_text, random, site_in


def test_an_output_that_is_no_logits_is_projected_on_signs() -> None:
    """y = W x and L = r . y with r = +-1: dL/dW = r x^T, whose squares are x^2 in every row whatever r is."""
    text = """func.func @f(%x: tensor<?x6xf32>) -> tensor<?x4xf32> {
      %w = mx.parameter "w" : tensor<4x6xf32>
      %y = mx.linear %x, %w : (tensor<?x6xf32>, tensor<4x6xf32>) -> tensor<?x4xf32>
      func.return %y : tensor<?x4xf32> }"""
    x, w = random(7, 6), random(4, 6, seed=1)
    found, site = of_text(text, {"w": w}, [x], fisher="kl")
    assert near(found.fisher(site("y.weight")), x.double().square().mean(0).expand(4, 6))
    assert found.samples == 7


def test_of_outputs_without_logits_all_are_projected() -> None:
    text = """func.func @f(%x: tensor<?x6xf32>) -> (tensor<?x4xf32>, tensor<?x2xf32>) {
      %v = mx.parameter "v" : tensor<4x6xf32>
      %y = mx.linear %x, %v : (tensor<?x6xf32>, tensor<4x6xf32>) -> tensor<?x4xf32>
      %w = mx.parameter "w" : tensor<2x6xf32>
      %z = mx.linear %x, %w : (tensor<?x6xf32>, tensor<2x6xf32>) -> tensor<?x2xf32>
      func.return %y, %z : tensor<?x4xf32>, tensor<?x2xf32> }"""
    x = random(7, 6)
    found, site = of_text(text, {"v": random(4, 6), "w": random(2, 6)}, [x])
    for name, rows in (("y.weight", 4), ("z.weight", 2)):
        assert near(found.fisher(site(name)), x.double().square().mean(0).expand(rows, 6))


def test_drawn_labels_have_the_curvature_of_the_divergence() -> None:
    """E over labels of (p - onehot)^2 x^2 = p (1 - p) x^2, the diagonal of the Hessian of KL in W (softmax of W x)."""
    text = """func.func @f(%x: tensor<?x3xf32>) -> tensor<?x5xf32> attributes {outputs = ["logits"]} {
      %w = mx.parameter "w" : tensor<5x3xf32>
      %y = mx.linear %x, %w : (tensor<?x3xf32>, tensor<5x3xf32>) -> tensor<?x5xf32>
      func.return %y : tensor<?x5xf32> }"""
    x, w = random(1, 3).expand(600, 3).contiguous(), 0.3 * random(5, 3, seed=1)
    found, site = of_text(text, {"w": w}, [x], kinds=("fisher",))
    p = (w.double() @ x[0].double()).softmax(0)
    wanted = (p * (1 - p))[:, None] * x[0].double().square()
    # The mean of 600 draws is off by 1/sqrt(600 p) of itself or so: the rarest label has p > .1.
    assert p.min() > 0.1
    assert bool(((found.fisher(site("y.weight")) - wanted).abs() <= 0.4 * wanted).all())


EXPERTS = """func.func @f(%x: tensor<?x3xf32>, %i: tensor<?xi64>) -> tensor<?x2xf32> {
  %w = mx.parameter "w" : tensor<4x2x3xf32>
  %y = mx.expert_linear %x, %w, %i : (tensor<?x3xf32>, tensor<4x2x3xf32>, tensor<?xi64>) -> tensor<?x2xf32>
  func.return %y : tensor<?x2xf32> }"""


def test_experts_have_statistics_of_their_own_rows() -> None:
    x, w, index = random(9, 3), random(4, 2, 3, seed=1), torch.tensor([0, 2, 2, 0, 1, 2, 0, 1, 2])
    found, site = of_text(EXPERTS, {"w": w}, [x, index], fisher="kl")
    hessian, fisher = found.hessian(site("y.weight")), found.fisher(site("y.weight"))
    assert hessian.shape == (4, 3, 3) and fisher.shape == (4, 2, 3)
    assert found.hessian_rows(site("y.weight")).tolist() == [3, 2, 4, 0]
    for expert in range(3):
        rows = x[index == expert].double()
        assert near(hessian[expert], 2 * rows.T @ rows / len(rows))
        assert near(fisher[expert], (rows.square().sum(0) / 9).expand(2, 3))  # signs, as above; 9 sequences of one row
    assert not hessian[3].any() and not fisher[3].any(), "nobody went to the last expert"
    assert found.inputs(site("y.input")).rows == 9


def test_attention_has_statistics_of_each_head() -> None:
    text = """!q = tensor<?x2x?x3xf32>
    func.func @f(%q: !q, %k: !q, %v: !q) -> !q {
      %y = mx.attention %q, %k, %v, scale = 1.0, causal : (!q, !q, !q) -> !q
      func.return %y : !q }"""
    q, k, v = (random(2, 2, 4, 3, seed=seed) for seed in range(3))
    found, site = of_text(text, {}, [q, k, v], kinds=("ranges", "fisher"), fisher="kl")
    for operand, tensor in (("query", q), ("key", k), ("value", v)):
        inputs = found.inputs(site(f"y.{operand}"))
        assert inputs.rows == 8
        assert torch.equal(inputs.largest, tensor.abs().amax((0, 2)))
        assert near(inputs.mean_square, tensor.double().square().mean((0, 2)))
        assert found.fisher(site(f"y.{operand}")).shape == (2, 3)


def test_percentiles_and_outliers() -> None:
    text = """func.func @f(%x: tensor<?x4xf32>) -> tensor<?x2xf32> {
      %w = mx.parameter "w" : tensor<2x4xf32>
      %y = mx.linear %x, %w : (tensor<?x4xf32>, tensor<2x4xf32>) -> tensor<?x2xf32>
      func.return %y : tensor<?x2xf32> }"""
    x = random(1000, 4) * torch.tensor([1.0, 0.2, 16.0, 3.0])
    x[:, 3] = x[:, 3].abs()
    parts = [[part] for part in x.split(250)]
    found, site = of_text(text, {"w": random(2, 4)}, *parts, kinds=("ranges",), shard=250)
    inputs = found.inputs(site("y.input"))
    for share in (0.5, 0.9, 0.99, 1.0):
        exact = x.abs().quantile(share, dim=0)
        assert bool(((inputs.percentile(share) - exact).abs() <= exact / 4).all())
        whole = x.abs().flatten().quantile(share).item()
        assert abs(inputs.tensor_percentile(share) - whole) <= whole / 64
    low, high = inputs.tensor_range(0.9)
    assert low == pytest.approx(x.flatten().quantile(0.05).item(), rel=1 / 32)
    assert high == pytest.approx(x.flatten().quantile(0.95).item(), rel=1 / 32)
    assert torch.equal(inputs.percentile(1.0), x.abs().amax(0))
    largest = x.abs().amax(0)
    assert sorted(inputs.outliers.tolist()) == [c for c in range(4) if largest[c] > largest.max() / 8] == [2, 3]
    assert inputs.outliers[0] == 2
    with pytest.raises(UsageError, match=r"a share of values is 0 to 1, got 1\.5"):
        inputs.percentile(1.5)


def test_emulated_gradients_pass_straight_through_casts() -> None:
    """y = Q(W) Q(x) with signs r: dL/dQ(W) = r Q(x)^T, so squares of the rounded input; ranges are of x itself."""
    text = """func.func @f(%x: tensor<?x32xf32>) -> tensor<?x4xf32> {
      %w = mx.parameter "w" : tensor<4x32xf32>
      %y = mx.linear %x, %w : (tensor<?x32xf32>, tensor<4x32xf32>) -> tensor<?x4xf32>
      func.return %y : tensor<?x4xf32> }"""
    x, w = random(6, 32), random(4, 32, seed=1)
    module = parse_module(text)
    for site in sites(module):
        site.retype("mxfp4")
    found = collected(module, WeightStore.from_state_dict({"w": w}), [[x]], numerics="emulated")
    weight, given = (site_in(module)(f"y.{operand}") for operand in ("weight", "input"))
    rounded = mxloom.fake_quantize(x, "mxfp4").double()
    assert near(found.fisher(weight), rounded.square().mean(0).expand(4, 32))
    assert torch.equal(found.inputs(given).largest, x.abs().amax(0))
    assert found.fisher(given).shape == (32,) and bool((found.fisher(given) > 0).any())


LINEAR = """func.func @f(%x: tensor<?x2xf32>) -> tensor<?x2xf32> {
  %w = mx.parameter "w" : tensor<2x2xf32>
  %layer = mx.linear %x, %w : (tensor<?x2xf32>, tensor<2x2xf32>) -> tensor<?x2xf32>
  %root = mx.aten "aten.sqrt.default"(%layer) {self} : (tensor<?x2xf32>) -> tensor<?x2xf32>
  func.return %root : tensor<?x2xf32> }"""


def test_values_and_gradients_that_are_no_numbers_name_their_site() -> None:
    one = torch.ones(3, 2)
    with pytest.raises(MxloomError, match=r"layer\.weight: 4 of 4 squared gradients are NaN or infinite"):
        of_text(LINEAR, {"w": torch.zeros(2, 2)}, [one], kinds=("fisher",))  # the root of 0 has no derivative
    with pytest.raises(MxloomError, match="calibration input 0: 6 of 6 values of x are NaN or infinite"):
        of_text(LINEAR, {"w": torch.ones(2, 2)}, [one / 0], kinds=("ranges",))
    double = LINEAR.replace(
        "func.return %root",
        """%last = mx.linear %root, %w : (tensor<?x2xf32>, tensor<2x2xf32>) -> tensor<?x2xf32>
  func.return %last""",
    )
    with pytest.raises(MxloomError, match=r"last\.input: 2 of 2 values are NaN or infinite"):
        of_text(double, {"w": -torch.ones(2, 2)}, [one], kinds=("ranges",))


def test_passes_collect_once_what_they_share_and_again_what_was_forgotten() -> None:
    module = parse_module(LINEAR)
    asked: list[int] = []

    def calibration(samples: int) -> list[list[Tensor]]:
        asked.append(samples)
        return [[torch.ones(3, 2)]]

    weights = WeightStore.from_state_dict({"w": torch.ones(2, 2)})
    ctx = CompileContext(weights=weights, calibration=calibration, samples=7)
    first = statistics_of(ctx, module, "one", "hessian")
    assert statistics_of(ctx, module, "two", "hessian") is first and asked == [7]
    both = statistics_of(ctx, module, "two", "ranges")
    assert both.kinds == {"hessian", "ranges"} and asked == [7, 7]
    assert both.parts["hessian"] is first.parts["hessian"], "what is there is not collected again"
    assert statistics_of(ctx, module, "three", "ranges", "hessian") is both
    drawn = statistics_of(ctx, module, "three", "fisher", fisher="kl")
    assert drawn.loss == "kl" and drawn.kinds == {"hessian", "ranges", "fisher"}
    assert statistics_of(ctx, module, "three", "fisher", fisher="kl") is drawn
    forget(ctx)
    assert statistics_of(ctx, module, "four", "ranges") is not both
    other = module.clone()
    assert statistics_of(ctx, other, "five", "ranges").holds(other, ["ranges"])
    with pytest.raises(MxloomError, match=r"layer\.weight is no site of the module that these statistics are of"):
        both.hessian(site_in(other)("layer.weight"))


def test_what_was_not_collected_or_cannot_be_is_said() -> None:
    weights = {"w": torch.ones(2, 2)}
    found, site = of_text(LINEAR, weights, [torch.ones(3, 2)], kinds=("ranges",))
    with pytest.raises(MxloomError, match=r"layer\.weight: hessian was not collected; these were: ranges"):
        found.hessian(site("layer.weight"))
    module = parse_module(LINEAR)
    with pytest.raises(UsageError, match="the pass 'gptq' measures the ranges of values, and there are no inputs"):
        statistics_of(CompileContext(weights=WeightStore.from_state_dict(weights)), module, "gptq", "hessian")
    with pytest.raises(UsageError, match="fisher=loss needs labels, and only a causal language model finds them"):
        of_text(LINEAR, weights, [torch.ones(3, 2)], fisher="loss")
    for options, told in {
        ("kinds", ("rangs",)): "unknown kind 'rangs' (did you mean \"ranges\"?)",
        ("fisher", "los"): "unknown fisher 'los' (did you mean \"loss\"?)",
        ("numerics", "f32"): "unknown numerics 'f32'",
        ("samples", 0): "samples is a whole number of 1 or more, got 0",
        ("shard", 0): "shard is a whole number of 1 or more, got 0",
        ("only", (0,)): "only has no effect without save",
    }.items():
        with pytest.raises(UsageError) as caught:
            Calibrate(**dict([options]))  # type: ignore[arg-type]
        assert told in str(caught.value)


def test_too_few_rows_for_a_hessian_are_noted() -> None:
    module = parse_module(LINEAR)
    ctx = CompileContext(weights=WeightStore.from_state_dict({"w": torch.ones(2, 2)}))
    ctx.calibration = lambda samples: [[torch.ones(1, 2)]]
    statistics_of(ctx, module, "gptq", "hessian")
    assert ctx.notes == [
        "gptq: the Hessian of layer.input rests on 1 rows for 2 columns: it has no full rank, and what is solved with "
        "it is damped; more calibration samples mend that"
    ]
