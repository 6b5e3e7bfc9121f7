"""Blocks against independent libraries: element codes by ml_dtypes and gfloat, whole blocks by torchao.

Known deviations of torchao 0.18, kept out of the inputs or recomputed here: its scale is at least 2^-126, so blocks of
byte 0 differ; rceil rounds amax / max to f32 and takes log2 of it; NVFP4 multiplies by a rounded reciprocal,
with scales of at least 2^-6.
"""

from collections.abc import Iterator

import gfloat
import gfloat.formats
import ml_dtypes
import numpy as np
import pytest
import torch
from torchao.prototype.mx_formats.config import ScaleCalculationMode
from torchao.prototype.mx_formats.kernels import unpack_uint4
from torchao.prototype.mx_formats.mx_tensor import to_mx
from torchao.prototype.mx_formats.nvfp4_tensor import nvfp4_quantize, per_tensor_amax_to_scale

import mxloom

RULES = ("floor", "ceil", "even", "rceil")
# name: element of ml_dtypes, of gfloat, of torchao
MX = {
    "mxfp8_e4m3": (ml_dtypes.float8_e4m3fn, gfloat.formats.format_info_ocp_e4m3, torch.float8_e4m3fn),
    "mxfp8_e5m2": (ml_dtypes.float8_e5m2, gfloat.formats.format_info_ocp_e5m2, torch.float8_e5m2),
    "mxfp6_e2m3": (ml_dtypes.float6_e2m3fn, gfloat.formats.format_info_ocp_e2m3, "fp6_e2m3"),
    "mxfp6_e3m2": (ml_dtypes.float6_e3m2fn, gfloat.formats.format_info_ocp_e3m2, "fp6_e3m2"),
    "mxfp4": (ml_dtypes.float4_e2m1fn, gfloat.formats.format_info_ocp_e2m1, torch.float4_e2m1fn_x2),
}
COUNTS = [pytest.param(10_000, id="1e4"), pytest.param(1_000_000, id="1e6", marks=pytest.mark.slow)]
E2M1_TIES = np.array([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0], np.float32)
CHUNK = 50_000


def blocks(count: int, size: int, reach: int = 90) -> Iterator[torch.Tensor]:
    """Chunks [n, size] of f32 blocks: magnitudes over 2 * reach binades, outliers, zeros, values on ties."""
    generator = torch.Generator().manual_seed(count + size)
    for start in range(0, count, CHUNK):
        shape = (min(CHUNK, count - start), size)
        x = torch.randn(shape, generator=generator)
        x *= torch.where(torch.rand(shape, generator=generator) < 0.05, 30.0, 1.0)
        x *= torch.where(torch.rand(shape, generator=generator) < 0.05, 0.0, 1.0)
        coarse = x.to(torch.float8_e5m2).float()
        x = torch.where(torch.rand((shape[0], 1), generator=generator) < 0.3, coarse, x)
        exponents = torch.randint(-reach, reach, (shape[0], 1), generator=generator)
        yield torch.ldexp(x, exponents)


def parts(x: torch.Tensor, format: str, rule: str | None = None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes, scales, values."""
    encoded = mxloom.encode(x, format, scale_rule=rule)
    assert encoded.scales is not None
    scales = encoded.scales
    scales = scales.view(torch.uint8) if scales.dtype == torch.float8_e8m0fnu else scales.float()
    return encoded.codes.numpy(), scales.numpy(), encoded.decode().numpy()


def reference_exponent(x: np.ndarray, rule: str, largest: float, mantissa: int) -> np.ndarray:
    """The scale exponent of algorithms B.2 in float64 arithmetic on integers."""
    bits = np.abs(x).max(-1).astype(np.float32).view(np.int32).astype(np.int64)
    top = int(np.floor(np.log2(largest)))
    field = (bits >> 23) - 127
    if rule == "floor":
        return field - top
    if rule == "ceil":
        return field + ((bits & 0x7FFFFF) > 0) - top
    if rule == "even":
        return ((bits + (1 << (22 - mantissa))) >> 23) - 127 - top
    exponent = field - top - 1
    amax = np.abs(x).max(-1).astype(np.float64)
    while (short := amax > largest * 2.0**exponent).any():
        exponent = exponent + short
    return exponent


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("format", MX)
def test_mx_blocks(format: str, rule: str, count: int) -> None:
    element, info, torchao_element = MX[format]
    largest, mantissa = float(ml_dtypes.finfo(element).max), ml_dtypes.finfo(element).nmant
    for x in blocks(count // 4, 32):
        codes, bytes_, values = parts(x, format, rule)
        wide = x.numpy().astype(np.float64)
        nonzero = np.abs(wide).max(-1) > 0
        exponent = np.where(nonzero, reference_exponent(x.numpy(), rule, largest, mantissa), -127)
        np.testing.assert_array_equal(bytes_[:, 0], exponent + 127)
        scaled = np.clip(wide * 2.0 ** -exponent[:, None], -largest, largest)
        cast = scaled.astype(element)
        np.testing.assert_array_equal(codes, cast.view(np.uint8))
        np.testing.assert_array_equal(values, cast.astype(np.float64) * 2.0 ** exponent[:, None])
        rounded = gfloat.round_ndarray(info, scaled, gfloat.RoundMode.TiesToEven, sat=True)
        np.testing.assert_array_equal(codes, gfloat.encode_ndarray(info, rounded))
        if rule != "rceil":
            compare_with_torchao(x[nonzero], codes[nonzero], bytes_[nonzero], torchao_element, rule)


def compare_with_torchao(x: torch.Tensor, codes: np.ndarray, bytes_: np.ndarray, element: object, rule: str) -> None:
    scales, data = to_mx(x.contiguous(), element, 32, ScaleCalculationMode[rule.upper()])  # pyright: ignore[reportArgumentType]
    np.testing.assert_array_equal(bytes_, scales.view(torch.uint8).reshape(-1, 1).numpy())
    theirs = unpack_uint4(data) if element == torch.float4_e2m1fn_x2 else data.view(torch.uint8)
    np.testing.assert_array_equal(codes, theirs.reshape(codes.shape).numpy())


@pytest.mark.parametrize("format", MX)
def test_rceil_of_torchao_differs_only_where_it_rounds_the_quotient(format: str) -> None:
    element, _, torchao_element = MX[format]
    largest = float(ml_dtypes.finfo(element).max)
    differing = 0
    for x in blocks(10_000, 32):
        x = x[x.abs().amax(-1) > 0].contiguous()
        _, bytes_, _ = parts(x, format, "rceil")
        scales, _ = to_mx(x, torchao_element, 32, ScaleCalculationMode.RCEIL)  # pyright: ignore[reportArgumentType]
        theirs = scales.view(torch.uint8).reshape(-1, 1).numpy()
        quotient = x.abs().amax(-1, keepdim=True).double().numpy() / largest
        near_a_power = np.abs(np.log2(quotient) - np.rint(np.log2(quotient))) < 1e-6
        assert not ((bytes_ != theirs) & ~near_a_power).any()
        differing += int((bytes_ != theirs).sum())
    assert differing <= 5


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize(
    ("format", "width"), [("mxint8", 8), ("mxint6", 6), ("mxint4", 4), ("mxint3", 3), ("mxint2", 2)]
)
def test_mxint_blocks(format: str, width: int, count: int) -> None:
    """E = floor(log2 amax); code = clamp(rne(x * 2^(b-2) / 2^E), +-(2^(b-1) - 1)): OCP MX 1.0, section 6.3."""
    top = 2 ** (width - 1) - 1
    for x in blocks(count, 32):
        codes, bytes_, values = parts(x, format)
        wide = x.numpy().astype(np.float64)
        amax = np.abs(wide).max(-1, keepdims=True)
        exponent = np.where(amax > 0, np.frexp(amax)[1] - 1, -127)
        scaled = np.clip(np.rint(wide * 2.0 ** (width - 2 - exponent)), -top, top)
        np.testing.assert_array_equal(bytes_, exponent + 127)
        np.testing.assert_array_equal(codes, scaled)
        np.testing.assert_array_equal(values, scaled * 2.0 ** (exponent - width + 2))
        if width == 8:
            info = gfloat.formats.format_info_ocp_int8
            unit = np.clip(wide * 2.0**-exponent, -127 / 64, 127 / 64)
            rounded = gfloat.round_ndarray(info, unit, gfloat.RoundMode.TiesToEven, sat=True)
            np.testing.assert_array_equal(codes, rounded * 64)


def test_whole_blocks_of_gfloat() -> None:
    """gfloat's own block quantizer: floor, with a floating log2 that is exact enough for these blocks."""
    for name, info in (
        ("mxfp8_e4m3", gfloat.formats.format_info_mxfp8_e4m3),
        ("mxfp8_e5m2", gfloat.formats.format_info_mxfp8_e5m2),
        ("mxfp6_e2m3", gfloat.formats.format_info_mxfp6_e2m3),
        ("mxfp6_e3m2", gfloat.formats.format_info_mxfp6_e3m2),
        ("mxfp4", gfloat.formats.format_info_mxfp4_e2m1),
    ):
        x = next(blocks(200, 32))
        _, _, values = parts(x, name, "floor")
        wide = x.numpy().astype(np.float64)
        theirs = [gfloat.quantize_block(info, block, gfloat.compute_scale_amax) for block in wide]
        np.testing.assert_array_equal(values, np.stack(theirs), err_msg=name)


@pytest.mark.parametrize("count", COUNTS)
def test_nvfp4_blocks(count: int) -> None:
    for x in blocks(count, 16, reach=8):
        encoded = mxloom.encode(x, "nvfp4")
        assert encoded.scales is not None and encoded.global_scale is not None
        gs = np.abs(x.numpy()).max() / np.float32(6 * 448)
        assert float(encoded.global_scale) == gs == float(per_tensor_amax_to_scale(x.abs().amax()))
        quotient = np.abs(x.numpy()).max(-1, keepdims=True) / np.float32(6) / gs
        scales = np.clip(quotient, 2.0**-9, 448).astype(ml_dtypes.float8_e4m3fn)
        np.testing.assert_array_equal(encoded.scales.view(torch.uint8).numpy(), scales.view(np.uint8))
        factors = scales.astype(np.float32) * gs
        elements = np.clip(x.numpy() / factors, -6, 6).astype(ml_dtypes.float4_e2m1fn)
        np.testing.assert_array_equal(encoded.codes.numpy(), elements.view(np.uint8))
        np.testing.assert_array_equal(encoded.decode().numpy(), elements.astype(np.float32) * factors)
        their_scales, their_codes = nvfp4_quantize(x, 16, encoded.global_scale)
        assert torch.equal(their_scales.view(torch.uint8).reshape(-1, 1), smallest_normal(encoded.scales))
        reciprocal = (np.float32(1) / gs) / their_scales.float().reshape(-1, 1).numpy()
        by_reciprocal = np.clip(x.numpy() * reciprocal, -6, 6).astype(ml_dtypes.float4_e2m1fn)
        theirs = unpack_uint4(their_codes).reshape(x.shape).numpy()
        np.testing.assert_array_equal(theirs, by_reciprocal.view(np.uint8))
        moved = (theirs != encoded.codes.numpy()) & (scales.astype(np.float32) >= 2.0**-6)
        to_a_tie = np.abs(np.abs(x.numpy() / factors)[..., None] - E2M1_TIES).min(-1)
        assert (to_a_tie[moved] < 1e-6).all(), "the reciprocal moves only values that stand next to a tie"


def test_nvfp4_single_level_blocks_of_torchao() -> None:
    for x in blocks(10_000, 16, reach=6):
        encoded = mxloom.encode(x, "!mx.block<16xf4E2M1FN, f8E4M3FN>")
        their_scales, _ = nvfp4_quantize(x, 16)
        assert encoded.scales is not None
        assert torch.equal(smallest_normal(encoded.scales), their_scales.view(torch.uint8).reshape(-1, 1))


def smallest_normal(scales: torch.Tensor) -> torch.Tensor:
    """The bytes of E4M3 scales, not below 2^-6 as torchao has them."""
    return scales.view(torch.uint8).clamp(min=0x08)


@pytest.mark.parametrize(("width", "group"), [(4, 32), (4, 128), (2, 64)])
@pytest.mark.parametrize("count", COUNTS)
def test_integer_groups_with_bf16_scales(width: int, group: int, count: int) -> None:
    """scale = bf16(amax / (2^(b-1) - 1)) by ml_dtypes, code = rint(x / scale)."""
    top = 2 ** (width - 1) - 1
    for x in blocks(count * 32 // group, group, reach=60):
        codes, scales, values = parts(x, f"int{width}_g{group}")
        amax = np.abs(x.numpy()).max(-1, keepdims=True)
        expected = np.where(amax > 0, (amax.astype(np.float64) / top), 1).astype(ml_dtypes.bfloat16)
        np.testing.assert_array_equal(scales, expected.astype(np.float32))
        divided = np.clip(np.rint(x.numpy() / scales), -top, top)
        np.testing.assert_array_equal(codes, divided)
        np.testing.assert_array_equal(values, divided * scales)
