"""Statistics of blocks, for calibration: extremes, magnitudes, sums; the same bits with and without a kernel."""

from __future__ import annotations

import ctypes
from functools import cache
from typing import TYPE_CHECKING, NamedTuple

from ...dialects.arguments import whole_number
from ...dialects.errors import UsageError
from . import native
from ._team import team_size
from ._values import values_on_cpu
from .statistics_kernel import LANES, statistics_kernel

if TYPE_CHECKING:
    from torch import Tensor

PIECE = 1 << 14
"""Values that a thread takes at a time where a tensor is one block."""


class Statistics(NamedTuple):
    """One number per block: [..., blocks of the last dimension].

    minimum, maximum, largest (the largest magnitude) are f32; -0 lies below 0; a NaN makes `largest` NaN, and one of
    minimum and maximum by its sign. sum, sum_of_magnitudes and sum_of_squares are f64, infinities counted as the
    largest finite f32, NaN as NaN. Their order: 16 partial sums, of which the first takes the block's values 0, 16, 32
    and so on, one after the other; then the upper eight are added to the lower eight, and so on to one.
    """

    minimum: Tensor
    maximum: Tensor
    largest: Tensor
    sum: Tensor
    sum_of_magnitudes: Tensor
    sum_of_squares: Tensor


def block_statistics(x: Tensor, size: int | None = None) -> Statistics:
    """The statistics of the blocks of `size` values along the last dimension of `x` (None: of the whole dimension).

    x: f32, bf16 or f16 on a CPU, at least one dimension, not empty. A last block that is shorter has the statistics of
    its own values. Raises UsageError for other tensors and for a size below 1.
    """
    import torch

    values = values_on_cpu("x", x)
    if not values.dim() or not values.numel():
        raise UsageError(f"nothing has the statistics of blocks in a tensor of shape {list(values.shape)}")
    length = values.shape[-1]
    size = length if size is None else min(whole_number("size", size, 1), length)
    whole = length // size * size
    parts = [_of_rows(values[..., :whole], size)]
    if whole < length:
        parts.append(_of_rows(values[..., whole:], length - whole))
    return parts[0] if len(parts) == 1 else Statistics(*(torch.cat(both, -1) for both in zip(*parts, strict=True)))


def tensor_statistics(x: Tensor) -> Statistics:
    """The statistics of all values of a tensor: those of pieces of 16384 values, brought together.

    x: f32, bf16 or f16 on a CPU, not empty; UsageError otherwise. Sums of pieces are added by torch, in no
    stated order.
    """
    import torch

    pieces = block_statistics(values_on_cpu("x", x).reshape(-1), PIECE)
    joined = [pieces.minimum.amin(), pieces.maximum.amax(), pieces.largest.amax(), *(part.sum() for part in pieces[3:])]
    return Statistics(*(part.to(torch.float64) if i > 2 else part for i, part in enumerate(joined)))


def _of_rows(values: Tensor, size: int) -> Statistics:
    import torch

    rows = values.contiguous()
    shape = (*rows.shape[:-1], rows.shape[-1] // size)
    if native.why_not() is not None:
        return by_torch(rows.reshape(*shape, size))
    kinds = (torch.float32,) * 3 + (torch.float64,) * 3
    found = Statistics(*(torch.empty(shape, dtype=kind, device="cpu") for kind in kinds))
    places = (ctypes.c_void_p * 6)(*(part.data_ptr() for part in found))
    count = found.sum.numel()
    threads = min(team_size(rows.numel()), count)
    _kernel()(rows.data_ptr(), ctypes.addressof(places), count, length=size, threads=threads)
    return found


def by_torch(blocks: Tensor) -> Statistics:
    """The statistics of f32 blocks [..., size]: the definition that the kernel is held to."""
    import torch

    top = torch.finfo(torch.float32).max
    bits = blocks.contiguous().view(torch.int32)
    keys = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    low, high = keys.amin(-1), keys.amax(-1)
    minimum, maximum = ((key ^ ((key >> 31) & 0x7FFFFFFF)).view(torch.float32) for key in (low, high))
    largest = (bits & 0x7FFFFFFF).amax(-1).view(torch.float32)
    wide = blocks.clamp(-top, top).to(torch.float64)
    return Statistics(minimum, maximum, largest, *(sum_in_order(term) for term in (wide, wide.abs(), wide * wide)))


def sum_in_order(terms: Tensor, lanes: int = LANES) -> Tensor:
    """The sum over the last dimension: `lanes` partial sums, then halves of them onto each other."""
    import torch

    padded = torch.nn.functional.pad(terms, (0, -terms.shape[-1] % lanes))
    total = torch.zeros_like(padded[..., :lanes])
    for at in range(0, padded.shape[-1], lanes):
        total = total + padded[..., at : at + lanes]
    while total.shape[-1] > 1:
        half = total.shape[-1] // 2
        total = total[..., :half] + total[..., half:]
    return total[..., 0]


@cache
def _kernel() -> native.Kernel:
    return native.Kernel("statistics", statistics_kernel)
