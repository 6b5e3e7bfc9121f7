"""Codes times scales are the values that the definitions give, sums are those of the codes."""

from __future__ import annotations

from itertools import product
from typing import Literal

import pytest
import torch

from mxloom.backends.kernels import native
from mxloom.backends.kernels.codes import Codes, PreparedCodes, prepare_codes
from mxloom.dialects import formats
from mxloom.dialects.errors import UsageError
from mxloom.dialects.formats import Rounding
from mxloom.dialects.instances import INSTANCES, format_of

WITHOUT_CODES = {"ternary", "bf16", "f16", "f32"}
FORMATS = [name for name in INSTANCES if name not in WITHOUT_CODES and not name.endswith("_affine")]
OTHERS = ["!mx.block<17xi5, f32>", "!mx.block<256xi8>", "!mx.block<40xi4, f16>", "!mx.block<?xf4E2M1FN, f32>"]
OTHERS += ["!mx.float<2, 1>", "!mx.block<16xi16, f32>", "!mx.block<4xf6E2M3FN, f8E5M2, f32>", "f6E3M2FN"]
LARGEST = torch.finfo(torch.float32).max

pytestmark = pytest.mark.skipif(
    native.why_not() is not None, reason=f"{native.why_not()}; run on x86-64 or 64-bit Arm with llvmlite"
)


def prepared(format: str, how: Rounding, x: torch.Tensor) -> PreparedCodes:
    found = prepare_codes(format_of(format, rank=max(x.dim(), 1)), how, tuple(x.shape), x.dtype)
    assert isinstance(found, PreparedCodes), found
    return found


def values(found: Codes, shape: tuple[int, ...]) -> torch.Tensor:
    """The numbers that codes stand for, rounded once, at most the largest f32."""
    split = found.codes.unflatten(-1, (found.scales.shape[-1], -1))
    products = (split.float() * (found.scales * found.over)[..., None]).clamp(-LARGEST, LARGEST)
    return products.flatten(-2)[..., : shape[-1]]


@pytest.mark.parametrize("rounding", ["rne", "rna", "rtz"])
@pytest.mark.parametrize("format", [*FORMATS, *OTHERS])
def test_codes_times_scales_are_the_values(format: str, rounding: str, kinds_of_data: dict[str, torch.Tensor]) -> None:
    fmt = format_of(format, rank=2)
    for (kind, x), rule, clip in product(kinds_of_data.items(), (None, "floor", "ceil", "even", "rceil"), (None, 0.7)):
        how = Rounding(rule, rounding, clip)
        try:
            expected = formats.quantize(x, fmt, how)
        except UsageError:  # a rule or a clip that the format does not have
            with pytest.raises(UsageError):
                prepare_codes(fmt, how, (64, 96), torch.float32)
            continue
        found = prepared(format, how, x)(x)
        split = found.codes.unflatten(-1, (found.scales.shape[-1], -1))
        sums = torch.zeros_like(found.sums) if split.is_floating_point() else split.sum(-1, dtype=torch.int32)
        assert torch.equal(sums, found.sums)
        assert not found.codes[..., 96:].any()
        if formats.default_scale_rule(fmt) is None:  # no scale: a NaN takes its row
            expected = expected.masked_fill(expected.isnan().any(-1, keepdim=True), torch.nan)
        held = values(found, (64, 96))
        differs = (held != expected) & ~(held.isnan() & expected.isnan())
        # Only where scale x step is below 2^-126 it may be no f32, which `exact` tells.
        small = (found.scales * found.over < 2.0**-126)[..., None].expand_as(split).flatten(-2)[..., :96]
        assert not (differs & ~small).any(), (kind, rule, clip)
        assert not (found.exact and differs.any()), (kind, rule, clip)
        if kind in ("normal", "ties"):
            assert found.exact


def test_codes_of_a_known_block() -> None:
    """MXFP4 (OCP MX 1.0): the largest 6 has scale 2^0; 5 ties to 4, 0.25 to 0, 0.75 to 1; steps of one half."""
    x = torch.zeros(1, 32)
    x[0, :6] = torch.tensor([6.0, 5.0, 0.25, 0.75, -0.0, -3.0])
    found = prepared("mxfp4", Rounding(), x)(x)
    assert found.codes[0, :7].tolist() == [12, 8, 0, 2, 0, -6, 0]
    assert (found.scales.tolist(), found.sums.tolist(), found.exact) == ([[0.5]], [[16]], True)


def test_a_block_with_nan_has_scale_nan_and_codes_zero() -> None:
    x = torch.ones(2, 64)
    x[0, 40] = torch.nan
    found = prepared("mxint8", Rounding(), x)(x)
    assert found.scales.isnan().tolist() == [[False, True], [False, False]]
    assert found.codes[0].tolist() == [64] * 32 + [0] * 32
    assert found.sums.tolist() == [[2048, 0], [2048, 2048]]


def test_exact_tells_where_a_product_is_not_the_value() -> None:
    tiny = torch.full((1, 64), 2.0**-149)
    assert not prepared("!mx.block<?xf4E2M1FN, f32>", Rounding(), tiny)(tiny).exact
    assert prepared("mxfp4", Rounding(), tiny)(tiny).exact
    huge = torch.full((1, 64), LARGEST)
    assert not prepared("mxfp4", Rounding(), huge)(huge).exact  # rounds up to 2^128
    assert prepared("mxfp4", Rounding("floor"), huge)(huge).exact


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(3, 5, 70), (70,), (1, 1), (5, 257), (2, 3, 1, 64)])
@pytest.mark.parametrize("format", ["mxint8", "nvfp4", "int8_tensor", "int8_channel", "int4_g128", "fixed<8,6>"])
def test_shapes_and_dtypes(format: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(2)).to(dtype)
    prepare = prepared(format, Rounding(), x)
    expected = formats.quantize(x.float(), format_of(format, rank=len(shape)))
    for source in (x, x.mT.contiguous().mT if x.dim() > 1 else x.repeat(2)[: len(x)]):
        assert torch.equal(values(prepare(source), shape), expected + 0.0)
    out = (torch.empty_like(part) for part in prepare(x)[:3])
    codes, scales, sums = out
    again = prepare(x, codes, scales, sums)
    assert (again.codes is codes, again.scales is scales, again.sums is sums) == (True, True, True)
    assert torch.equal(values(again, shape), expected + 0.0)


def test_two_threads_code_as_one() -> None:
    x = torch.randn(512, 512, generator=torch.Generator().manual_seed(3))
    before = torch.get_num_threads()
    for format in ("mxfp4", "int8_channel", "int8_tensor", "nvfp4"):
        one = prepared(format, Rounding(), x)(x)
        try:
            torch.set_num_threads(2)
            two = prepared(format, Rounding(), x)(x)
        finally:
            torch.set_num_threads(before)
        assert all(torch.equal(a, b) for a, b in zip(one[:3], two[:3], strict=True))


@pytest.mark.parametrize(
    ("format", "shape", "reason"),
    [
        ("!mx.block<32xi20, f32>", (4, 32), "the element's values are no whole numbers of 16 bits"),
        ("!mx.block<4x8xi8>", (4, 32), "its blocks reach over several rows"),
        ("fixed<8,-3>", (4, 32), "the element's step lies outside 2^-22 to 1"),
        ("!mx.block<?xi16, f32>", (1, 70000), "sums of codes need more than 32 bits"),
        ("mxint8", (4, 0), "there is no row to round"),
        ("int8_affine", (4, 32), "no codes for the scale rule minmax"),
    ],
)
def test_what_has_no_codes_says_why(format: str, shape: tuple[int, ...], reason: str) -> None:
    assert prepare_codes(format_of(format, rank=2), Rounding(), shape, torch.float32) == reason


@pytest.mark.parametrize("factors", [("row",), ("row", "column"), ("value",), ("column", "value", "row")])
@pytest.mark.parametrize("format", ["mxfp4", "int8_channel", "mxfp8_e4m3", "!mx.block<96xi8>", "fixed<8,6>"])
def test_values_are_multiplied_on_the_way_to_their_codes(
    format: str, factors: tuple[Literal["row", "column", "value"], ...], kinds_of_data: dict[str, torch.Tensor]
) -> None:
    """Each product is rounded to f32, as torch's operators round it."""
    generator = torch.Generator().manual_seed(5)
    others = {"row": torch.randn(64, 1, generator=generator), "column": torch.randn(96, generator=generator)}
    others["value"] = torch.randn(64, 96, generator=generator)
    for x in kinds_of_data.values():
        product = x.clone()
        for factor in factors:
            product = product * others[factor]
        fmt = format_of(format, rank=2)
        fused = prepare_codes(fmt, Rounding(), (64, 96), torch.float32, factors)
        assert isinstance(fused, PreparedCodes), fused
        found = fused(x, multiplied=[others[factor] for factor in factors])
        expected = prepared(format, Rounding(), product)(product)
        for a, b in zip(found[:3], expected[:3], strict=True):
            assert torch.equal(a.nan_to_num(), b.nan_to_num())


@pytest.mark.parametrize(
    ("format", "reason"),
    [
        ("nvfp4", "the scale of the tensor is found first"),
        ("!mx.block<17xi5, f32>", "the values are brought into another order first"),
        ("!mx.block<96xi8>", "a row has several long blocks"),
    ],
)
def test_values_that_are_not_multiplied_on_the_way_say_why(format: str, reason: str) -> None:
    assert prepare_codes(format_of(format, rank=2), Rounding(), (2, 192), torch.float32, ("row",)) == reason
