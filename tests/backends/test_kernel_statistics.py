"""Statistics of blocks: extremes of torch, sums in the stated order, with and without a kernel."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from mxloom.backends.kernels import native, statistics
from mxloom.backends.kernels.statistics import Statistics, block_statistics, by_torch, tensor_statistics
from mxloom.dialects.errors import UsageError


def bits(x: torch.Tensor) -> torch.Tensor:
    """The bits of the numbers; any NaN as one."""
    return torch.where(x.isnan(), torch.nan, x).view({4: torch.int32, 8: torch.int64}[x.dtype.itemsize])


def same(found: Statistics, expected: Statistics) -> bool:
    return all(torch.equal(bits(a), bits(b)) for a, b in zip(found, expected, strict=True))


@pytest.mark.skipif(native.why_not() is not None, reason=f"{native.why_not()}; run with llvmlite")
@pytest.mark.parametrize("size", [1, 5, 8, 16, 31, 32, 96, None])
def test_the_kernel_has_the_bits_of_the_definition(size: int | None, kinds_of_data: dict[str, torch.Tensor]) -> None:
    for x in kinds_of_data.values():
        for source in (x, x.t(), x[1:, 3:], x.bfloat16()):
            length = source.shape[-1]
            rows = source.float().contiguous()
            parts = [by_torch(part[:, None]) for part in rows.split(min(size or length, length), -1)]
            expected = Statistics(*(torch.cat(both, -1) for both in zip(*parts, strict=True)))
            assert same(block_statistics(source, size), expected)


def test_known_numbers() -> None:
    x = torch.tensor([[1.0, -4.0, 2.5, -0.0], [0.0, torch.inf, 1.0, 3.0]])
    found = block_statistics(x)
    top = torch.finfo(torch.float32).max
    assert (found.minimum.tolist(), found.maximum.tolist()) == ([[-4.0], [0.0]], [[2.5], [math.inf]])
    assert found.largest.tolist() == [[4.0], [math.inf]]
    assert found.sum.tolist() == [[-0.5], [top + 4.0]]
    assert found.sum_of_magnitudes[0].item() == 7.5
    assert found.sum_of_squares.tolist() == [[23.25], [top * top + 10.0]]
    assert block_statistics(torch.tensor([torch.nan, 1.0])).largest.isnan()


def test_sums_are_near_the_exact_ones() -> None:
    x = torch.randn(3, 1000, generator=torch.Generator().manual_seed(0))
    found = block_statistics(x)
    for row, total, squares in zip(x.tolist(), found.sum, found.sum_of_squares, strict=True):
        assert total.item() == pytest.approx(math.fsum(row), rel=1e-12)
        assert squares.item() == pytest.approx(math.fsum(value * value for value in row), rel=1e-13)


def test_a_whole_tensor() -> None:
    x = torch.randn(40, 1001, generator=torch.Generator().manual_seed(1))
    found = tensor_statistics(x)
    assert (found.minimum, found.maximum, found.largest) == (x.min(), x.max(), x.abs().max())
    assert found.sum_of_squares.item() == pytest.approx(math.fsum(v * v for v in x.flatten().tolist()), rel=1e-13)


def test_without_native_code_torch_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(4, 70, generator=torch.Generator().manual_seed(2))
    expected = block_statistics(x, 32)
    monkeypatch.setattr(statistics.native, "why_not", lambda: "no reason")
    assert same(block_statistics(x, 32), expected)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        ([1.0], "x is a torch tensor, got a list"),
        (torch.ones(4, dtype=torch.float64), "x is f32, bf16 or f16, got torch.float64"),
        (torch.ones(4, device="meta"), "x lies in memory of the CPU, got one on meta"),
        (torch.ones(4).to_sparse(), "x is a dense tensor"),
        (
            torch.ones(4, dtype=torch.complex64).conj().imag,
            r"that is lazy, made up, or inside torch.vmap: use .*resolve_neg",
        ),
        (torch.ones(0, 4), r"in a tensor of shape \[0, 4\]"),
        (torch.tensor(1.0), r"in a tensor of shape \[\]"),
    ],
)
def test_what_has_no_statistics_is_refused(x: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        block_statistics(x)


@pytest.mark.parametrize("size", [0, -1, 2.0, True])
def test_a_size_of_blocks_is_a_number_above_zero(size: Any) -> None:
    with pytest.raises(UsageError, match="size is a whole number of 1 or more"):
        block_statistics(torch.ones(4), size)
