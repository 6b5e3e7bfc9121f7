"""What stands around a compilation has its meaning: autocast, the rounding of a wide type, bits beside bytes."""

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.functional import linear

import mxloom

LAYER, X = nn.Linear(32, 3), torch.linspace(-3, 3, 128).reshape(4, 32)


@pytest.mark.parametrize("rounding", ["rne", "rna", "rtz", "stochastic"])
@pytest.mark.parametrize("format", ["bf16", "f16"])
def test_wide_types_round_as_the_recipe_says(format: str, rounding: str) -> None:
    rule = {"weights": format, "activations": format, "rounding": rounding}
    compiled = mxloom.compile(LAYER, {"quantize": [rule]}, example={"input": X})
    weight, x = (mxloom.fake_quantize(t.detach(), format, rounding=rounding) for t in (LAYER.weight, X))
    assert torch.equal(compiled(X), linear(x, weight, LAYER.bias))


def test_the_autocast_of_a_caller_is_not_part_of_the_numerics() -> None:
    expected = mxloom.compile(LAYER, weights="mxfp4", activations="nvfp4", example={"input": X})(X)
    with torch.autocast("cpu", torch.bfloat16):
        compiled = mxloom.compile(LAYER, weights="mxfp4", activations="nvfp4", example={"input": X})
        inside = compiled(X)
    assert inside.dtype == torch.float32
    assert torch.equal(inside, expected)
    assert torch.equal(compiled(X), expected)


@pytest.mark.parametrize("format", ["int4_g32_affine", "int2_g64_affine", "int4_g128_affine"])
def test_parts_that_end_within_a_byte_are_saved(format: str, tmp_path: Path) -> None:
    compiled = mxloom.compile(LAYER, weights=format, example={"input": X})
    compiled.save(tmp_path / "saved")
    assert torch.equal(mxloom.load(tmp_path / "saved")(X), compiled(X))
