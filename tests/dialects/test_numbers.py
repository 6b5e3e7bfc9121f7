"""The face of the numbers: formats(), fake_quantize(), encode(), and stored tensors that do not fit."""

from typing import Any

import pytest
import torch

import mxloom
from mxloom.dialects.errors import MxloomError, UsageError
from mxloom.dialects.formats import Encoded
from mxloom.dialects.instances import INSTANCES, format_of


def test_the_table_of_formats() -> None:
    table = mxloom.formats()
    assert list(table) == list(INSTANCES)
    assert table["mxfp4"].bits == 4.25 and table["mxfp4"].default_scale_rule == "even"
    lines = str(table).splitlines()
    assert lines[0].split() == ["format", "bits", "scale", "rule", "type", "note"]
    assert len(lines) == len(table) + 1
    assert lines[1 + list(table).index("nvfp4")].split()[:3] == ["nvfp4", "4.5", "absmax"]


def test_a_type_does_instead_of_a_name() -> None:
    x = torch.randn(4, 64)
    by_type = mxloom.fake_quantize(x, format_of("mxfp6_e3m2"))
    assert torch.equal(by_type, mxloom.fake_quantize(x, "mxfp6_e3m2"))
    assert torch.equal(by_type, mxloom.fake_quantize(x, "!mx.block<32xf6E3M2FN>"))


def test_dim_says_where_blocks_lie() -> None:
    x = torch.tensor([[1.0, 100.0], [2.0, 200.0]])
    assert mxloom.encode(x, "int8_channel", dim=0).codes.tolist() == [[64, 64], [127, 127]]
    assert mxloom.encode(x, "int8_channel", dim=1).codes.tolist() == [[1, 127], [1, 127]]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn])
def test_the_dtype_stays(dtype: torch.dtype) -> None:
    x = torch.tensor([1.0, -2.0, 0.5, 3.0]).to(dtype)
    assert mxloom.fake_quantize(x, "mxfp4").dtype == dtype
    assert mxloom.fake_quantize(x, "mxfp4").float().tolist() == [1.0, -2.0, 0.5, 3.0]


def test_dtypes_of_codes_and_scales() -> None:
    x = torch.randn(2, 64)
    expected = {
        "mxfp4": (torch.uint8, torch.float8_e8m0fnu),
        "mxint8": (torch.int8, torch.float8_e8m0fnu),
        "nvfp4": (torch.uint8, torch.float8_e4m3fn),
        "int4_g32": (torch.int8, torch.bfloat16),
        "int8_channel": (torch.int8, torch.float32),
        "!mx.block<32x!mx.fixed<12, 10>>": (torch.int16, torch.float8_e8m0fnu),
        "!mx.block<32xi20, f16>": (torch.int32, torch.float16),
    }
    for format, (codes, scales) in expected.items():
        encoded = mxloom.encode(x, format)
        assert encoded.scales is not None
        assert (encoded.codes.dtype, encoded.scales.dtype) == (codes, scales), format
        assert encoded.codes.shape == x.shape


def test_only_floats_are_rounded() -> None:
    with pytest.raises(UsageError, match=r"only float tensors are rounded .* got torch\.int64"):
        mxloom.fake_quantize(torch.arange(4), "mxfp4")


@pytest.mark.parametrize(
    ("format", "options", "message"),
    [
        ("mxfp4", {"scale_rule": "absmax"}, "does not fit .*: use even or floor or ceil or rceil"),
        ("int8_channel", {"scale_rule": "floor"}, "does not fit .*: use absmax"),
        ("nvfp4", {"scale_rule": "even"}, "does not fit .*: use absmax"),
        ("bf16", {"scale_rule": "even"}, "bf16 has no scale: scale_rule=even would have no effect"),
        ("fixed<8,6>", {"clip": 0.9}, "has no scale: clip=0.9 would have no effect"),
        ("f8E4M3FN", {"clip": 0.9}, "f8E4M3FN has no scale"),
    ],
)
def test_an_option_without_meaning_is_refused(format: str, options: dict[str, Any], message: str) -> None:
    for call in (mxloom.fake_quantize, mxloom.encode):
        with pytest.raises(UsageError, match=message):
            call(torch.ones(32), format, **options)


def test_stored_tensors_must_fit() -> None:
    encoded = mxloom.encode(torch.randn(2, 40), "int4_g32_affine")
    tensors = encoded.tensors()
    assert {name: list(tensor.shape) for name, tensor in tensors.items()} == {
        "codes": [64],
        "scales": [2, 2],
        "zero_points": [2],
    }
    with pytest.raises(MxloomError, match="is stored as codes, scales, zero_points; got codes, scales"):
        Encoded.from_tensors(encoded.format, (2, 40), {name: tensors[name] for name in ("codes", "scales")})
    with pytest.raises(MxloomError, match=r"codes .* must be torch\.uint8 of shape \[64\], got .* \[63\]"):
        Encoded.from_tensors(encoded.format, (2, 40), {**tensors, "codes": tensors["codes"][1:]})
    with pytest.raises(MxloomError, match=r"scales .* must be torch\.bfloat16 .* got torch\.float32"):
        Encoded.from_tensors(encoded.format, (2, 40), {**tensors, "scales": tensors["scales"].float()})
    with pytest.raises(MxloomError, match="does not lie on a tensor of 0"):
        Encoded.from_tensors(encoded.format, (), tensors)


def test_a_byte_that_is_no_five_trits_is_refused() -> None:
    encoded = mxloom.encode(torch.randn(2, 10), "ternary")
    broken = {**encoded.tensors(), "codes": torch.tensor([0, 1, 242, 243], dtype=torch.uint8)}
    with pytest.raises(MxloomError, match=r"a byte of five trits is at most 242 \(3\^5 - 1\), got 243"):
        Encoded.from_tensors(encoded.format, (2, 10), broken)


def test_tracing_leaves_nothing_behind() -> None:
    """What is kept between calls must not be made of the tensors of a trace."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    format = format_of("!mx.block<32xf8E3M4>")
    with FakeTensorMode():
        traced = mxloom.encode(torch.ones(2, 32), format)
        assert traced.decode().shape == (2, 32)
    assert mxloom.encode(torch.ones(2, 32), format).decode().tolist() == torch.ones(2, 32).tolist()
