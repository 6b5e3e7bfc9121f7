"""A compiled model says what it rounds at run time, and whether kernels do it."""

import pytest
import torch
from torch import nn

import mxloom
from mxloom.backends.kernels import native
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
