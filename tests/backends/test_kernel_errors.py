"""Errors of candidate scales: the definition's bits, and what rounding with that clip or scale loses."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import mxloom
from mxloom.backends.kernels import clip_errors, native
from mxloom.backends.kernels._error_definition import errors_by_torch
from mxloom.backends.kernels.clip_errors import candidate_errors, stored_scales
from mxloom.dialects import formats
from mxloom.dialects.errors import UsageError
from mxloom.dialects.formats import BlockType, Rounding, encode_tensor
from mxloom.dialects.instances import INSTANCES, format_of

CLIPS = torch.linspace(0.1, 1.0, 10, dtype=torch.float64)
FORMATS = [name for name in INSTANCES if "!mx.block" in INSTANCES[name].text and name != "ternary"]
FORMATS += ["!mx.block<17xi5, f32>", "!mx.block<4x8xf4E2M1FN, f16>", "!mx.block<8xi4, f8E5M2, zero i4>"]

needs_native = pytest.mark.skipif(native.why_not() is not None, reason=f"{native.why_not()}; run with llvmlite")


def block_type(name: str) -> BlockType:
    found = format_of(name, rank=2)
    assert isinstance(found, BlockType)
    return found


def bits(x: torch.Tensor) -> torch.Tensor:
    return torch.where(x.isnan(), torch.nan, x).view(torch.int64)


def by_definition(monkeypatch: pytest.MonkeyPatch, *arguments: Any, **options: Any) -> torch.Tensor:
    with monkeypatch.context() as patch:
        patch.setattr(clip_errors, "_by_kernel", errors_by_torch)
        return candidate_errors(*arguments, **options)


@needs_native
@pytest.mark.parametrize("rounding", ["rne", *(pytest.param(each, marks=pytest.mark.slow) for each in ("rna", "rtz"))])
@pytest.mark.parametrize("format", FORMATS)
def test_the_kernel_has_the_bits_of_the_definition(
    format: str, rounding: str, kinds_of_data: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    fmt, how = block_type(format), Rounding(rounding=rounding)
    weights = torch.rand(64, 96, generator=torch.Generator().manual_seed(0))
    for kind, x in kinds_of_data.items():
        for given in (None, weights):
            expected = by_definition(monkeypatch, x, fmt, CLIPS, how=how, weights=given)
            assert torch.equal(bits(candidate_errors(x, fmt, CLIPS, how=how, weights=given)), bits(expected)), kind


@needs_native
@pytest.mark.parametrize("format", ["nvfp4", "mxfp4", "mxint8", "!mx.block<32x!mx.ternary, f8E5M2>"])
def test_all_scales_and_multiples_of_a_power_of_two(
    format: str, kinds_of_data: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    fmt = block_type(format)
    kinds: list[tuple[torch.Tensor, clip_errors.Candidates]] = [(stored_scales(fmt), "scales")]
    if format.startswith("mx"):
        kinds.append((torch.exp2(torch.arange(-3.0, 2.0)), "multiples"))
    for x in kinds_of_data.values():
        for candidates, kind in kinds:
            found = candidate_errors(x, fmt, candidates, kind)
            assert torch.equal(bits(found), bits(by_definition(monkeypatch, x, fmt, candidates, kind)))


@pytest.mark.parametrize("format", ["mxfp4", "mxint8", "int8_channel", "int8_tensor", "int4_g32", "int4_g32_affine"])
def test_an_error_is_what_rounding_with_that_clip_loses(format: str) -> None:
    x = torch.randn(6, 96, generator=torch.Generator().manual_seed(1))
    fmt = block_type(format)
    tiling = fmt.tiling(x.shape)
    found = candidate_errors(x, fmt, CLIPS)
    for column, clip in enumerate(CLIPS.tolist()):
        off = (x.double() - formats.quantize(x, fmt, Rounding(clip=clip)).double()).square()
        torch.testing.assert_close(found[..., column], tiling.split(off).sum(tiling.axes), rtol=1e-12, atol=0.0)


def test_an_error_is_what_given_scales_lose() -> None:
    x = torch.randn(4, 64, generator=torch.Generator().manual_seed(2))
    fmt = block_type("nvfp4")
    candidates = stored_scales(fmt)
    assert candidates.tolist() == [
        v for v in torch.arange(128, dtype=torch.uint8).view(torch.float8_e4m3fn).float() if v > 0
    ]
    found = candidate_errors(x, fmt, candidates, "scales", global_scale=0.001)
    assert found.shape == (4, 4, 126)
    for column in (0, 60, 125):
        stored = candidates[column].expand(4, 4).to(torch.float8_e4m3fn)
        rounded = encode_tensor(x, fmt, scales=stored, global_scale=torch.tensor(0.001)).decode()
        off = (x.double() - rounded.double()).square().view(4, 4, 16).sum(-1)
        torch.testing.assert_close(found[..., column], off, rtol=1e-12, atol=0.0)
    best = candidates[found.argmin(-1)].to(torch.float8_e4m3fn)
    rounded = encode_tensor(x, fmt, scales=best, global_scale=torch.tensor(0.001)).decode()
    assert (x - rounded).square().sum() < (x - mxloom.fake_quantize(x, fmt)).square().sum()


def test_two_threads_find_what_one_finds() -> None:
    x = torch.randn(256, 512, generator=torch.Generator().manual_seed(3))
    fmt, before = block_type("mxfp4"), torch.get_num_threads()
    one = candidate_errors(x, fmt, CLIPS)
    try:
        torch.set_num_threads(2)
        assert torch.equal(candidate_errors(x, fmt, CLIPS), one)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("format", "candidates", "kind", "message"),
    [
        ("mxfp4", [0.5, 0.3], "multiples", "are powers of two"),
        ("mxfp4", [1.5], "clips", "in (0, 1]"),
        ("mxfp4", [0.0], "clips", "positive and finite"),
        ("mxfp4", [], "clips", "one row of numbers"),
        ("int4_g32_affine", [1.0], "scales", "which follow from clips alone"),
        ("int8_channel", [0.5], "multiples", "no power-of-two scales"),
        ("ternary", [0.5], "clips", "try scales, not clips"),
        ("!mx.block<4xbf16>", [0.5], "clips", "the element needs f64"),
        ("mxfp4", [0.5], "clip", "kind is one of clips, scales, multiples"),
    ],
)
def test_what_means_nothing(format: str, candidates: list[float], kind: Any, message: str) -> None:
    with pytest.raises(UsageError) as raised:
        candidate_errors(torch.ones(2, 32), block_type(format), torch.tensor(candidates), kind)
    assert message in str(raised.value)
    with pytest.raises(UsageError, match="too many"):
        stored_scales(block_type("int8_channel"))


@pytest.mark.parametrize("given", ["x", "weights", "candidates"])
def test_what_cannot_be_read_is_refused(given: str) -> None:
    """Memory is read by address: what has none here must not come so far."""
    right: dict[str, Any] = {"x": torch.ones(2, 32), "weights": torch.ones(2, 32), "candidates": torch.ones(1)}
    for wrong in (None, [1.0], torch.ones(2, 32, device="meta"), torch.ones(2, 32, dtype=torch.int32)):
        values = {**right, given: wrong}
        if values["weights"] is None:
            continue
        with pytest.raises(UsageError, match=given):
            candidate_errors(values["x"], block_type("mxfp4"), values["candidates"], weights=values["weights"])
    with pytest.raises(UsageError, match=r"weights of shape \[3, 32\] do not broadcast to \[2, 32\]"):
        candidate_errors(right["x"], block_type("mxfp4"), right["candidates"], weights=torch.ones(3, 32))
    transposed = torch.rand(32, 4, generator=torch.Generator().manual_seed(0)).t()
    errors = candidate_errors(transposed, block_type("mxfp4"), CLIPS, weights=transposed)
    dense = transposed.contiguous()
    assert torch.equal(errors, candidate_errors(dense, block_type("mxfp4"), CLIPS, weights=dense))
