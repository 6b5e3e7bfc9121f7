"""Integer functions against float64 torch, exact fractions, and the table of shifts of field case H1."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from torch import Tensor

from mxloom.dialects import integer
from mxloom.dialects.integer import Point


def codes(x: Tensor, point: Point) -> Tensor:
    return integer.saturated((x.double() * 2.0**point.fraction).round().long(), point.width)


def values(x: Tensor, point: Point) -> Tensor:
    return x.double() * 2.0**-point.fraction


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


H1 = [-20, -13, -12, -11, -4, 4, 11, 12, 13, 20]


@pytest.mark.parametrize(
    ("rounding", "expected"),
    [
        ("rne", [-2, -2, -2, -1, 0, 0, 1, 2, 2, 2]),
        ("rna", [-3, -2, -2, -1, -1, 1, 1, 2, 2, 3]),
        ("rtz", [-2, -1, -1, -1, 0, 0, 1, 1, 1, 2]),
    ],
)
def test_a_shift_rounds_as_its_name_says(rounding: str, expected: list[int]) -> None:
    assert integer.shifted(torch.tensor(H1), 3, rounding).tolist() == expected
    places = torch.full((len(H1),), 3)
    assert integer.shifted(torch.tensor(H1), places, rounding).tolist() == expected


def test_a_shift_to_the_left_multiplies_and_requantizing_saturates() -> None:
    assert integer.shifted(torch.tensor([-3, 5]), -2).tolist() == [-12, 20]
    # 8.99 and -8.5 into fixed<10, 6>: 511 and -512, not wrapped (H1)
    given = torch.tensor([round(8.99 * 2**10), round(-8.5 * 2**10)])
    assert integer.requantized(given, 10, Point(10, 6)).tolist() == [511, -512]


def test_a_rounding_nobody_knows_is_refused() -> None:
    with pytest.raises(ValueError, match="rne or rna or rtz"):
        integer.shifted(torch.tensor([1]), torch.tensor([1]), "floor")


@pytest.mark.parametrize("size", [1, 3, 64, 256])
def test_rms_norm_is_near_float64(size: int) -> None:
    given, weights, result = Point(24, 18), Point(16, 13), Point(24, 18)
    x, w = codes(random(50, size) * 3, given), codes(1 + 0.3 * random(size, seed=1), weights)
    got = values(integer.rms_norm(x, w, given, weights, result, 1e-5), result)
    wide = values(x, given)
    expected = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-5) * values(w, weights)
    assert (got - expected).abs().max() <= 2e-5


def test_a_long_row_is_normalized_to_half_a_unit_of_its_normal_form() -> None:
    """A number of a row of 960 may be as large as 31, so that 15 bits are left behind the point."""
    given, weights, result = Point(24, 18), Point(16, 13), Point(24, 18)
    x, w = codes(random(50, 960) * 3, given), codes(1 + 0.3 * random(960, seed=1), weights)
    got = values(integer.rms_norm(x, w, given, weights, result, 1e-5), result)
    wide = values(x, given)
    expected = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-5) * values(w, weights)
    largest = float(values(w, weights).abs().max())
    assert (got - expected).abs().max() <= 2.0**-16 * largest + 5e-6


def test_layer_norm_is_near_float64() -> None:
    given, weights, result = Point(24, 18), Point(16, 13), Point(24, 18)
    x, w = codes(random(50, 96) * 2 + 1, given), codes(1 + 0.3 * random(96, seed=1), weights)
    b = codes(random(96, seed=2), Point(24, 20))
    got = values(integer.layer_norm(x, w, b, given, weights, Point(24, 20), result, 1e-5), result)
    expected = torch.nn.functional.layer_norm(
        values(x, given), (96,), values(w, weights), values(b, Point(24, 20)), 1e-5
    )
    assert (got - expected).abs().max() <= 2e-5


def test_a_row_of_zeros_is_normalized_to_zeros() -> None:
    zeros, point = torch.zeros(1, 8, dtype=torch.long), Point(24, 18)
    assert integer.rms_norm(zeros, None, point, None, point, 0.0).tolist() == [[0] * 8]


@pytest.mark.parametrize("size", [1, 8, 32])
@pytest.mark.parametrize("scale", [1.0, 0.125, 0.17])
def test_softmax_is_near_float64(scale: float, size: int) -> None:
    given, result = Point(24, 16), Point(24, 22)
    x = codes(random(40, size) * 4, given)
    got = values(integer.softmax(x, given, result, 8, scale), result)
    assert (got - (values(x, given) * scale).softmax(-1)).abs().max() <= 2e-5


@pytest.mark.parametrize("size", [77, 512])
def test_in_a_long_row_each_weight_loses_what_lies_behind_20_bits(size: int) -> None:
    """The sum is short by 2^-20 for each number at most, beside the error of the segments."""
    given, result = Point(24, 16), Point(24, 22)
    x = codes(random(40, size) * 4, given)
    got = values(integer.softmax(x, given, result, 8), result)
    assert (got - values(x, given).softmax(-1)).abs().max() <= size * 2.0**-20 + 3e-6


def test_softmax_gives_nothing_to_what_is_not_kept() -> None:
    given, result = Point(24, 16), Point(24, 22)
    x, keep = codes(random(6, 6) * 4, given), torch.ones(6, 6, dtype=torch.bool).tril()
    got = integer.softmax(x, given, result, 8, 1.0, keep)
    assert not got[~keep].any()
    expected = values(x, given).masked_fill(~keep, -math.inf).softmax(-1)
    assert (values(got, result) - expected).abs().max() <= 2e-5


def test_softmax_of_a_row_without_anything_kept_is_zero() -> None:
    got = integer.softmax(torch.ones(1, 4).long(), Point(24, 16), Point(24, 22), 8, 1.0, torch.zeros(1, 4).bool())
    assert not got.any()


CURVES = {
    "silu": torch.nn.functional.silu,
    "gelu": torch.nn.functional.gelu,
    "gelu_tanh": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
}


@pytest.mark.parametrize("name", CURVES)
def test_tables_are_near_float64(name: str) -> None:
    given = result = Point(24, 17)
    x = torch.linspace(-40, 40, 20001, dtype=torch.float64)
    got = values(integer.Table(name, given, result, 10)(codes(x, given)), result)
    expected = CURVES[name](values(codes(x, given), given))
    assert (got - expected).abs().max() <= 3e-4


def test_the_exponential_is_near_float64_and_saturates() -> None:
    given, result = Point(24, 16), Point(24, 12)
    x = torch.linspace(-20, 7, 5001, dtype=torch.float64)
    got = values(integer.exponential(codes(x, given), given, result, 8), result)
    expected = values(codes(x, given), given).exp()
    assert ((got - expected).abs() <= 1e-4 * expected + 2.0**-13).all()
    top = integer.exponential(torch.tensor([100 << 16]), given, result, 8)
    assert top.tolist() == [(1 << 23) - 1]


@pytest.mark.parametrize(("given", "result"), [(8, 8), (8, 11), (8, 5)])
def test_a_mean_is_rounded_half_up(given: int, result: int) -> None:
    totals = list(range(-70, 71))
    got = integer.mean(torch.tensor(totals), 7, Point(20, given), Point(20, result)).tolist()
    exact = [Fraction(total, 7) * Fraction(2) ** (result - given) for total in totals]
    assert got == [math.floor(each + Fraction(1, 2)) for each in exact]
