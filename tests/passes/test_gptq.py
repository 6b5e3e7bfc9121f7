"""`gptq`: lower output error than plain rounding in every format; what it promises of scales, and what it refuses."""

# pyright: reportOptionalMemberAccess=false, reportAttributeAccessIssue=false, reportArgumentType=false
# pyright: reportOptionalSubscript=false, reportOptionalOperand=false

import pytest
import torch
from torch import nn

from mxloom.backends.reference import Interpreter
from mxloom.dialects.errors import MxloomError, UsageError
from mxloom.dialects.formats import encode_tensor, quantize
from mxloom.passes._given import given_encoding, narrow_weights, wide_weight

from .small_models import Mlp, correlated, prepared, run

INPUTS = [[correlated(32, 64, seed)] for seed in range(16)]
FORMATS = ["mxfp4", "nvfp4", "mxint4", "int4_g32", "int4_g32_affine", "int4_channel", "ternary"]


def _prepared(pipeline: str, inputs=INPUTS):
    torch.manual_seed(0)
    return prepared(Mlp(), {"x": torch.randn(2, 64)}, inputs, pipeline)


def _errors(module, context) -> list[tuple[float, float]]:
    """||(W - Q) X||^2 by plain rounding and as the pass left it, for both weights; X from torch."""
    hidden = torch.cat([x for (x,) in INPUTS]).double()
    first, second = narrow_weights(module)
    wide = wide_weight(first, context.weights)
    inner = nn.functional.silu(hidden @ wide.double().T + context.weights.wide("first.bias"))
    found = []
    for site, x in ((first, hidden), (second, inner)):
        wide, given = wide_weight(site, context.weights), given_encoding(site, context.weights)
        plain = quantize(wide, site.format)
        errors = [(q.double() - wide.double()) for q in (plain, given.decode())]
        if site is first:
            errors = [e.T for e in errors]
        found.append(tuple((x @ e).square().sum().item() for e in errors))
    return found


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("options", ["inputs=float", "inputs=emulated"])
def test_the_output_error_is_lower(format: str, options: str):
    module, context = _prepared(f"quantize{{weights={format}}},gptq{{{options}}}")
    for before, after in _errors(module, context):
        assert after < before
    assert "lower in 2 of 2 weights" in context.notes[-1]


@pytest.mark.parametrize("format", ["fgmp", "mxfp4_mxfp8", "mxint4_mxint8"])
def test_mixed_blocks_keep_their_choice_and_lose_less(format: str):
    module, context = _prepared(f"quantize{{weights={format}}},mix{{metric=mse share=0.7}}")
    before = [given_encoding(site, context.weights) for site in narrow_weights(module)]
    run(module, context, "gptq{inputs=float}")
    hidden = torch.cat([x for (x,) in INPUTS])
    for site, old in zip(narrow_weights(module), before, strict=True):
        new = given_encoding(site, context.weights)
        assert new.choice.equal(old.choice)
        assert new.scales.float().equal(old.scales.float())
        if site.module == "first":
            wide = wide_weight(site, context.weights)
            lost = [((each.decode() - wide) @ hidden.T).square().sum() for each in (old, new)]
            assert lost[1] < lost[0]


def test_scales_that_clip_chose_are_frozen():
    module, context = _prepared("quantize{weights=nvfp4},clip{metric=hessian}")
    before = [given_encoding(site, context.weights).scales.float() for site in narrow_weights(module)]
    run(module, context, "gptq")
    after = [given_encoding(site, context.weights).scales.float() for site in narrow_weights(module)]
    assert all(a.equal(b) for a, b in zip(before, after, strict=True))


def test_group_scales_follow_the_columns_and_can_be_frozen():
    """The first group has seen no correction, so its scales are those of the weight itself; later ones differ."""
    found = {}
    for scales in ("auto", "frozen"):
        module, context = _prepared(f"quantize{{weights=int4_g32}},gptq{{scales={scales}}}")
        site = narrow_weights(module)[0]
        found[scales] = given_encoding(site, context.weights).scales.float()
    wide = wide_weight(site, context.weights)
    assert found["frozen"].equal(encode_tensor(wide, site.format).scales.float())
    assert found["auto"][:, 0].equal(found["frozen"][:, 0])
    assert not found["auto"][:, 1].equal(found["frozen"][:, 1])


def test_the_stored_weight_is_what_was_found():
    """The values that the search of columns left are codes of the format: encoding them again changes nothing."""
    for options in ("", "{act_order=true}", "{search=mse}", "{search=hessian}", "{search=output inputs=matched}"):
        module, context = _prepared(f"quantize{{weights=mxfp4 activations=mxint8}},gptq{options}")
        for site in narrow_weights(module):
            given = given_encoding(site, context.weights)
            again = encode_tensor(given.decode(), site.format, scales=given.scales)
            assert again.codes.equal(given.codes)
        x = torch.randn(3, 64)
        assert Interpreter(module, context.weights)(x)[0].isfinite().all()


def test_matched_inputs_bring_the_output_nearer():
    """Behind coarse activations the target is the float model's output: on the calibration rows it comes nearer."""
    outputs = {}
    for inputs in ("float", "matched"):
        module, context = _prepared(
            f"quantize{{weights=int8_channel activations=mxint3}},gptq{{inputs={inputs} damping=0.001}}"
        )
        outputs[inputs] = torch.cat([Interpreter(module, context.weights)(x)[0] for (x,) in INPUTS])
    module, context = _prepared("quantize{weights=int8_channel}")
    exact = torch.cat([Interpreter(module, context.weights)(x)[0] for (x,) in INPUTS])
    errors = {name: (found - exact).square().sum().item() for name, found in outputs.items()}
    assert errors["matched"] < errors["float"]


def test_a_pass_that_saw_no_data_does_not_finish():
    """Field case P5: one of two branches that no input reaches; and no inputs at all."""
    with pytest.raises(UsageError, match=r"gptq.*no inputs"):
        _prepared("quantize{weights=mxfp4},gptq", inputs=[])


def test_few_samples_are_told_and_damped():
    _, context = _prepared("quantize{weights=mxfp4},gptq{inputs=emulated}", inputs=[[correlated(8, 64)]])
    assert "fewer rows than they have columns" in context.notes[-1]
    with pytest.raises(MxloomError, match=r"first.*too few calibration samples"):
        _prepared("quantize{weights=mxfp4},gptq{damping=0.0}", inputs=[[correlated(8, 64)]])


def test_refused():
    for options, message in (
        ("{scales=forzen}", "unknown scales 'forzen'"),
        ("{inputs=flaot}", "unknown inputs 'flaot'"),
        ("{damping=-1.0}", "damping is 0 or more"),
        ("{scales=updated act_order=true}", "its scales are frozen"),
        ("{scales=updated search=mse}", "cannot be updated"),
    ):
        with pytest.raises(UsageError, match=message):
            _prepared(f"quantize{{weights=mxfp4}},gptq{options}")
    with pytest.raises(UsageError, match="run `mix` before"):
        _prepared("quantize{weights=fgmp},gptq")
    with pytest.raises(UsageError, match="packed as mxfp4"):
        _prepared("quantize{weights=mxfp4},pack,gptq")
    with pytest.raises(UsageError, match="reach over several rows"):
        _prepared("quantize{weights=int8_tensor},gptq{scales=updated}")
