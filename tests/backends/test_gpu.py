"""On a CUDA device: kernels round to the bits that the definitions have on a processor.

Run with `pytest -m gpu tests/backends/test_gpu.py` on a machine with an NVIDIA GPU and Triton.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from itertools import product

import pytest
import torch

import mxloom
from mxloom.backends.kernels._layout import layout_of
from mxloom.backends.kernels.emitters.eager import EagerRounding
from mxloom.backends.kernels.fake_quantization import register, why_not
from mxloom.dialects import formats
from mxloom.dialects.errors import UsageError
from mxloom.dialects.formats import Rounding
from mxloom.dialects.instances import INSTANCES, format_of

OTHERS = ["f8E5M2", "!mx.float<5, 2>", "fixed<8,-3>", "!mx.block<4xf16>", "!mx.block<17xi5, f32>", "!mx.block<256xi8>"]
OTHERS += ["!mx.block<4xf8E5M2, f8E5M2, f32>", "!mx.block<4x8xf4E2M1FN>", "!mx.block<1x5000xi4, f16>"]
ROUNDINGS = ("rne", "rna", "rtz")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or find_spec("triton") is None,
        reason="needs a CUDA device and Triton; run `pytest -m gpu` on a machine that has them",
    ),
]


def bits(x: torch.Tensor) -> torch.Tensor:
    """The bits of the numbers, on the processor; any NaN as one."""
    x = torch.where(x.isnan(), torch.nan, x).cpu()
    return x.contiguous().view({2: torch.int16, 4: torch.int32}[x.dtype.itemsize])


def any_bits(count: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randint(-(2**31), 2**31, (count // 4096, 4096), generator=generator).to(torch.int32).view(torch.float32)
    )


def cases(format: str, shape: tuple[int, ...], rules: bool = True) -> Iterator[Rounding]:
    """The roundings, rules and clips that a format has and a kernel does."""
    for rounding, rule, clip in product(
        ROUNDINGS, (None, "floor", "ceil", "even", "rceil") if rules else (None,), (None, 0.7) if rules else (None,)
    ):
        how = Rounding(rule, rounding, clip)
        try:
            if why_not(format_of(format, rank=2), how, torch.float32, shape, "cuda") is None:
                yield how
        except UsageError:
            continue


def fake_quantize(x: torch.Tensor, format: str, how: Rounding) -> torch.Tensor:
    fmt = format_of(format, rank=2)
    return mxloom.fake_quantize(x, fmt, scale_rule=how.scale_rule, rounding=how.rounding, clip=how.clip)


@pytest.mark.parametrize("format", [*INSTANCES, *OTHERS])
def test_a_gpu_has_the_bits_of_the_definitions(format: str, kinds_of_data: dict[str, torch.Tensor]) -> None:
    for kind, dtype in product(kinds_of_data, DTYPES):
        x = kinds_of_data[kind].to(dtype)
        for how in cases(format, tuple(x.shape), rules=dtype == torch.float32):
            found = fake_quantize(x.cuda(), format, how)
            assert found.is_cuda
            assert found.dtype == dtype
            expected = formats.quantize(x, format_of(format, rank=2), how)
            assert torch.equal(bits(found), bits(expected)), (kind, dtype, how)


@pytest.mark.parametrize("format", [*INSTANCES, *OTHERS])
def test_ten_million_values_of_any_bits_on_a_gpu(format: str) -> None:
    x = any_bits(10_240_000, 7)
    for data in (x, torch.where(x.isfinite(), x, 1.0)):
        for how in cases(format, tuple(x.shape), rules=False):
            expected = formats.quantize(data, format_of(format, rank=2), how)
            assert torch.equal(bits(fake_quantize(data.cuda(), format, how)), bits(expected)), how


@pytest.mark.parametrize("format", [*INSTANCES, *OTHERS])
def test_torch_source_on_a_gpu(format: str, kinds_of_data: dict[str, torch.Tensor]) -> None:
    for kind, dtype in product(kinds_of_data, DTYPES):
        x = kinds_of_data[kind].to(dtype)
        for how in cases(format, tuple(x.shape), rules=dtype == torch.float32):
            layout = layout_of(format_of(format, rank=2), how, tuple(x.shape))
            assert not isinstance(layout, str)
            expected = formats.quantize(x, format_of(format, rank=2), how)
            assert torch.equal(bits(EagerRounding(layout, dtype)(x.cuda())), bits(expected)), (kind, dtype, how)


@pytest.mark.parametrize("format", [name for name in INSTANCES if name != "ternary"])  # a mean, summed in other orders
def test_definitions_on_a_gpu_are_those_on_a_processor(format: str, kinds_of_data: dict[str, torch.Tensor]) -> None:
    fmt = format_of(format, rank=2)
    for kind, x in kinds_of_data.items():
        assert torch.equal(bits(formats.quantize(x.cuda(), fmt)), bits(formats.quantize(x, fmt))), kind


@pytest.mark.parametrize("format", ["mxfp4", "nvfp4", "int8_tensor", "int8_affine", "int8_channel", "fixed<8,6>"])
def test_the_operator_orders_and_out_on_a_gpu(format: str, kinds_of_data: dict[str, torch.Tensor]) -> None:
    register()
    x = kinds_of_data["normal"]
    fmt = format_of(format, rank=2)
    expected = formats.quantize(x, fmt)
    on_gpu = x.cuda()
    assert torch.equal(torch.ops.mxloom.quantize(on_gpu, str(fmt)).cpu(), expected)
    assert torch.equal(mxloom.fake_quantize(x.t().contiguous().cuda().t(), format).cpu(), expected)
    out = torch.empty(96, 64, device="cuda").t()
    assert mxloom.fake_quantize(on_gpu, format, out=out) is out
    assert torch.equal(out.cpu(), expected)
    assert torch.equal(mxloom.fake_quantize(on_gpu, format, out=on_gpu).cpu(), expected)
    ragged = x[:, :77].contiguous()
    assert torch.equal(mxloom.fake_quantize(ragged.cuda(), format).cpu(), formats.quantize(ragged, fmt))


@pytest.mark.parametrize("format", ["mxfp4", "nvfp4", "int8_tensor", "int8_affine"])
def test_nothing_waits_for_the_device(format: str, kinds_of_data: dict[str, torch.Tensor]) -> None:
    x = kinds_of_data["normal"].cuda()
    out = torch.empty_like(x)
    expected = mxloom.fake_quantize(x, format)
    torch.cuda.set_sync_debug_mode("error")
    try:
        mxloom.fake_quantize(x, format, out=out)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(out, expected)
