"""Failures that users of other tools met, each with the right result (field cases F1, F3, F4, F5, C2, X4; MASE)."""

import numpy as np
import pytest
import torch

import mxloom
from mxloom.dialects.errors import MxloomError, UsageError
from mxloom.dialects.formats import Encoded, Rounding, encode_tensor, quantize, storage_bits
from mxloom.dialects.instances import INSTANCES, format_of

MXFP = ("mxfp8_e4m3", "mxfp8_e5m2", "mxfp6_e2m3", "mxfp6_e3m2", "mxfp4")
MX = (*MXFP, "mxint8", "mxint6", "mxint4", "mxint3", "mxint2", "bfp16")


def block(*first: float, size: int = 32) -> torch.Tensor:
    return torch.tensor([*first, *[0.0] * (size - len(first))])


def scale_bytes(encoded: Encoded) -> list[int]:
    assert encoded.scales is not None
    return encoded.scales.view(torch.uint8).flatten().tolist()


def stored(format: str, codes: torch.Tensor, byte: int) -> Encoded:
    scales = torch.full((*codes.shape[:-1], 1), byte, dtype=torch.uint8).view(torch.float8_e8m0fnu)
    return Encoded(format_of(format, rank=codes.dim()), tuple(codes.shape), codes, scales)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_scale_byte(dtype: torch.dtype) -> None:
    for byte in range(255):
        ones = stored("mxfp8_e4m3", torch.full((32,), 0x38, dtype=torch.uint8), byte)
        assert set(ones.decode(dtype).tolist()) == {2.0 ** (byte - 127)}
        units = stored("mxint8", torch.full((32,), 64, dtype=torch.int8), byte)
        assert set(units.decode(dtype).tolist()) == {2.0 ** (byte - 127)}
    for code in (0x38, 0):
        assert stored("mxfp8_e4m3", torch.full((32,), code, dtype=torch.uint8), 255).decode(dtype).isnan().all()


def test_lowest_scale_is_a_subnormal() -> None:
    ones = stored("mxfp8_e4m3", torch.full((32,), 0x38, dtype=torch.uint8), 0).decode()
    assert ones.view(torch.int32).unique().tolist() == [0x00400000]


SMALL = {
    "mxfp8_e4m3": [0.125, -0.0625, 0.046875, 0.001953125],
    "mxfp8_e5m2": [0.125, -0.0625, 0.046875, 0.001953125],
    "mxfp6_e3m2": [0.125, -0.0625, 0.0625, 0.0],
    "mxfp6_e2m3": [0.125, -0.0, 0.0, 0.0],
    "mxfp4": [0.0, -0.0, 0.0, 0.0],
}


@pytest.mark.parametrize("format", SMALL)
def test_blocks_of_subnormals(format: str) -> None:
    x = block(2.0**-130, -(2.0**-131), 3 * 2.0**-133, 2.0**-136)
    encoded = mxloom.encode(x, format, scale_rule="floor")
    assert scale_bytes(encoded) == [0]
    assert (encoded.decode(torch.float64)[:4] * 2.0**127).tolist() == SMALL[format]
    assert torch.equal(mxloom.fake_quantize(x, format, scale_rule="floor"), encoded.decode())


def test_a_subnormal_block_of_mxfp4_that_is_exact() -> None:
    x = block(2.0**-126, -(2.0**-127))
    encoded = mxloom.encode(x, "mxfp4", scale_rule="floor")
    assert scale_bytes(encoded) == [0]
    assert (encoded.decode(torch.float64)[:2] * 2.0**127).tolist() == [2.0, -1.0]
    assert torch.equal(encoded.decode(), x)


@pytest.mark.parametrize("format", INSTANCES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_zero_stays_zero(format: str, dtype: torch.dtype) -> None:
    x = torch.zeros(2, 64, dtype=dtype)
    assert torch.equal(mxloom.fake_quantize(x, format), x)
    encoded = mxloom.encode(x, format)
    assert not encoded.codes.any()
    for tensor in encoded.tensors().values():
        assert tensor.dtype == torch.uint8 or tensor.float().isfinite().all()
    if format in MX:
        assert scale_bytes(encoded) == [0] * (2 * 64 // (8 if format == "bfp16" else 32))


def test_zero_block_under_a_tensor_scale() -> None:
    encoded = mxloom.encode(torch.stack([block(4.0, size=16), block(size=16)]), "nvfp4")
    assert encoded.global_scale is not None
    assert float(encoded.global_scale) == pytest.approx(0.0014880953)
    assert scale_bytes(encoded)[1] == 0x01
    assert not encoded.codes[1].any() and not encoded.decode()[1].any()


@pytest.mark.parametrize("format", [name for name in INSTANCES if "nv" in name or "int" in name or "tensor" in name])
@pytest.mark.parametrize("magnitude", [1e38, 1e-36, 1e-44, 1e-45])
def test_no_scale_is_zero_infinite_or_nan(format: str, magnitude: float) -> None:
    x = torch.zeros(2, 64)
    x[0, :3] = torch.tensor([magnitude, -magnitude, magnitude / 3])
    x[1, 0] = magnitude / 7
    encoded = mxloom.encode(x, format)
    for scales in (encoded.scales, encoded.global_scale):
        if scales is not None and scales.dtype != torch.float8_e8m0fnu:
            assert scales.float().isfinite().all() and (scales.float() > 0).all()
    assert encoded.decode().isfinite().all()


def test_int4_that_uses_its_lowest_code_is_imported_as_it_is() -> None:
    w = 0.25 * torch.arange(-8, 8.0)
    format = format_of("!mx.block<16xi4, f32>")
    scale = torch.tensor([0.25])
    encoded = encode_tensor(w, format, scales=scale)
    assert encoded.codes.tolist() == list(range(-8, 8))
    assert encoded.scales is not None and torch.equal(encoded.scales, scale)
    assert torch.equal(encoded.decode(), w)
    again = encode_tensor(encoded.decode(), format, scales=encoded.scales)
    assert torch.equal(again.codes, encoded.codes)
    back = Encoded.from_tensors(format, (16,), encoded.tensors())
    assert torch.equal(back.codes, encoded.codes)
    derived = quantize(w, format)
    assert int((derived != w).sum()) == 14
    assert float((derived - w).abs().max()) == pytest.approx(0.142857, rel=1e-5)


def test_given_scales_are_kept_bit_for_bit_in_every_family() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(6, 64, generator=generator)
    for name in (
        "mxfp4",
        "mxint8",
        "nvfp4",
        "nvint4",
        "int4_g32",
        "int4_g32_affine",
        "int8_channel",
        "fp8_e4m3_tensor",
    ):
        first = mxloom.encode(x, name)
        assert first.scales is not None
        again = encode_tensor(
            first.decode(),
            first.format,
            scales=first.scales,
            global_scale=first.global_scale,
            zero_points=first.zero_points,
        )
        assert torch.equal(again.codes, first.codes), name
        assert again.scales is not None and again.scales.untyped_storage().data_ptr() == first.scales.data_ptr(), name


def test_given_scales_must_fit() -> None:
    x = torch.ones(2, 32)
    nvfp4, group = format_of("nvfp4"), format_of("int4_g32")
    with pytest.raises(MxloomError, match="global_scale is missing"):
        encode_tensor(x, nvfp4, scales=torch.ones(2, 2))
    with pytest.raises(MxloomError, match=r"shape \[3, 1\].*\[2, 1\]"):
        encode_tensor(x, group, scales=torch.ones(3, 1))
    with pytest.raises(MxloomError, match=r"not exact in torch\.bfloat16"):
        encode_tensor(x, group, scales=torch.full((2, 1), 1 / 3))
    with pytest.raises(MxloomError, match="has no scale"):
        encode_tensor(x, format_of("bf16"), scales=torch.ones(2, 1))
    with pytest.raises(MxloomError, match="NaN has no code"):
        encode_tensor(torch.full((2, 32), torch.nan), group, scales=torch.ones(2, 1))


@pytest.mark.parametrize("format", MX)
def test_nan_takes_its_block_and_no_other(format: str) -> None:
    x = torch.ones(2, 32)
    x[0, 5] = torch.nan
    encoded = mxloom.encode(x, format)
    expected = encoded.decode().isnan()
    blocks = expected.reshape(-1, 8 if format == "bfp16" else 32)
    assert (blocks.all(-1) == blocks.any(-1)).all()
    assert expected[0, 5] and not expected[1].any()
    assert [byte == 255 for byte in scale_bytes(encoded)].count(True) == 1
    assert torch.equal(mxloom.fake_quantize(x, format).isnan(), expected)


def test_nan_under_a_tensor_scale_spares_the_other_blocks() -> None:
    x = torch.stack([block(1.0, torch.nan, 100.0, size=16), block(3.0, size=16)])
    encoded = mxloom.encode(x, "nvfp4")
    assert encoded.global_scale is not None
    assert float(encoded.global_scale) == pytest.approx(100 / 2688)
    assert scale_bytes(encoded)[0] == 0x7F
    assert encoded.decode().isnan().tolist() == [[True] * 16, [False] * 16]


# OCP E8M0 byte of a block with an infinity: floor, ceil, even 128 - emax; rceil 127
INFINITE = {"mxfp8_e4m3": 120, "mxfp8_e5m2": 113, "mxfp6_e2m3": 126, "mxfp6_e3m2": 124, "mxfp4": 126, "mxint8": 127}


@pytest.mark.parametrize("format", INFINITE)
def test_infinity_saturates(format: str) -> None:
    x = block(torch.inf, -torch.inf, 1.0)
    for rule in ("floor", "ceil", "even"):
        encoded = mxloom.encode(x, format, scale_rule=rule)
        assert scale_bytes(encoded) == [INFINITE[format] + 127]
        decoded = encoded.decode(torch.float64)
        assert decoded.isfinite().all(), "finite in f64; in f32 the value itself may exceed the range"
        assert float(decoded[0]) == -float(decoded[1]) > 1e38
    assert scale_bytes(mxloom.encode(x, format, scale_rule="rceil")) == [254]


@pytest.mark.parametrize("format", ["int8_channel", "int4_g32", "int8_affine", "nvfp4", "fp8_e4m3_tensor", "ternary"])
def test_infinity_under_a_float_scale(format: str) -> None:
    encoded = mxloom.encode(block(torch.inf, -torch.inf, 1.0).reshape(1, 32), format)
    assert encoded.scales is not None
    assert encoded.scales.float().isfinite().all()
    decoded = encoded.decode()
    assert not decoded.isnan().any() and float(decoded[0, 0]) > 2e37 > -2e37 > float(decoded[0, 1])


def test_honest_bits() -> None:
    """600 000 weights in MXFP4, 300 000 in NVFP4 in three tensors, 100 000 in bf16."""
    nvfp4 = 3 * storage_bits(format_of("nvfp4"), (625, 160))
    bf16 = storage_bits(format_of("bf16"), (100, 1_000))
    mxfp4 = storage_bits(format_of("mxfp4"), (6_250, 96))
    assert (mxfp4 + nvfp4 + bf16) / 1e6 == 5.500096
    assert storage_bits(format_of("int4_g128"), (64, 256)) / (64 * 256) == 4.125
    assert storage_bits(format_of("int4_g128_affine"), (64, 256)) / (64 * 256) == 4.15625


def test_ragged_rows_are_padded_and_counted() -> None:
    assert storage_bits(format_of("mxfp4"), (1, 4304)) == 18_360
    assert storage_bits(format_of("mxfp4"), (7, 4304)) == 7 * 18_360
    assert storage_bits(format_of("int4_g128"), (1, 192)) / 192 == 5.5
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 4304, generator=generator)
    encoded = mxloom.encode(x, "mxfp4")
    assert encoded.scales is not None and encoded.scales.shape == (2, 135)
    assert encoded.bits_per_element == pytest.approx(4.265799, abs=1e-6)
    assert encoded.packed().numel() + 2 * 135 == 2 * 2295
    last = mxloom.encode(x[:, 4288:].contiguous(), "mxfp4")
    assert last.scales is not None
    assert torch.equal(last.scales.view(torch.uint8), encoded.scales[:, 134:].view(torch.uint8))
    assert torch.equal(last.decode(), encoded.decode()[:, 4288:])


def test_mantissa_carry_of_mase() -> None:
    """Its MXFP emulator drops the carry: 1.97 became 1, 1.75 became 1, .26 became 0 (algorithms B.6)."""
    for format in MXFP[2:]:
        rounded = mxloom.fake_quantize(block(1.97, 1.75, 0.26, 4.0), format, scale_rule="floor")
        assert float(rounded[0]) == 2.0, format
    e2m1 = mxloom.fake_quantize(torch.tensor([1.97, 1.75, 0.26, 0.24]), "f4E2M1FN")
    assert e2m1.tolist() == [2.0, 2.0, 0.5, 0.0]


@pytest.mark.parametrize(
    ("format", "error"),
    [("mxfp4", 0.1168), ("mxfp8_e4m3", 0.0302), ("mxfp6_e2m3", 0.0287), ("mxfp8_e5m2", 0.055), ("mxfp6_e3m2", 0.055)],
)
def test_relative_error_of_gaussian_data(format: str, error: float) -> None:
    """Right values where MASE had .1945, .0785, .1047, .1129, .1129 (algorithms B.6): floor, relative L2."""
    x = torch.from_numpy(np.random.default_rng(0).standard_normal(1 << 18)).float().reshape(-1, 32)
    q = mxloom.fake_quantize(x, format, scale_rule="floor")
    assert float((q - x).norm() / x.norm()) == pytest.approx(error, abs=0.0025)


def test_hardware_integers_of_mase_do_not_vanish() -> None:
    """Its mxint_hardware saturated everything to about 2.4e-7, and shared biases had the wrong sign at 1e-3 and 1e3."""
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(64, 32, generator=generator)
    for format in ("mxint8", "mxfp8_e4m3", "bfp16"):
        for scale in (1e-3, 1.0, 1e3):
            error = (mxloom.fake_quantize(x * scale, format) - x * scale).norm() / (x * scale).norm()
            assert float(error) < 0.04, (format, scale)


def test_mxint_of_a_power_of_two_is_exact() -> None:
    """MASE's ceil rule gives .875 for 1.0 in 4 bits."""
    for format in ("mxint8", "mxint6", "mxint4", "mxint3", "mxint2"):
        assert float(mxloom.fake_quantize(block(1.0), format)[0]) == 1.0


def test_clip_makes_the_scale_for_a_part_of_the_largest_magnitude() -> None:
    x = block(8.0, 1.0, -0.5)
    half = mxloom.encode(x, "int8_channel", clip=0.5)
    assert half.scales is not None
    assert float(half.scales) == float(np.float32(4.0) / np.float32(127))
    assert half.codes[:3].tolist() == [127, 32, -16]
    assert scale_bytes(mxloom.encode(x, "mxfp4", scale_rule="rceil", clip=0.75)) == [127]
    assert scale_bytes(mxloom.encode(x, "mxfp4", scale_rule="rceil")) == [128]
    nvfp4 = mxloom.encode(x.reshape(2, 16), "nvfp4", clip=0.5)
    assert nvfp4.global_scale is not None
    assert float(nvfp4.global_scale) == pytest.approx(4 / 2688)


def test_mixed_needs_a_threshold_or_a_choice() -> None:
    mixed = format_of("mixed<!mx.block<16xf4E2M1FN, f8E4M3FN, f32>, !mx.block<?x?xf8E4M3FN, f32>>")
    x = torch.randn(4, 64)
    with pytest.raises(MxloomError, match="needs a threshold"):
        quantize(x, mixed)
    with pytest.raises(UsageError, match="nothing says which: run the pass `mix`"):
        encode_tensor(x, mixed)
    assert torch.equal(quantize(x, mixed, Rounding(threshold=-1.0)), mxloom.fake_quantize(x, "fp8_e4m3_tensor"))
    assert torch.equal(quantize(x, mixed, Rounding(threshold=torch.inf)), mxloom.fake_quantize(x, "nvfp4"))


@pytest.mark.parametrize("name", [n for n in INSTANCES if n not in ("f32", "bf16", "f16")])
@pytest.mark.parametrize("rounding", ["rne", "rna", "rtz"])
@pytest.mark.parametrize("value", [float("inf"), 1e37, -1e37, 3.4e38, 1e-45])
def test_no_number_becomes_nan(name: str, rounding: str, value: float):
    x = torch.full((1, 128), 1.0)
    x[0, 3] = value
    rounded = mxloom.fake_quantize(x, name, rounding=rounding)
    assert not rounded.isnan().any()
    assert torch.equal(mxloom.encode(x, name, rounding=rounding).decode(), rounded)
