"""Properties of rounding (algorithms G), signal to noise (B.7), and that encoding and quantizing are one definition."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import mxloom
from mxloom.dialects.formats import Encoded, Rounding, encode_tensor, quantize
from mxloom.dialects.instances import INSTANCES, format_of

MXFP = ("mxfp8_e4m3", "mxfp8_e5m2", "mxfp6_e2m3", "mxfp6_e3m2", "mxfp4")
MXINT = ("mxint8", "mxint6", "mxint4", "mxint3", "mxint2", "bfp16")
PLAIN = ("fixed<8,6>", "bf16", "f16", "f32")
ROUNDINGS = ("rne", "rna", "rtz", "stochastic")
SHAPES = [
    ((), -1),
    ((1,), -1),
    ((33,), -1),
    ((3, 100), -1),
    ((5, 64), -2),
    ((2, 3, 70), -1),
    ((4, 35, 3), 1),
    ((2, 0), -1),
]


def gaussian(shape: tuple[int, ...], seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.dtype.itemsize]
    return a.dtype == b.dtype and torch.equal(a.contiguous().view(integer), b.contiguous().view(integer))


@pytest.mark.parametrize("format", INSTANCES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_decoding_what_was_encoded_is_fake_quantization(format: str, dtype: torch.dtype) -> None:
    for seed, (shape, dim) in enumerate(SHAPES):
        if not shape and format not in PLAIN:
            continue
        for rounding in ROUNDINGS:
            x = gaussian(shape, seed, dtype)
            encoded = mxloom.encode(x, format, dim=dim, rounding=rounding, seed=7)
            quantized = mxloom.fake_quantize(x, format, dim=dim, rounding=rounding, seed=7)
            assert encoded.codes.shape == quantized.shape == x.shape
            assert same_bits(encoded.decode(dtype), quantized), (shape, dim, rounding)


@pytest.mark.parametrize("format", INSTANCES)
def test_what_is_stored_comes_back_and_is_what_was_counted(format: str) -> None:
    for seed, (shape, dim) in enumerate(SHAPES):
        if not shape and format not in PLAIN:
            continue
        encoded = mxloom.encode(gaussian(shape, seed), format, dim=dim)
        tensors = encoded.tensors()
        back = Encoded.from_tensors(encoded.format, encoded.shape, tensors)
        assert torch.equal(back.codes, encoded.codes)
        assert same_bits(back.decode(), encoded.decode())
        stored = sum(tensor.numel() * tensor.dtype.itemsize * 8 for tensor in tensors.values())
        partial_bytes = sum(tensor.dtype == torch.uint8 for tensor in tensors.values())
        assert 0 <= stored - encoded.storage_bits < 8 * partial_bytes


@pytest.mark.parametrize("format", INSTANCES)
def test_a_transposed_tensor_is_rounded_like_its_copy(format: str) -> None:
    x = gaussian((40, 64))
    along_rows = mxloom.fake_quantize(x, format)
    assert same_bits(mxloom.fake_quantize(x.T, format, dim=0).T, along_rows)
    assert same_bits(mxloom.encode(x.T, format, dim=0).decode().T, along_rows)


@pytest.mark.parametrize("format", INSTANCES)
def test_the_input_is_left_alone(format: str) -> None:
    x = gaussian((3, 40)).requires_grad_()
    before = x.detach().clone()
    for made in (mxloom.fake_quantize(x, format), mxloom.fake_quantize(x.detach(), format)):
        made.data.fill_(7.0)
    encoded = mxloom.encode(x, format)
    encoded.decode().fill_(7.0)
    assert same_bits(x.detach(), before)
    assert same_bits(encoded.decode(), mxloom.fake_quantize(before, format)), "decoding shares no memory with the codes"
    encoded.codes.zero_()
    assert same_bits(x.detach(), before)


@pytest.mark.parametrize("format", [*MXFP, *MXINT, *PLAIN])
def test_idempotence(format: str) -> None:
    x = gaussian((1024, 128), 3) * torch.exp2(torch.randint(-20, 20, (1024, 1)).float())
    for rule in ("floor", "ceil", "even", "rceil") if format in MXFP else (None,):
        once = mxloom.fake_quantize(x, format, scale_rule=rule)
        assert same_bits(mxloom.fake_quantize(once, format, scale_rule=rule), once), rule


@pytest.mark.parametrize("format", [name for name in INSTANCES if name not in PLAIN])
def test_idempotence_with_stored_scales(format: str) -> None:
    """Where scales are derived from the values again, rounding twice may move: with the stored scales it does not."""
    first = mxloom.encode(gaussian((64, 128), 4), format)
    again = encode_tensor(
        first.decode(),
        first.format,
        scales=first.scales,
        global_scale=first.global_scale,
        zero_points=first.zero_points,
    )
    assert torch.equal(again.codes, first.codes)


@pytest.mark.parametrize("format", [name for name in INSTANCES if "affine" not in name and name != "fixed<8,6>"])
@pytest.mark.parametrize("rounding", ["rne", "rna", "rtz"])
def test_sign_symmetry(format: str, rounding: str) -> None:
    x = gaussian((64, 128), 5)
    ours = mxloom.fake_quantize(x, format, rounding=rounding)
    assert torch.equal(mxloom.fake_quantize(-x, format, rounding=rounding), -ours)


@pytest.mark.parametrize("format", [name for name in INSTANCES if name not in ("f16", "fixed<8,6>")])
def test_scale_equivariance(format: str) -> None:
    x = gaussian((64, 128), 6)
    for exponent in (-30, -3, 1, 12):
        scaled = mxloom.fake_quantize(x * 2.0**exponent, format)
        assert torch.equal(scaled, mxloom.fake_quantize(x, format) * 2.0**exponent), exponent


@pytest.mark.parametrize("format", MXFP)
def test_error_is_half_a_step_where_nothing_is_clipped(format: str) -> None:
    """rceil never clips; the step at a is 2^(exponent of a - mantissa bits), not below the smallest subnormal."""
    mantissa = {"mxfp8_e4m3": 3, "mxfp8_e5m2": 2, "mxfp6_e2m3": 3, "mxfp6_e3m2": 2, "mxfp4": 1}[format]
    smallest = {"mxfp8_e4m3": -9, "mxfp8_e5m2": -16, "mxfp6_e2m3": -3, "mxfp6_e3m2": -4, "mxfp4": -1}[format]
    x = gaussian((512, 32), 7)
    encoded = mxloom.encode(x, format, scale_rule="rceil")
    assert encoded.scales is not None
    scale = encoded.scales.float().double()
    relative = x.double() / scale
    step = torch.exp2(torch.clamp(torch.floor(torch.log2(relative.abs())) - mantissa, min=smallest))
    error = (encoded.decode().double() / scale - relative).abs()
    assert (error <= step / 2).all()


# dB on 2^20 draws of numpy's default_rng(0): gauss, laplace, t with 4 degrees of freedom (algorithms B.7)
SIGNAL_TO_NOISE = {
    ("mxfp4", "floor"): (18.79, 17.94, 17.61),
    ("mxfp4", "ceil"): (16.83, 15.40, 14.81),
    ("mxfp4", "even"): (19.03, 18.14, 17.76),
    ("mxfp4", "rceil"): (18.76, 17.59, 17.12),
    ("mxfp8_e4m3", "floor"): (30.64, 29.97, 29.82),
    ("mxfp8_e4m3", "even"): (31.19, 30.81, 30.73),
    ("mxfp8_e4m3", "rceil"): (31.53, 31.55, 31.56),
    ("mxfp8_e5m2", "floor"): (25.35, 25.21, 25.17),
    ("mxfp8_e5m2", "rceil"): (25.54, 25.56, 25.56),
    ("mxfp6_e2m3", "floor"): (30.94, 30.30, 30.03),
    ("mxfp6_e2m3", "ceil"): (28.77, 27.29, 26.69),
    ("mxfp6_e2m3", "even"): (30.99, 30.34, 30.06),
    ("mxfp6_e2m3", "rceil"): (30.96, 30.24, 29.94),
    ("mxfp6_e3m2", "floor"): (25.35, 25.21, 25.17),
    ("mxfp6_e3m2", "rceil"): (25.54, 25.56, 25.56),
    ("mxint8", None): (41.66, 40.02, 39.32),
    ("mxint6", None): (29.62, 27.98, 27.28),
    ("mxint4", None): (17.56, 16.02, 15.35),
    ("nvfp4", None): (20.44, 20.66, 20.74),
    ("nvint4", None): (21.28, 19.77, 19.40),
    ("!mx.block<128xi4, f32>", None): (18.60, 15.91, 14.31),
    ("!mx.block<128xi4, f32, zero i4>", None): (19.95, 17.71, 16.77),
    ("!mx.block<32xi4, f32, zero i4>", None): (21.86, 20.50, 20.30),
    ("fp8_e4m3_tensor", None): (31.54, 31.53, 31.55),
    ("!mx.block<4096xi8, f32>", None): (41.23, 36.65, 31.64),
}


@pytest.fixture(scope="module")
def draws() -> list[torch.Tensor]:
    random, count = np.random.default_rng(0), 1 << 20
    drawn = (random.standard_normal(count), random.laplace(size=count), random.standard_t(4, size=count))
    return [torch.from_numpy(values.astype(np.float32)) for values in drawn]


@pytest.mark.parametrize(("format", "rule"), SIGNAL_TO_NOISE)
def test_signal_to_noise(format: str, rule: str | None, draws: list[torch.Tensor]) -> None:
    for x, expected in zip(draws, SIGNAL_TO_NOISE[format, rule], strict=True):
        noise = (mxloom.fake_quantize(x, format, scale_rule=rule) - x).double()
        ratio = 10 * float(torch.log10(x.double().square().sum() / noise.square().sum()))
        assert ratio == pytest.approx(expected, abs=0.02)


def test_more_bits_are_never_worse() -> None:
    x = gaussian((256, 128), 8)
    for family in (
        ("mxint2", "mxint3", "mxint4", "mxint6", "mxint8"),
        ("mxfp4", "mxfp6_e2m3"),
        ("int4_channel", "int8_channel"),
    ):
        errors = [float((mxloom.fake_quantize(x, format) - x).square().sum()) for format in family]
        assert errors == sorted(errors, reverse=True)


BLOCKS = st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=70)
TYPES = st.sampled_from(
    [
        *INSTANCES,
        "!mx.block<7x!mx.float<3, 1>>",
        "!mx.block<5x!mx.float<4, 0>, f16>",
        "!mx.block<6xf8E5M2, f8E5M2, f32>",
        "!mx.block<9xi5, f32, zero i5>",
        "!mx.block<3x!mx.fixed<12, 3>>",
        "!mx.block<4xbf16>",
        "!mx.block<4xf8E4M3FNUZ, bf16>",
        "!mx.float<5, 10>",
    ]
)


@settings(max_examples=300, deadline=None)
@given(BLOCKS, TYPES, st.sampled_from(ROUNDINGS), st.sampled_from([None, 0.7]))
def test_any_block_of_any_format(values: list[float], text: str, rounding: str, clip: float | None) -> None:
    """One definition whatever comes; what is on the grid stays on it; nothing finite becomes NaN."""
    format = format_of(text, rank=1)
    clip = clip if "block" in str(format) else None
    how = Rounding(rounding=rounding, clip=clip, seed=1)
    x = torch.tensor(values)
    encoded = encode_tensor(x, format, how)
    quantized = quantize(x, format, how)
    assert same_bits(encoded.decode(), quantized)
    assert not quantized.isnan().any()
    back = Encoded.from_tensors(format, encoded.shape, encoded.tensors())
    assert same_bits(back.decode(), quantized)
    assert torch.equal(x.signbit() & (quantized != 0), quantized.signbit() & (quantized != 0)) or "zero" in str(format)
