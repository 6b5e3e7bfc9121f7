"""`clip`: each metric's error, measured here, is nowhere above that of the rule's scale; what it refuses."""

# pyright: reportOptionalMemberAccess=false, reportAttributeAccessIssue=false, reportArgumentType=false
# pyright: reportOptionalSubscript=false, reportOptionalOperand=false

import pytest
import torch
from torch import nn

from mxloom.dialects.errors import UsageError
from mxloom.dialects.formats import Rounding, quantize
from mxloom.dialects.operations.cast import CastOp
from mxloom.passes._given import given_encoding, narrow_weights, wide_weight

from .small_models import Mlp, correlated, prepared, run

INPUTS = [[correlated(16, 64, seed)] for seed in range(24)]


def _prepared(pipeline: str):
    torch.manual_seed(0)
    return prepared(Mlp(), {"x": torch.randn(2, 64)}, INPUTS, pipeline)


@pytest.mark.parametrize("format", ["nvfp4", "mxint4", "int4_g32_affine", "int4_channel"])
@pytest.mark.parametrize("metric", ["output", "hessian"])
def test_never_worse_in_its_own_metric_block_by_block(format: str, metric: str):
    module, context = _prepared(f"quantize{{weights={format}}},clip{{metric={metric}}}")
    first, second = narrow_weights(module)
    hidden = torch.cat([x for (x,) in INPUTS])
    weight, bias = context.weights.wide("first.weight.wide"), context.weights.wide("first.bias")
    inputs = {"first": hidden, "second": nn.functional.silu(hidden @ weight.T + bias)}
    assert "blocks in 2 weights" in context.notes[-1]
    for site, name in ((first, "first"), (second, "second")):
        wide, format_type = wide_weight(site, context.weights), site.format
        plain, chosen = quantize(wide, format_type), given_encoding(site, context.weights).decode()
        x = inputs[name].double()
        hessian = 2 * x.T @ x / len(x)
        along = -2 if name == "second" else -1
        for n in range(wide.shape[1 if name == "second" else 0]):
            rows = [t.double().movedim(along, -1)[n] for t in (wide, plain, chosen)]
            for start in range(0, len(rows[0]), 128 if "channel" in format else 32 if format != "nvfp4" else 16):
                part = slice(start, start + (128 if "channel" in format else 32 if format != "nvfp4" else 16))
                before, after = rows[1][part] - rows[0][part], rows[2][part] - rows[0][part]
                if metric == "hessian":
                    own = hessian[part, part]
                    errors = before @ own @ before, after @ own @ after
                else:
                    factor = 1 if metric == "mse" else hessian.diagonal()[part] / 2
                    errors = (before.square() * factor).sum(), (after.square() * factor).sum()
                assert errors[1] <= errors[0] * (1 + 1e-5)


def test_fisher_weighs_with_squared_gradients():
    """The gradients are torch's, of a language model's cross entropy, sequence by sequence."""

    class Tiny(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.head = nn.Embedding(50, 64), nn.Linear(64, 50, bias=False)

        def forward(self, input_ids: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"logits": self.head(self.table(input_ids))}

    torch.manual_seed(0)
    model = Tiny()
    tokens = [torch.randint(50, (1, 12)) for _ in range(6)]
    squares = torch.zeros(50, 64, dtype=torch.float64)
    for sequence in tokens:
        logits = model(sequence)["logits"]
        loss = nn.functional.cross_entropy(logits[0, :-1], sequence[0, 1:], reduction="sum")
        (gradient,) = torch.autograd.grad(loss, model.head.weight)
        squares += gradient.double().square() / len(tokens)
    inputs = [[sequence] for sequence in tokens]
    pipeline = "quantize{weights=nvfp4},calibrate{kinds=fisher fisher=loss},clip{metric=fisher}"
    module, context = prepared(model, {"input_ids": torch.randint(50, (2, 10))}, inputs, pipeline, "causal-lm")
    (site,) = narrow_weights(module)
    wide, chosen = wide_weight(site, context.weights), given_encoding(site, context.weights)
    plain = quantize(wide, site.format)
    off = [(t.double() - wide.double()).square() * squares for t in (plain, chosen.decode())]
    before, after = (t.reshape(50, 4, 16).sum(-1) for t in off)
    assert (after <= before * (1 + 1e-4)).all()
    assert (after < before * 0.999).float().mean() > 0.5


def test_weights_of_one_input_share_a_scale():
    """Field case P1: groups follow from the module, whatever names they have; cross-attention's query stands alone."""

    class Three(nn.Module):
        def __init__(self, names: tuple[str, str, str], crossed: bool) -> None:
            super().__init__()
            self.crossed = crossed
            self.names = names
            for name, largest in zip(names, (1.0, 2.0, 0.5), strict=True):
                linear = nn.Linear(32, 16, bias=False)
                linear.weight.data.clamp_(-0.4, 0.4)[0, 0] = largest
                setattr(self, name, linear)

        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            first, second, third = (getattr(self, name) for name in self.names)
            return first(y if self.crossed else x) + second(x) * third(x)

    x = torch.randn(2, 32)
    for names in (("q_proj", "k_proj", "v_proj"), ("to_q", "to_k", "to_v"), ("gate", "up", "third")):
        for crossed in (False, True):
            torch.manual_seed(0)
            module, context = prepared(
                Three(names, crossed), {"x": x, "y": x + 1}, [], "quantize{weights=nvfp4},clip{shared=true}"
            )
            found = [given_encoding(site, context.weights).global_scale.item() for site in narrow_weights(module)]
            own = 1 / 2688 if crossed else 2 / 2688
            expected = {names[0]: own, names[1]: 2 / 2688, names[2]: 2 / 2688}
            by_name = {s.module: f for s, f in zip(narrow_weights(module), found, strict=True)}
            assert by_name == {name: pytest.approx(value) for name, value in expected.items()}
            assert 1 / by_name[names[1]] == pytest.approx(1344)


@pytest.mark.parametrize("format", ["int8_tensor", "int4_channel", "mxfp4", "nvfp4"])
def test_activations_keep_the_part_of_least_error(format: str):
    """The error over all calibration rows is measured here for every part that is tried."""
    module, _ = _prepared(f"quantize{{weights=int8_channel activations={format}}},clip{{role=activations}}")
    (cast, *_) = [op for op in module.walk() if isinstance(op, CastOp) and op.input.name_hint == "x"]
    kept = cast.how().clip or 1.0
    errors = {}
    for part in [1 - step / 20 for step in range(13)]:
        how = Rounding(cast.how().scale_rule, clip=None if part == 1 else part)
        off = [quantize(row, cast.result.type.element_type, how) - row for (x,) in INPUTS for row in x.split(1)]
        errors[part] = torch.cat(off).double().square().sum().item()
    assert errors[min(errors, key=lambda part: abs(part - kept))] == pytest.approx(min(errors.values()), rel=1e-6)


def test_activations_at_a_percentile():
    module, context = _prepared("quantize{activations=int8_tensor},clip{role=activations percentile=90.0}")
    (cast, *_) = [op for op in module.walk() if isinstance(op, CastOp) and op.input.name_hint == "x"]
    shares = []
    for row in (row for (x,) in INPUTS for row in x.abs().split(1)):
        shares.append(row.flatten().sort().values[int(0.9 * row.numel())].item() / row.max().item())
    assert cast.how().clip == pytest.approx(sum(shares) / len(shares), rel=1e-5)
    assert "2 of 2 activations" in context.notes[-1]


def test_refused():
    with pytest.raises(UsageError, match="unknown metric 'mes'"):
        _prepared("quantize{weights=nvfp4},clip{metric=mes}")
    with pytest.raises(UsageError, match="no weight has a format with scales yet"):
        _prepared("clip")
    with pytest.raises(UsageError, match=r"'frist' matches no weight with scales.*first"):
        _prepared("quantize{weights=nvfp4},clip{match=frist}")
    with pytest.raises(UsageError, match=r"packed as nvfp4.*stand before `pack`"):
        _prepared("quantize{weights=nvfp4},pack,clip")
    with pytest.raises(UsageError, match="nothing to clip"):
        _prepared("quantize{weights=ternary},clip")
    for options, message in (
        ("{role=weight}", "role is weights or activations"),
        ("{percentile=99.0}", "give role=activations"),
        ("{role=activations percentile=101.0}", "at most at 100"),
        ("{role=activations metric=hessian}", "metric=mse or output"),
        ("{role=activations}", "matches no activation"),
    ):
        with pytest.raises(UsageError, match=message):
            _prepared(f"quantize{{weights=nvfp4}},clip{options}")
    with pytest.raises(UsageError, match="clips by itself"):
        _prepared("quantize{activations=nvfp4},scale{rule=sweep},clip{role=activations}")
    torch.manual_seed(0)
    module, context = prepared(Mlp(), {"x": torch.randn(2, 64)}, [], "quantize{weights=nvfp4}")
    with pytest.raises(UsageError, match=r"clip\{metric=hessian\}"):
        run(module, context, "clip{metric=hessian}")
