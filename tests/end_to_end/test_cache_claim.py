"""KIVI (arXiv 2402.02750): with keys per channel and values per token a cache errs less than with the swap."""

import pytest

import mxloom
from mxloom.compiler.model_source import ModelSource, open_model

MODEL = "examples/models/kjv-2m"


@pytest.fixture(scope="module")
def source() -> ModelSource:
    return open_model(MODEL)


@pytest.fixture(scope="module")
def reference(source: ModelSource) -> object:
    return mxloom.remembered(mxloom.compile(source))


@pytest.mark.parametrize(
    "format",
    [
        "int4_g32",
        "int4_g32_affine",
        "block<32xi2, bf16, zero i2>",
        "block<32xi2, bf16>",
        "mxint4",
        "mxint2",
    ],
)
def test_keys_per_channel_and_values_per_token_beat_the_swap(
    source: ModelSource, reference: object, format: str
) -> None:
    """The same tokens are rounded in both, 32 at a time. The swap has half as much again at the least."""

    def divergence(keys: str, values: str) -> float:
        rule = {"cache": format, "keys_per": keys, "values_per": values, "keys_step": 32, "values_step": 32}
        compiled = mxloom.compile(source, {"quantize": [{"kind": "attention", **rule}]})
        found = mxloom.evaluate(compiled, f"{MODEL}/held_out.txt", context=256, limit=2, against=reference).against
        assert found is not None
        return found.kl_mean

    assert 1.5 * divergence("channel", "token") < divergence("token", "channel")
