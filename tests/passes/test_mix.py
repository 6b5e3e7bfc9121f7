"""`mix`: FGMP's golden, one threshold for all, sensitivities at run time, ablations, and what it refuses."""

# pyright: reportOptionalMemberAccess=false, reportAttributeAccessIssue=false, reportArgumentType=false
# pyright: reportOptionalSubscript=false, reportOptionalOperand=false

import json
from pathlib import Path

import pytest
import torch
from torch import nn

import mxloom
from mxloom.backends.emulate import build
from mxloom.backends.reference import Interpreter
from mxloom.dialects.errors import MxloomError, UsageError
from mxloom.dialects.formats import MixedType, block_impact, quantize
from mxloom.dialects.formats._format import Given, Rounding
from mxloom.dialects.instances import format_of
from mxloom.dialects.operations.cast import CastOp
from mxloom.passes._given import given_encoding, narrow_weights, wide_weight
from mxloom.passes._quantile import StreamingQuantile
from mxloom.passes.mix import undecided

from .small_models import Mlp, correlated, prepared, run

GOLDEN = json.loads((Path(__file__).parent / "golden_passes.json").read_text())["fgmp"]
INPUTS = [[correlated(32, 64, seed)] for seed in range(8)]
FGMP = "quantize{weights=fgmp activations=fgmp}"


def _prepared(pipeline: str):
    torch.manual_seed(0)
    return prepared(Mlp(), {"x": torch.randn(2, 64)}, INPUTS, pipeline)


def test_the_threshold_of_the_golden():
    every = StreamingQuantile()
    for impact in GOLDEN["impact"]:
        every.add(torch.tensor([impact]))
    assert every.at(0.75) == pytest.approx(GOLDEN["thr_p75"], rel=1e-6)


def test_a_quantile_of_many_numbers_is_that_of_its_bin(monkeypatch):
    torch.manual_seed(0)
    numbers = torch.randn(40_000).exp()
    monkeypatch.setattr("mxloom.passes._quantile.EXACT", 1000)
    streamed = StreamingQuantile()
    for part in numbers.split(777):
        streamed.add(part)
    for share in (0.1, 0.5, 0.7, 0.9, 0.999):
        exact = numbers.double().quantile(share).item()
        assert streamed.at(share) == pytest.approx(exact, rel=2e-3)
        assert (numbers <= streamed.at(share)).float().mean().item() == pytest.approx(share, abs=1e-3)


def test_numbers_that_are_none():
    for bad in (float("nan"), float("inf"), -1.0):
        with pytest.raises(MxloomError, match="NaN, infinite or negative"):
            StreamingQuantile().add(torch.tensor([1.0, bad]))


@pytest.mark.parametrize("format", ["fgmp", "mxfp4_mxfp8", "mxint4_mxint8"])
def test_one_threshold_for_all_weights(format: str):
    """By hand: impacts of all blocks of both weights together, the share-quantile, blocks above it high."""
    module, context = _prepared(f"quantize{{weights={format}}},mix{{metric=mse share=0.6 clip=false}}")
    found = [(s, wide_weight(s, context.weights), given_encoding(s, context.weights)) for s in narrow_weights(module)]
    impacts = [block_impact(wide, site.format) for site, wide, _ in found]
    threshold = torch.cat([i.flatten() for i in impacts]).double().quantile(0.6)
    for (site, wide, given), impact in zip(found, impacts, strict=True):
        assert given.choice.bool().equal(impact > threshold)
        low, high = (quantize(wide, part) for part in (site.format.low, site.format.high))
        tiling = site.format.low_block.tiling(wide.shape)
        expected = tiling.merge(torch.where(tiling.spread(impact > threshold), tiling.split(high), tiling.split(low)))
        assert given.decode().equal(expected)
    shares = [1 - given.choice.float().mean().item() for _, _, given in found]
    assert abs(shares[0] - shares[1]) > 0.01  # one threshold, so the weights differ in their shares
    assert not undecided(module)


def test_one_threshold_for_each_tensor():
    module, context = _prepared("quantize{weights=fgmp},mix{metric=mse threshold=tensor share=0.75}")
    for site in narrow_weights(module):
        given = given_encoding(site, context.weights)
        assert given.choice.float().mean().item() == pytest.approx(0.25, abs=0.01)


def test_activations_choose_by_threshold_and_sensitivity():
    module, context = _prepared(f"{FGMP},mix{{metric=output share=0.7}}")
    casts = [op for op in module.walk() if isinstance(op, CastOp)]
    assert len(casts) == 2
    first = casts[0]
    weight = context.weights.wide("first.weight.wide").double()
    sensitivity = context.weights.wide(first.sensitivity.owner.source.data).double().flatten()
    assert torch.allclose(sensitivity, weight.square().sum(0), rtol=1e-5)
    rows = torch.cat([x for (x,) in INPUTS])
    second = casts[1]
    own = context.weights.wide(second.sensitivity.owner.source.data).flatten()
    impacts = []
    for row in rows.split(1):  # each sequence is rounded on its own, under its own scale of the tensor
        hidden = nn.functional.silu(row @ weight.float().T + context.weights.wide("first.bias"))
        impacts.append(block_impact(row, first.result.type.element_type, sensitivity.float()[None]).flatten())
        impacts.append(block_impact(hidden, second.result.type.element_type, own[None]).flatten())
    every = torch.cat(impacts)
    assert first.how().threshold == second.how().threshold
    assert first.how().threshold == pytest.approx(every.double().quantile(0.7).item(), rel=1e-3)
    x = rows[:5]
    assert build(module, context.weights)(x)[0].equal(Interpreter(module, context.weights)(x)[0])


def test_fisher_keeps_what_the_loss_feels(tmp_path: Path):
    """On the embedded model: the loss-weighted error of Fisher's choice is lowest in Fisher's own measure, the plain
    error of the plain choice in its own; artefacts give the same outputs."""
    model = Path(mxloom.__file__).parent / "examples" / "models" / "kjv-2m"
    text = (model / "held_out.txt").read_text()[:20_000]
    rules = [{"match": "*down_proj", "weights": "fgmp", "activations": "fgmp"}]
    recipe = {"quantize": rules, "passes": ["mix{share=0.7}"], "calibration": {"samples": 4, "length": 64}}
    compiled = mxloom.compile(model, recipe, calibration=text)
    ids = torch.randint(100, (1, 12))
    expected = compiled(input_ids=ids)[0]
    loaded = mxloom.load(compiled.save(tmp_path / "mixed"))
    assert loaded(input_ids=ids)[0].equal(expected)
    assert any("blocks of 4 weights (70.0" in line for line in compiled.notes())
    stored = [t for t in compiled.cost().tensors if t.name.endswith("down_proj.weight")]
    bits = sum(t.bits for t in stored) / sum(t.elements for t in stored)
    assert bits == pytest.approx(0.7 * 4.5 + 0.3 * 8 + 1 / 16, abs=0.01)


def test_random_choices_have_their_share_and_their_seed():
    choices = []
    for seed in (0, 0, 1):
        module, context = _prepared(f"{FGMP},mix{{metric=random share=0.5 seed={seed}}}")
        choices.append(given_encoding(narrow_weights(module)[0], context.weights).choice)
        x = torch.randn(16, 64)
        assert Interpreter(module, context.weights)(x)[0].isfinite().all()
        (cast, *_) = [op for op in module.walk() if isinstance(op, CastOp)]
        mixed = cast.result.type.element_type
        channels = context.weights.wide(cast.sensitivity.owner.source.data).flatten()
        assert (channels > 0).float().mean().item() == 0.5
        found = mixed.quantize(x, cast.how(), channels[None])
        low, high = mixed.candidates(x, Rounding())
        assert found[:, channels == 0].equal(low[:, channels == 0])
        assert found[:, channels > 0].equal(high[:, channels > 0])
    assert choices[0].equal(choices[1])
    assert not choices[0].equal(choices[2])


def test_clip_before_mix_and_mix_twice():
    module, context = _prepared("quantize{weights=fgmp},clip{metric=mse}")
    assert undecided(module) == ["first.weight", "second.weight"] or len(undecided(module)) == 2
    low = [given_encoding(s, context.weights) for s in narrow_weights(module)]
    run(module, context, "mix{metric=mse share=0.7}")
    once = [given_encoding(s, context.weights) for s in narrow_weights(module)]
    for before, after in zip(low, once, strict=True):
        kept = after.choice == 0
        assert after.scales.float()[kept].equal(before.scales.float()[kept])
    run(module, context, "mix{metric=mse share=1.0}")
    for site, given in zip(narrow_weights(module), low, strict=True):
        again = given_encoding(site, context.weights)
        assert not again.choice.any()
        assert again.decode().equal(given.decode())


def test_undecided_blocks_do_not_leave_the_compiler():
    for passes in ([], ["clip"]):
        recipe = {"quantize": [{"weights": "fgmp"}], "passes": passes}
        with pytest.raises(UsageError, match=r"first.*nothing says which: put the pass mix"):
            mxloom.compile(Mlp(), recipe, example={"x": torch.randn(2, 64)})


def test_a_given_choice_of_every_pair_decodes_as_the_formats_do():
    torch.manual_seed(0)
    x = torch.randn(4, 64)
    for name in ("fgmp", "mxfp4_mxfp8", "mxint4_mxint8"):
        mixed = format_of(name)
        assert isinstance(mixed, MixedType)
        tiling = mixed.low_block.tiling(x.shape)
        choice = (torch.rand(tiling.grid) > 0.5).to(torch.uint8)
        parts = mixed.encode(x, Rounding(), Given(choice=choice))
        low, high = mixed.candidates(x, Rounding())
        expected = tiling.merge(torch.where(tiling.spread(choice.bool()), tiling.split(high), tiling.split(low)))
        assert mixed.decode(parts, torch.float32).equal(expected)


def test_refused():
    for options, message in (
        ("{metric=fischer}", "unknown metric 'fischer'.*fisher"),
        ("{threshold=row}", "threshold is global or tensor"),
        ("{share=1.5}", "from 0 to 1"),
    ):
        with pytest.raises(UsageError, match=message):
            _prepared(f"{FGMP},mix{options}")
    with pytest.raises(UsageError, match="no operand of a mixed format"):
        _prepared("quantize{weights=nvfp4},mix")
