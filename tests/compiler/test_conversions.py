"""A compiled model says what it rounds at run time, and whether kernels do it."""

import pytest
import torch
from torch import nn

import mxloom
from mxloom.backends.kernels import native
from mxloom.backends.kernels.contraction.datapath import BYTES, DOUBLES, WORDS
from mxloom.compiler.inspection import inspect
from mxloom.dialects.formats import Rounding


@pytest.mark.skipif(native.why_not() is not None, reason=f"{native.why_not()}; run on x86-64 or 64-bit Arm")
def test_conversions_are_named_with_the_reason_where_no_kernel_does_them(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4))
    rules = [{"match": "4", "activations": "!mx.block<32xbf16>"}, {"weights": "nvfp4", "activations": "mxint8"}]
    compiled = mxloom.compile(model, {"quantize": rules}, example={"input": torch.ones(2, 32)})
    block, wide = compiled.conversions
    assert (block.format, block.count, block.why_not) == ("!mx.block<32x!mx.fixed<8, 6>>", 2, None)
    assert block.how == Rounding("floor")
    assert (wide.count, wide.why_not) == (1, "the element needs f64")
    assert str(block) == "2 x !mx.block<32x!mx.fixed<8, 6>>, floor, rne: a kernel"
    monkeypatch.setenv("MXLOOM_KERNELS", "eager")
    assert {c.why_not for c in compiled.conversions} == {"MXLOOM_KERNELS is eager"}


@pytest.mark.skipif(native.why_not() is not None, reason=f"{native.why_not()}; run on x86-64 or 64-bit Arm")
def test_exact_layers_name_their_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4))
    rules = [{"match": "2", "activations": "mxfp8_e5m2", "weights": "mxfp8_e5m2"}]
    rules.append({"weights": "mxfp4", "activations": "mxint8"})
    compiled = mxloom.compile(model, {"quantize": rules}, example={"input": torch.ones(2, 32)}, mode="exact")
    codes = [
        conversion for conversion in compiled.conversions if conversion.format.startswith("!mx.block<32x!mx.fixed")
    ]
    assert [str(conversion) for conversion in codes] == [
        "1 x codes of !mx.block<32x!mx.fixed<8, 6>>, floor, rne: a kernel"
    ]
    found = {summation.datapath: summation for summation in compiled.summations}
    assert len(found) == 2
    assert found.keys() <= {path.name for path in (*BYTES, *WORDS, *DOUBLES)}
    assert all((each.accumulator, each.count, each.why_not) == ("f32", 1, None) for each in found.values())
    monkeypatch.setenv("MXLOOM_KERNELS", "eager")
    assert [str(each) for each in compiled.summations] == ["1 x linear, f32: torch (MXLOOM_KERNELS is eager)"] * 2


def test_evaluation_and_inspection_say_how_products_are_summed() -> None:
    recipe = {"quantize": [{"weights": "mxfp4", "activations": "mxint8"}], "passes": ["accumulate{format=bf16}"]}
    narrow = mxloom.compile("examples/models/kjv-2m", recipe)
    found = mxloom.evaluate(narrow, "examples/models/kjv-2m/held_out.txt", context=8, limit=1)
    assert str(found.protocol).endswith("7 tokens, f32, linear layers summed in bf16")
    shares = narrow.coverage(sequence=512).accumulators
    seen = inspect(narrow)
    assert seen.sums == shares
    assert f"sums: bf16 {shares['bf16']:.1%} of MACs, torch {shares['torch']:.1%} of MACs" in str(seen)
