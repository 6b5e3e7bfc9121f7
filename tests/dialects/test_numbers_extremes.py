"""Infinities, the largest and the smallest numbers, in every format and rounding; gradients straight through."""

import pytest
import torch

import mxloom
from mxloom.dialects.instances import INSTANCES

ROUNDINGS = ("rne", "rna", "rtz", "stochastic")
WIDE = ("bf16", "f16", "f32")
FORMATS = [
    *INSTANCES,
    "f8E5M2",
    "f8E4M3FN",
    "f4E2M1FN",
    "fixed<32,0>",
    "fixed<8,-3>",
    "fixed<8,-64>",
    "fixed<2,64>",
    "!mx.float<5, 2>",
    "!mx.ternary",
    "!mx.block<4xbf16>",
    "!mx.block<4xf16, f32>",
    "!mx.block<4xi30, f32>",
    "!mx.block<4xi5, f16, zero i5>",
    "!mx.block<4xf8E5M2, f8E5M2, f32>",
]


def rows(dtype: torch.dtype) -> torch.Tensor:
    """Blocks of extremes: each kind alone, beside ordinary numbers, and all of them."""
    limits = torch.finfo(dtype)
    kinds = [torch.inf, -torch.inf, limits.max, -limits.max, 0.97 * limits.max, limits.smallest_normal, -0.0, 0.0]
    kinds += [limits.smallest_normal * limits.eps, -limits.smallest_normal * limits.eps, 0.5, -1.0, 2.5]
    filled = [[kind] * 8 for kind in kinds] + [[kind, 1.0, -2.5, 0.3, kind, -kind, 0.0, -0.0] for kind in kinds]
    return torch.tensor([*filled, (kinds * 2)[:8], (kinds * 2)[5:13], (kinds * 2)[1:9]], dtype=torch.float64).to(dtype)


def bits(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[x.dtype.itemsize])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("format", FORMATS)
def test_extremes_round_to_numbers_and_come_back_from_their_codes(format: str, dtype: torch.dtype) -> None:
    """No NaN comes from a number and no infinity from a finite one, but by the overflow of a wide float."""
    x = rows(dtype)
    for rounding in ROUNDINGS:
        for part in (x, x[0], x[2:4], x[-1]):
            rounded = mxloom.fake_quantize(part, format, rounding=rounding, seed=3)
            decoded = mxloom.encode(part, format, rounding=rounding, seed=3).decode(dtype)
            assert not rounded.isnan().any(), rounding
            assert torch.equal(bits(rounded), bits(decoded)), rounding
            assert format in WIDE or not rounded[part.isfinite()].isinf().any(), rounding


@pytest.mark.parametrize("format", [name for name in INSTANCES if name not in WIDE])
def test_infinity_becomes_the_largest_value(format: str) -> None:
    rounded = mxloom.fake_quantize(torch.tensor([torch.inf, -torch.inf] * 16), format)
    assert rounded.isfinite().all()
    assert (rounded[::2] == rounded[0]).all() and (rounded[::2] > 0).all() and (rounded[1::2] < 0).all()


def test_overflow_in_every_rounding() -> None:
    for rounding in ROUNDINGS:
        assert mxloom.fake_quantize(torch.tensor([1e37, -1e37]), "fixed<8,6>", rounding=rounding).tolist() == [
            127 / 64,
            -2.0,
        ]
    top = torch.finfo(torch.float32).max
    beside = mxloom.fake_quantize(torch.tensor([torch.inf, 3.3e38, 1.0, -3.3e38]), "mxfp4")
    assert beside.tolist() == [top, top, 0.0, -top]
    assert mxloom.fake_quantize(torch.tensor([torch.inf, -torch.inf]), "int8_tensor").tolist() == [top, -top]


def test_infinity_that_a_code_means_stays_infinity() -> None:
    """Codes of others may hold what rounding never gives: E5M2 has a code of infinity, 0x7C."""
    encoded = mxloom.encode(torch.ones(32), "mxfp8_e5m2")
    encoded.codes[0] = 0x7C
    assert encoded.decode().tolist() == [torch.inf, *[1.0] * 31]


@pytest.mark.parametrize("format", INSTANCES)
def test_gradients_pass_straight_through(format: str) -> None:
    x = torch.randn(4, 32, generator=torch.Generator().manual_seed(0)).requires_grad_()
    weight = torch.randn(4, 32, generator=torch.Generator().manual_seed(1))
    rounded = mxloom.fake_quantize(x, format)
    assert torch.equal(bits(rounded.detach()), bits(mxloom.fake_quantize(x.detach(), format)))
    (rounded * weight).sum().backward()
    assert torch.equal(x.grad, weight)  # pyright: ignore[reportArgumentType]


def test_gradients_of_saturated_values_and_of_chains() -> None:
    x = torch.tensor([100.0, -3.0, 0.25], requires_grad=True)
    (gradient,) = torch.autograd.grad((mxloom.fake_quantize(x, "fixed<8,6>") ** 2).sum(), x)
    assert gradient.tolist() == [2 * 127 / 64, 2 * -2.0, 2 * 0.25]
    with torch.no_grad():
        assert not mxloom.fake_quantize(x, "fixed<8,6>").requires_grad
