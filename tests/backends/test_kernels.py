"""Native kernels round to the bits of the definitions: every format, rule, rounding, kind of data and layout."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses import FakeTensorMode

import mxloom
from mxloom.backends.kernels import native
from mxloom.backends.kernels._prepared import STREAMED_FROM
from mxloom.backends.kernels.fake_quantization import reference_only, register, why_not
from mxloom.dialects import formats
from mxloom.dialects.errors import MxloomError, UsageError
from mxloom.dialects.formats import Rounding
from mxloom.dialects.instances import INSTANCES, format_of

WITHOUT_KERNEL = {"bf16", "f16", "f32"}
FORMATS = [name for name in INSTANCES if name not in WITHOUT_KERNEL]
OTHERS = ["f8E5M2", "!mx.float<5, 2>", "fixed<8,-3>", "!mx.block<4xf16>", "!mx.block<17xi5, f32>", "!mx.block<256xi8>"]
OTHERS += ["!mx.block<4xf8E5M2, f8E5M2, f32>", "!mx.block<4x8xf4E2M1FN>", "!mx.block<40xi4, f16>"]
OTHERS += ["fixed<8,12>", "!mx.block<32x!mx.fixed<8, 9>>", "!mx.block<16x!mx.fixed<4, 20>, f8E4M3FN, f32>"]
OTHERS += [
    "!mx.block<16x!mx.fixed<4, 6>, f32>",
    "!mx.block<16x!mx.fixed<5, 64>, bf16>",
    "!mx.block<8x!mx.fixed<4, 30>>",
]
OTHERS += ["!mx.block<8xi4, f16, zero i4>", "!mx.block<17xi8, f8E4M3FN, zero i8>", "!mx.block<4x8xi3, f8E5M2, zero i3>"]
OTHERS += ["!mx.block<32x!mx.ternary, bf16>", "!mx.block<?x!mx.ternary, f32>", "!mx.block<100x!mx.ternary, f16>"]
RULES = (None, "floor", "ceil", "even", "rceil", "absmax")
ROUNDINGS = ("rne", "rna", "rtz", "stochastic")

pytestmark = pytest.mark.skipif(
    native.why_not() is not None, reason=f"{native.why_not()}; run on x86-64 or 64-bit Arm with llvmlite"
)


def bits(x: torch.Tensor) -> torch.Tensor:
    """The bits of the numbers; any NaN as one."""
    x = torch.where(x.isnan(), torch.nan, x)
    return x.contiguous().view({2: torch.int16, 4: torch.int32}[x.dtype.itemsize])


def random_bits(shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """Numbers of all magnitudes, subnormals, infinities and NaN: any bits."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-(2**31), 2**31, shape, generator=generator).to(torch.int32).view(torch.float32)


def kinds_of_data() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    normal = torch.randn(64, 96, generator=generator)
    bits_without_nan = random_bits((64, 96), 2).nan_to_num(nan=0.0, posinf=torch.inf, neginf=-torch.inf)
    spread = torch.exp2(torch.randint(-140, 127, (64, 96), generator=generator).float())
    blocks = normal.clone()
    blocks[0], blocks[1], blocks[2, :7], blocks[3, 5], blocks[4] = 0.0, -0.0, torch.inf, torch.nan, -torch.inf
    half_steps = torch.arange(-3072, 3072).reshape(64, 96) / 16.0
    return {
        "normal": normal,
        "ties": half_steps,
        "spread": normal * spread,
        "subnormal": normal * 1e-39,
        "huge": normal * 1e38,
        "special blocks": blocks,
        "any bits": random_bits((64, 96), 3),
        "any numbers": bits_without_nan,
    }


DATA = kinds_of_data()


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("format", [*FORMATS, *OTHERS])
def test_kernels_have_the_bits_of_the_definitions(format: str, rounding: str) -> None:
    fmt = format_of(format, rank=2)
    for kind, rule, clip in product(DATA, RULES, (None, 0.7)):
        how = Rounding(rule, rounding, clip)
        x = DATA[kind]
        try:
            expected = formats.quantize(x, fmt, how)
        except UsageError:  # a rule or a clip that the format does not have
            with pytest.raises(UsageError):
                mxloom.fake_quantize(x, fmt, scale_rule=rule, rounding=rounding, clip=clip)
            continue
        assert why_not(fmt, how, x.dtype, tuple(x.shape)) is None
        found = mxloom.fake_quantize(x, fmt, scale_rule=rule, rounding=rounding, clip=clip)
        assert torch.equal(bits(found), bits(expected)), (kind, rule, clip)


@pytest.mark.nightly
@pytest.mark.parametrize("format", FORMATS)
def test_ten_million_values_of_any_bits(format: str) -> None:
    fmt = format_of(format, rank=2)
    for piece in range(10):
        x = random_bits((1024, 1024), 100 + piece)
        x = x if piece < 3 else torch.where(x.isfinite(), x, 1.0)
        assert torch.equal(bits(mxloom.fake_quantize(x, fmt)), bits(formats.quantize(x, fmt)))


@settings(max_examples=150, deadline=None)
@given(
    shape=st.lists(st.integers(0, 70), min_size=0, max_size=3),
    format=st.sampled_from([*FORMATS, *OTHERS]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    order=st.sampled_from(["as it is", "transposed", "every second", "shifted", "expanded"]),
    rounding=st.sampled_from(["rne", "stochastic"]),
    seed=st.integers(0, 1000),
)
def test_any_shape_order_and_dtype(
    shape: list[int], format: str, dtype: torch.dtype, order: str, rounding: str, seed: int
) -> None:
    x = random_bits((*shape[:-1], 2 * shape[-1] + 1) if shape else (), seed).to(dtype)
    if shape:
        start, step = (1, 2) if order == "every second" else (1, 1) if order == "shifted" else (0, 1)
        x = x[..., start : start + step * shape[-1] : step]
        x = x.transpose(0, -1) if order == "transposed" else x
        x = x[:1].expand(3 if len(x) else 0, *x.shape[1:]) if order == "expanded" else x
    try:
        fmt = format_of(format, rank=max(x.dim(), 1))
        expected = formats.quantize(x, fmt, Rounding(rounding=rounding, seed=seed))
    except MxloomError:  # blocks of more dimensions than the tensor has
        return
    found = mxloom.fake_quantize(x, fmt, rounding=rounding, seed=seed)
    assert found.shape == x.shape
    assert found.dtype == dtype
    assert torch.equal(bits(found), bits(expected))


def test_a_mean_that_lies_between_two_scales_is_added_as_the_definition_adds() -> None:
    x = torch.ones(2, 32)
    x[0, 7] = 1 + 2.0**-19  # a mean of 1 + 2^-24 is no f32, and no nearer to one than to the next
    fmt = format_of("!mx.block<32x!mx.ternary, f32>", rank=2)
    assert why_not(fmt, Rounding(), x.dtype, (2, 32)) is None
    assert torch.equal(mxloom.fake_quantize(x, fmt), torch.ones(2, 32))
    for whole in (x, x.t()):
        expected = formats.quantize(whole, format_of("ternary", rank=2))
        assert torch.equal(mxloom.fake_quantize(whole, "ternary"), expected)


@pytest.mark.parametrize(
    "format", ["mxfp4", "nvfp4", "int8_tensor", "int8_channel", "int8_affine", "fixed<8,6>", "ternary"]
)
def test_out_is_written_and_returned(format: str) -> None:
    x = DATA["normal"]
    expected = formats.quantize(x, format_of(format, rank=2))
    at_hand = torch.empty_like(x)
    assert mxloom.fake_quantize(x, format, out=at_hand) is at_hand
    assert torch.equal(at_hand, expected)
    transposed = torch.empty(96, 64).t()
    assert torch.equal(mxloom.fake_quantize(x, format, out=transposed), expected)
    itself = x.clone()
    assert torch.equal(mxloom.fake_quantize(itself, format, out=itself), expected)
    memory = torch.zeros(65, 96)
    memory[:64] = x
    assert torch.equal(mxloom.fake_quantize(memory[:64], format, out=memory[1:]), expected)


@pytest.mark.parametrize(
    ("out", "message"),
    [
        (torch.empty(2, 3), r"out is torch.float32 \[2, 3\] on cpu, but x is torch.float32 \[64, 96\] on cpu"),
        (torch.empty(64, 96, dtype=torch.float64), "out is torch.float64"),
        (torch.empty(64, 96, requires_grad=True), "out requires a gradient"),
        (torch.empty(1, 96).expand(64, 96), "elements of out share memory"),
        (torch.empty(6144).as_strided((64, 96), (7, 1)), "elements of out share memory"),
        (3, "out is a torch tensor, got 3"),
    ],
)
def test_an_out_that_does_not_fit(out: object, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        mxloom.fake_quantize(DATA["normal"], "mxfp4", out=out)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    "format",
    ["mxfp4", "nvfp4", "int8_tensor", "int8_affine", "int4_g32_affine", "int8_channel", "ternary", "fixed<8,6>"],
)
def test_two_threads_round_as_one(format: str) -> None:
    x = random_bits((1024, 257), 5).nan_to_num(nan=1.0)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        found = mxloom.fake_quantize(x, format)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found, formats.quantize(x, format_of(format, rank=2)))


@pytest.mark.parametrize("format", ["mxfp4", "nvfp4", "int8_tensor", "fixed<8,6>"])
def test_what_is_written_past_the_caches(format: str) -> None:
    memory = torch.randn(4097, 2048, generator=torch.Generator().manual_seed(7))
    x = memory[:-1]
    assert x.numel() >= STREAMED_FROM
    expected = formats.quantize(x, format_of(format, rank=2))
    beside = torch.empty(x.numel() + 1)[1:].view(x.shape)  # no multiple of 64 bytes
    assert beside.data_ptr() % 64
    assert torch.equal(mxloom.fake_quantize(x, format), expected)
    assert torch.equal(mxloom.fake_quantize(x, format, out=beside), expected)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        assert torch.equal(mxloom.fake_quantize(x, format, out=x), expected)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("format", "rounding", "dtype", "reason"),
    [
        ("mxfp4", "rne", torch.float64, "no kernel for torch.float64"),
        ("fixed<32,0>", "rne", torch.float32, "the element needs f64"),
        ("!mx.block<4xbf16>", "rne", torch.float32, "the element needs f64"),
    ],
)
def test_what_no_kernel_does_says_why(format: str, rounding: str, dtype: torch.dtype, reason: str) -> None:
    fmt, how = format_of(format, rank=2), Rounding(rounding=rounding)
    assert why_not(fmt, how, dtype, (8, 32)) == reason
    x = DATA["normal"].to(dtype)
    assert torch.equal(mxloom.fake_quantize(x, fmt, rounding=rounding), formats.quantize(x, fmt, how))


@pytest.mark.parametrize("high", ["f8E4M3FN", "!mx.block<?x?xf8E4M3FN, f32>", "!mx.block<16xf4E2M1FN, f8E4M3FN, f32>"])
@pytest.mark.parametrize("low", ["!mx.block<16xf4E2M1FN, f8E4M3FN, f32>", "!mx.block<16xi4, bf16, zero i4>"])
def test_mixed_blocks_by_a_threshold(low: str, high: str) -> None:
    register()
    fmt = format_of(f"!mx.mixed<{low}, {high}>", rank=2)
    for x, rounding, clip, threshold in product(DATA.values(), ROUNDINGS, (None, 0.7), (0.0, 0.02)):
        how = Rounding(rounding=rounding, clip=clip, threshold=threshold)
        for source in (x, x.t(), x.bfloat16()):
            expected = formats.quantize(source, fmt, how)
            found = torch.ops.mxloom.quantize(source, str(fmt), None, rounding, clip, 0, threshold)
            assert torch.equal(bits(found), bits(expected))
    assert why_not(fmt, Rounding(threshold=0.5), torch.float32, (64, 96)) is None
    assert why_not(fmt, Rounding(), torch.float32) == "no threshold of block impact is given"
    with pytest.raises(UsageError, match="needs a threshold"):
        torch.ops.mxloom.quantize(DATA["normal"], str(fmt))
    with pytest.raises(UsageError, match="a threshold belongs to"):
        torch.ops.mxloom.quantize(DATA["normal"], low, None, "rne", None, 0, 0.5)


def test_the_reference_and_the_switch_leave_kernels_out(monkeypatch: pytest.MonkeyPatch) -> None:
    fmt, how = format_of("mxfp4", rank=2), Rounding()
    with reference_only():
        assert why_not(fmt, how, torch.float32) == "only the reference is asked for"
    assert why_not(fmt, how, torch.float32) is None
    monkeypatch.setenv("MXLOOM_KERNELS", "eager")
    assert why_not(fmt, how, torch.float32) == "MXLOOM_KERNELS is eager"
    x = DATA["normal"]
    assert torch.equal(mxloom.fake_quantize(x, "mxfp4"), formats.quantize(x, fmt))
    monkeypatch.setenv("MXLOOM_KERNELS", "egaer")
    with pytest.raises(UsageError, match="MXLOOM_KERNELS is 'egaer'"):
        mxloom.fake_quantize(x, "mxfp4")


@pytest.mark.parametrize("format", ["mxfp4", "nvfp4", "int8_tensor", "int8_channel", "fixed<8,6>", "ternary"])
def test_what_torch_makes_by_default_changes_nothing(format: str) -> None:
    x = random_bits((4, 33), 6).nan_to_num(nan=0.0)
    expected = formats.quantize(x, format_of(format, rank=2))
    for dtype in (torch.float64, torch.bfloat16):
        torch.set_default_dtype(dtype)
        try:
            found = mxloom.fake_quantize(x, format)
        finally:
            torch.set_default_dtype(torch.float32)
        assert found.dtype == torch.float32
        assert torch.equal(found, expected)
    with torch.device("meta"):
        assert torch.equal(mxloom.fake_quantize(x, format), expected)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_memory_that_holds_other_values_or_none() -> None:
    """Lazily negated tensors, lazy zeros, tensors inside vmap, fake tensors: values count, not what lies in memory."""
    x = DATA["normal"]
    expected = formats.quantize(x, format_of("mxint8", rank=2))
    negated = torch.ops.aten._neg_view(-x)
    assert torch.equal(mxloom.fake_quantize(negated, "mxint8"), expected)
    out = torch.ops.aten._neg_view(torch.empty_like(x))
    assert torch.equal(mxloom.fake_quantize(x, "mxint8", out=out), expected)
    imaginary = torch.complex(x, x).conj().imag
    assert torch.equal(mxloom.fake_quantize(imaginary, "mxint8"), formats.quantize(-x, format_of("mxint8", rank=2)))
    zeros = torch.ops.aten._efficientzerotensor([4, 64])
    assert torch.equal(mxloom.fake_quantize(zeros, "mxint8"), torch.zeros(4, 64))
    assert torch.equal(torch.vmap(lambda row: mxloom.fake_quantize(row, "mxint8"))(x), expected)
    register()
    assert torch.equal(torch.ops.mxloom.quantize(negated, str(format_of("mxint8", rank=2))), expected)
    assert torch.equal(torch.ops.mxloom.quantize(zeros, str(format_of("mxint8", rank=2))), torch.zeros(4, 64))
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert mxloom.fake_quantize(x, "mxint8").shape == x.shape


@pytest.mark.filterwarnings("ignore")  # torch tells what it traces
def test_a_compiled_function_rounds_alike() -> None:
    x = DATA["normal"]
    compiled = torch.compile(lambda x: mxloom.fake_quantize(x, "mxint8") + 1, backend="eager")
    assert torch.equal(compiled(x), formats.quantize(x, format_of("mxint8", rank=2)) + 1)
