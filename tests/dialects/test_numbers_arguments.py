"""What the numbers' public functions refuse, in words, and how a format and `dim` may be given."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from xdsl.dialects.builtin import IndexType, TensorType, f32, f64, i8, i64

import mxloom
from mxloom.dialects.arguments import whole_number
from mxloom.dialects.errors import MxloomError, UsageError, did_you_mean
from mxloom.dialects.instances import INSTANCES, format_of, name_of

X = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
BOTH = pytest.mark.parametrize("call", [mxloom.fake_quantize, mxloom.encode])


@BOTH
@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("dim", 1.5, "dim is a whole number, got 1.5"),
        ("dim", "a", "dim is a whole number, got 'a'"),
        ("dim", None, "dim is a whole number, got None"),
        ("dim", (0, 1), "dim is a whole number, got a tuple"),
        ("dim", True, "dim is a whole number, got True"),
        ("dim", 2, r"dimensions \[2\] do not lie in a tensor of 2"),
        ("scale_rule", 5, "scale_rule is one of floor, .*, got 5"),
        ("scale_rule", "flor", 'unknown scale rule .flor. .did you mean "floor"'),
        ("rounding", None, "rounding is one of rne, .*, got None"),
        ("rounding", 1, "rounding is one of rne, .*, got 1"),
        ("rounding", "RNE", 'unknown rounding .RNE. .did you mean "rne"'),
        ("clip", "x", "clip is a number, got 'x'"),
        ("clip", float("nan"), "clip is a number, got nan"),
        ("clip", True, "clip is a number, got True"),
        ("clip", -0.5, r"in \(0, 1\], got -0.5"),
        ("seed", None, "seed is a whole number from -9223372036854775808 to 9223372036854775807, got None"),
        ("seed", 1.5, "seed is a whole number .* got 1.5"),
        ("seed", 2**64, "seed is a whole number .* got 18446744073709551616"),
    ],
)
def test_an_argument_of_a_wrong_kind(call: Any, name: str, value: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        call(X, "mxfp4", **{name: value})


@BOTH
@pytest.mark.parametrize(
    ("x", "message"),
    [
        ([1.0, 2.0], "x is a torch tensor, got a list"),
        (np.ones(4), "x is a torch tensor, got a ndarray"),
        (None, "x is a torch tensor, got None"),
        (3.0, "x is a torch tensor, got 3.0"),
        (X.to_sparse(), "plain, dense tensor, got one of torch.sparse_coo"),
        (X.to("meta"), "x lies on the meta device"),
        (X.to(torch.complex64), "only float tensors are rounded .* torch.complex64"),
        (torch.ones(4, dtype=torch.bool), "only float tensors are rounded .* torch.bool"),
        (X.abs().to(torch.float8_e8m0fnu), "only float tensors are rounded .* torch.float8_e8m0fnu"),
        (torch.tensor(1.0), "give the tensor as many dimensions .reshape., or use a format without blocks"),
    ],
)
def test_a_tensor_of_a_wrong_kind(call: Any, x: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        call(x, "mxfp4")


@BOTH
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_a_nested_tensor(call: Any) -> None:
    with pytest.raises(UsageError, match="plain, dense tensor, got a nested one"):
        call(torch.nested.nested_tensor([torch.ones(2, 32), torch.ones(3, 32)]), "mxfp4")


@pytest.mark.parametrize("dtype", ["f32", torch.int32, torch.complex64, torch.float8_e8m0fnu, 5])
def test_decoding_into_no_floats(dtype: Any) -> None:
    with pytest.raises(UsageError, match="float dtype"):
        mxloom.encode(X, "mxfp4").decode(dtype)


WORDS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.tuples(st.integers())
TENSORS = st.sampled_from([X, X[0], X[:0], X.double(), X.to(torch.complex64), X.to("meta"), X.int(), X.T, [1.0], None])
NAMES = st.sampled_from(
    ["mxfp4", "int8_affine", "bf16", "f8E4M3FN", "!mx.block<2x2xi4, f32>", "i8", f64, INSTANCES["nvfp4"]]
)


@settings(max_examples=300, deadline=None)
@given(
    TENSORS,
    NAMES | WORDS,
    st.dictionaries(st.sampled_from(["dim", "scale_rule", "rounding", "clip", "seed"]), WORDS, max_size=2),
)
def test_whatever_comes_is_done_or_refused_in_words(x: Any, format: Any, options: dict[str, Any]) -> None:
    for call in (mxloom.fake_quantize, mxloom.encode):
        try:
            call(x, format, **options)
        except MxloomError as error:
            assert str(error)


@pytest.mark.parametrize(
    "format", ["i8", "i64", "i1", "si8", "index", "f64", "f8E8M0FNU", "tensor<4xf32>", "", i8, i64, f64]
)
def test_what_means_nothing_is_no_format(format: Any) -> None:
    for call in (format_of, lambda given: mxloom.fake_quantize(X, given)):
        with pytest.raises(UsageError, match="format"):
            call(format)


@pytest.mark.parametrize("format", [None, 5, IndexType(), TensorType(f32, [4]), torch.float32, ["mxfp4"]])
def test_what_is_no_type_is_no_format(format: Any) -> None:
    with pytest.raises(UsageError, match="format"):
        format_of(format)


def test_a_block_is_bounded() -> None:
    assert format_of("!mx.block<2147483647xi4, f32>")
    for size in ("0", "2147483648", "99999999999999999999"):
        with pytest.raises(UsageError, match="positive dimensions or"):
            format_of(f"!mx.block<{size}xi4, f32>")


def test_a_name_in_capitals_suggests_the_name() -> None:
    assert did_you_mean("MXFP4", INSTANCES) == ' (did you mean "mxfp4"?)'
    assert did_you_mean("linear", ["Linear", "Other"]) == ' (did you mean "Linear"?)'
    with pytest.raises(UsageError, match='did you mean "mxfp4"'):
        mxloom.fake_quantize(X, "MXFP4")


def test_the_table_names_the_nearest_and_stays_a_mapping() -> None:
    with pytest.raises(UsageError, match=r"unknown format .mxfp5. .did you mean"):
        mxloom.formats()["mxfp5"]
    assert "mxfp5" not in mxloom.formats() and mxloom.formats().get("mxfp5") is None


def test_one_of_the_table_is_a_format() -> None:
    for name, instance in mxloom.formats().items():
        assert torch.equal(mxloom.fake_quantize(X, instance, dim=0), mxloom.fake_quantize(X, name, dim=0))


@pytest.mark.parametrize("name", INSTANCES)
@pytest.mark.parametrize("dim", [0, 1, -1])
def test_a_type_is_laid_out_like_its_name(name: str, dim: int) -> None:
    x = torch.randn(3, 5, 64, generator=torch.Generator().manual_seed(1)).transpose(dim, 2)
    by_name = mxloom.encode(x, name, dim=dim)
    for format in (mxloom.formats()[name].type, mxloom.formats()[name].text):
        assert torch.equal(mxloom.fake_quantize(x, format, dim=dim), by_name.decode())
    assert by_name.format == format_of(name, rank=3, dims=(dim,))


def test_dim_without_effect_is_refused() -> None:
    for format in ("!mx.block<2x16xf4E2M1FN>", format_of("mxfp4", dims=(-2,))):
        assert mxloom.fake_quantize(X, format).shape == X.shape
        assert mxloom.fake_quantize(X, format, dim=1).shape == X.shape
        with pytest.raises(UsageError, match="says itself how its blocks lie: dim=0 would have no effect"):
            mxloom.fake_quantize(X, format, dim=0)


def test_fixed_point_whose_point_lies_to_the_right() -> None:
    """fixed<8,-3> holds the multiples of 8 from -1024 to 1016."""
    x = torch.tensor([3.0, 4.0, 12.0, 20.0, 1e4, -1e4, -7.0])
    assert mxloom.fake_quantize(x, "fixed<8,-3>").tolist() == [0.0, 0.0, 16.0, 16.0, 1016.0, -1024.0, -8.0]
    assert mxloom.encode(x, "fixed<8,-3>").codes.tolist() == [0, 0, 2, 2, 127, -128, -1]
    assert name_of(format_of("fixed<8,-3>")) == "fixed<8,-3>" and INSTANCES["fixed<8,6>"].bits == 8


def test_whole_numbers_of_other_libraries_are_whole() -> None:
    assert whole_number("n", np.int64(3), 1) == 3
    assert whole_number("n", torch.tensor(3)) == 3
    with pytest.raises(UsageError, match="n is a whole number of 1 or more, got 0"):
        whole_number("n", 0, 1)
