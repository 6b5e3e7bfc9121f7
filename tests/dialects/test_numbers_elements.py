"""Elements one by one, against ml_dtypes and gfloat: every code, every finite bf16 value, edges of the subnormals."""

from fractions import Fraction

import gfloat
import gfloat.formats
import ml_dtypes
import numpy as np
import pytest
import torch

import mxloom
from mxloom.dialects.errors import MxloomError
from mxloom.dialects.formats import Encoded, bits, encode_tensor
from mxloom.dialects.instances import format_of

ELEMENTS = {
    "f4E2M1FN": (ml_dtypes.float4_e2m1fn, gfloat.formats.format_info_ocp_e2m1),
    "f6E2M3FN": (ml_dtypes.float6_e2m3fn, gfloat.formats.format_info_ocp_e2m3),
    "f6E3M2FN": (ml_dtypes.float6_e3m2fn, gfloat.formats.format_info_ocp_e3m2),
    "f8E4M3FN": (ml_dtypes.float8_e4m3fn, gfloat.formats.format_info_ocp_e4m3),
    "f8E5M2": (ml_dtypes.float8_e5m2, gfloat.formats.format_info_ocp_e5m2),
    "f8E3M4": (ml_dtypes.float8_e3m4, None),
    "f8E4M3": (ml_dtypes.float8_e4m3, None),
    "f8E4M3FNUZ": (ml_dtypes.float8_e4m3fnuz, None),
    "f8E5M2FNUZ": (ml_dtypes.float8_e5m2fnuz, None),
    "f8E4M3B11FNUZ": (ml_dtypes.float8_e4m3b11fnuz, None),
}
# same numbers, spelled as a type of the dialect
SPELLED = {
    "float<2,1>": ml_dtypes.float4_e2m1fn,
    "float<2,3>": ml_dtypes.float6_e2m3fn,
    "float<3,2>": ml_dtypes.float6_e3m2fn,
}


def all_codes(bits: int) -> torch.Tensor:
    return torch.arange(1 << bits).to(torch.uint8)


def finite_bf16() -> torch.Tensor:
    """All 65 280 finite bf16 values."""
    x = torch.arange(-(1 << 15), 1 << 15).to(torch.int16).view(torch.bfloat16)
    x = x[x.isfinite()]
    assert len(x) == 65_280
    return x


@pytest.mark.parametrize("name", [*ELEMENTS, *SPELLED])
def test_every_code_has_the_value_of_ml_dtypes(name: str) -> None:
    theirs = ELEMENTS[name][0] if name in ELEMENTS else SPELLED[name]
    format = format_of(name)
    codes = all_codes(ml_dtypes.finfo(theirs).bits)
    expected = codes.numpy().view(theirs).astype(np.float64)
    for dtype in (torch.float32, torch.float64):
        values = Encoded(format, tuple(codes.shape), codes).decode(dtype)
        np.testing.assert_array_equal(values.double().numpy(), expected)
        np.testing.assert_array_equal(
            np.signbit(values.numpy())[~np.isnan(expected)], np.signbit(expected)[~np.isnan(expected)]
        )


@pytest.mark.parametrize("name", [*ELEMENTS, *SPELLED])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_decode_then_encode_is_the_identity(name: str, dtype: torch.dtype) -> None:
    format = format_of(name)
    codes = all_codes(int(bits(format)))
    values = Encoded(format, tuple(codes.shape), codes).decode(dtype)
    finite = values.isfinite()
    assert torch.equal(encode_tensor(values[finite], format).codes, codes[finite])


@pytest.mark.parametrize(
    ("name", "count"), [("f4E2M1FN", 16), ("f6E2M3FN", 64), ("f6E3M2FN", 64), ("f8E4M3FN", 254), ("f8E5M2", 248)]
)
def test_codes_come_back_through_blocks(name: str, count: int) -> None:
    """Scale 1, codes given: each block holds one code and the format's largest value, which keeps the scale."""
    format = format_of(f"!mx.block<2x{name}>")
    codes = all_codes(int(bits(format_of(name))))
    values = Encoded(format_of(name), tuple(codes.shape), codes).decode()
    codes = codes[values.isfinite()]
    values = values[values.isfinite()]
    assert len(codes) == count
    pairs = torch.stack([values, torch.full_like(values, float(values.max()))], dim=-1)
    encoded = encode_tensor(pairs, format)
    assert encoded.scales is not None
    assert set(encoded.scales.view(torch.uint8).flatten().tolist()) == {127}
    assert torch.equal(encoded.codes[:, 0], codes)


@pytest.mark.parametrize(
    ("name", "smallest"),
    [("f4E2M1FN", 0.5), ("f6E2M3FN", 0.125), ("f6E3M2FN", 0.0625), ("f8E4M3FN", 2.0**-9), ("f8E5M2", 2.0**-16)],
)
def test_around_half_of_the_smallest_subnormal(name: str, smallest: float) -> None:
    half = torch.tensor(smallest / 2)
    x = torch.stack([half, torch.nextafter(half, torch.tensor(1.0)), torch.tensor(1.5 * smallest)])
    assert mxloom.fake_quantize(x, name).tolist() == [0.0, smallest, 2 * smallest]
    assert mxloom.fake_quantize(-x, name).tolist() == [-0.0, -smallest, -2 * smallest]


@pytest.mark.parametrize("name", ELEMENTS)
def test_all_finite_bf16_values(name: str) -> None:
    theirs, info = ELEMENTS[name]
    x = finite_bf16()
    largest = float(ml_dtypes.finfo(theirs).max)
    wide = np.clip(x.double().numpy(), -largest, largest)
    encoded = mxloom.encode(x, name)
    np.testing.assert_array_equal(encoded.codes.numpy(), wide.astype(theirs).view(np.uint8))
    np.testing.assert_array_equal(encoded.decode().double().numpy(), wide.astype(theirs).astype(np.float64))
    if info is None:
        return
    modes = {
        "rne": gfloat.RoundMode.TiesToEven,
        "rna": gfloat.RoundMode.TiesToAway,
        "rtz": gfloat.RoundMode.TowardZero,
    }
    for rounding, mode in modes.items():
        expected = gfloat.round_ndarray(info, x.double().numpy(), mode, sat=True)
        np.testing.assert_array_equal(mxloom.fake_quantize(x.double(), name, rounding=rounding).numpy(), expected)


@pytest.mark.parametrize(("name", "dtype"), [("bf16", torch.bfloat16), ("f16", torch.float16), ("f32", torch.float32)])
def test_wide_floats_round_as_torch_does(name: str, dtype: torch.dtype) -> None:
    x = torch.cat([finite_bf16().float(), torch.randn(100_000) * 1e-6, torch.randn(100_000) * 65_504])
    x = torch.cat([x, torch.tensor([torch.inf, -torch.inf, torch.nan])])
    ours = mxloom.fake_quantize(x, name)
    torch.testing.assert_close(ours, x.to(dtype).float(), rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(mxloom.encode(x, name).decode(), ours, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", ["bf16", "f16"])
def test_wide_floats_from_f64_round_once(name: str) -> None:
    """Just above a tie that f32 does not see: through f32 the value would fall back to the even neighbour."""
    ulp = 2.0**-7 if name == "bf16" else 2.0**-10
    x = torch.tensor([1 + ulp / 2 + 2.0**-40], dtype=torch.float64)
    assert float(mxloom.fake_quantize(x, name)) == 1 + ulp
    assert float(x.float().to({"bf16": torch.bfloat16, "f16": torch.float16}[name])) == 1.0


@pytest.mark.parametrize(("name", "largest"), [("bf16", 3.3895313892515355e38), ("f16", 65504.0)])
def test_overflow_of_wide_floats(name: str, largest: float) -> None:
    x = torch.tensor([largest * 1.003, -largest * 1.003, torch.inf], dtype=torch.float64)
    assert mxloom.fake_quantize(x, name).tolist() == [torch.inf, -torch.inf, torch.inf]
    assert mxloom.fake_quantize(x, name, rounding="rtz").tolist() == [largest, -largest, torch.inf]


@pytest.mark.parametrize("name", ["bf16", "f16", "f32"])
@pytest.mark.parametrize("rounding", ["rna", "rtz"])
def test_wide_floats_in_other_modes(name: str, rounding: str) -> None:
    info = {
        "bf16": gfloat.formats.format_info_bfloat16,
        "f16": gfloat.formats.format_info_binary16,
        "f32": gfloat.formats.format_info_binary32,
    }[name]
    x = torch.randn(5_000, dtype=torch.float64) * torch.logspace(-9, 4, 5_000, dtype=torch.float64)
    mode = gfloat.RoundMode.TiesToAway if rounding == "rna" else gfloat.RoundMode.TowardZero
    expected = gfloat.round_ndarray(info, x.numpy(), mode)
    np.testing.assert_array_equal(mxloom.fake_quantize(x, name, rounding=rounding).numpy(), expected)


def test_infinity_saturates_in_narrow_floats() -> None:
    x = torch.tensor([torch.inf, -torch.inf, 1e30])
    assert mxloom.fake_quantize(x, "f8E5M2").tolist() == [57344.0, -57344.0, 57344.0]
    assert mxloom.fake_quantize(x, "f8E4M3FN").tolist() == [448.0, -448.0, 448.0]


def test_nan_has_a_code_or_is_refused() -> None:
    x = torch.tensor([1.0, torch.nan])
    assert mxloom.encode(x, "f8E4M3FN").codes.tolist() == [0x38, 0x7F]
    assert mxloom.encode(x, "f8E4M3FN").decode().isnan().tolist() == [False, True]
    for format in ("f4E2M1FN", "fixed<8,6>", "!mx.ternary"):
        assert mxloom.fake_quantize(x, format).isnan().tolist() == [False, True]
        with pytest.raises(MxloomError, match="NaN has no code"):
            mxloom.encode(x, format)


def test_negative_zero_stays_in_floats_only() -> None:
    x = torch.tensor([-0.0, -0.01, 1.0])
    for format in ("f4E2M1FN", "f8E4M3FN", "mxfp4", "mxfp6_e3m2"):
        assert str(float(mxloom.fake_quantize(x, format)[0])) == "-0.0", format
    for format in ("fixed<4,2>", "mxint4", "int8_channel", "!mx.ternary", "f8E4M3FNUZ"):
        encoded = mxloom.encode(x, format)
        assert int(encoded.codes[0]) == 0, format
        assert str(float(encoded.decode()[0])) == str(float(mxloom.fake_quantize(x, format)[0])) == "0.0", format


# integers shifted right by three bits (field case H1); 'floor' is no mode of ours
SHIFTED = {
    "rne": [-2, -2, -2, -1, 0, 0, 1, 2, 2, 2],
    "rna": [-3, -2, -2, -1, -1, 1, 1, 2, 2, 3],
    "rtz": [-2, -1, -1, -1, 0, 0, 1, 1, 1, 2],
}


@pytest.mark.parametrize("rounding", SHIFTED)
def test_fixed_point_rounding(rounding: str) -> None:
    x = torch.tensor([-20.0, -13, -12, -11, -4, 4, 11, 12, 13, 20]) / 8
    assert mxloom.fake_quantize(x, "fixed<8,0>", rounding=rounding).tolist() == SHIFTED[rounding]
    scaled = mxloom.fake_quantize(x * 2.0**-6, "fixed<8,6>", rounding=rounding)
    assert (scaled * 64).tolist() == SHIFTED[rounding]


def test_fixed_point_saturates() -> None:
    x = torch.tensor([8.99, -8.5, 7.99, torch.inf, -torch.inf])
    assert mxloom.fake_quantize(x, "fixed<10,6>").tolist() == [7.984375, -8.0, 7.984375, 7.984375, -8.0]
    assert mxloom.encode(x, "fixed<10,6>").codes.tolist() == [511, -512, 511, 511, -512]


@pytest.mark.parametrize("width", [2, 7, 8, 12, 16, 24, 32])
def test_every_end_of_a_fixed_point_format(width: int) -> None:
    codes = torch.tensor([-(1 << (width - 1)), -1, 0, 1, (1 << (width - 1)) - 1], dtype=torch.float64)
    encoded = mxloom.encode(codes * 2.0**-5, f"fixed<{width},5>")
    assert encoded.codes.tolist() == codes.tolist()
    back = Encoded.from_tensors(encoded.format, encoded.shape, encoded.tensors())
    assert torch.equal(back.decode(torch.float64), codes * 2.0**-5)


def nearest(x: Fraction, rounding: str) -> int:
    """Rounding of an exact fraction to an integer."""
    below, rest = divmod(abs(x), 1)
    up = {"rne": rest > Fraction(1, 2) or (rest == Fraction(1, 2) and below % 2 == 1), "rna": rest >= Fraction(1, 2)}
    magnitude = int(below) + (rounding in up and up[rounding])
    return magnitude if x >= 0 else -magnitude


@pytest.mark.parametrize("rounding", ["rne", "rna", "rtz"])
def test_rounding_equals_exact_fractions(rounding: str) -> None:
    edges = torch.tensor([0.5, 1.5, 2.5, 0.49999997, 0.50000006, 1.4999999, 2.5000002, 4194303.5, 8388607.5])
    x = torch.cat([edges, -edges, torch.randn(2_000) * 4])
    ours = mxloom.fake_quantize(x, "fixed<24,0>", rounding=rounding)
    assert ours.tolist() == [min(nearest(Fraction(value), rounding), (1 << 23) - 1) for value in x.tolist()]


def test_stochastic_rounding_is_unbiased_and_repeatable() -> None:
    """10^6 draws: the mean is within six standard errors of the value, neighbours only."""
    for value, format, low, high in ((0.3, "fixed<8,0>", 0, 1), (-2.3, "f4E2M1FN", -3, -2), (5.0, "f4E2M1FN", 4, 6)):
        x = torch.full((1_000_000,), value)
        ours = mxloom.fake_quantize(x, format, rounding="stochastic", seed=5).double()
        assert set(ours.tolist()) == {low, high}
        share = (value - low) / (high - low)
        error = (share * (1 - share) / len(x)) ** 0.5 * (high - low)
        assert abs(float(ours.mean()) - value) < 6 * error
        assert torch.equal(ours, mxloom.fake_quantize(x, format, rounding="stochastic", seed=5).double())
        assert not torch.equal(ours, mxloom.fake_quantize(x, format, rounding="stochastic", seed=6).double())


def test_stochastic_rounding_keeps_what_is_exact() -> None:
    x = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -6.0]).repeat(1000)
    assert torch.equal(mxloom.fake_quantize(x, "f4E2M1FN", rounding="stochastic"), x)
