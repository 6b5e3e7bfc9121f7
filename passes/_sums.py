"""Sums over calibration rows: ranges and moments of channels, second moments of rows, squared gradients."""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING, cast

from ..dialects.errors import MxloomError
from ..dialects.operations._shapes import shape_of
from ..dialects.operations.contraction import ConvOp, ExpertLinearOp
from ._magnitudes import COARSE, FINE, counted
from ._observed import Gradients, Products, Values

if TYPE_CHECKING:
    from torch import Tensor

    from ._samples import Sample

Sums = dict[str, "Tensor"]
"""Named tensors that are added up over samples and shards (`minimum` and `maximum` are not added, but compared)."""


def rows_of(values: Values | Gradients, tensor: Tensor, sample: Sample) -> Tensor:
    """The rows of a value that are data, [rows, *channels]."""
    if values.heads:
        rows = tensor.movedim(1, -2)
        leading, channels = rows.shape[:-2], rows.shape[-2:]
    else:
        rows = tensor.movedim(values.channel, -1)
        leading, channels = rows.shape[:-1], rows.shape[-1:]
    valid = sample.rows(leading, values.key)
    rows = rows.reshape(prod(leading), *channels)
    if values.shape == (1,):
        valid = None if valid is None else valid.repeat_interleave(prod(channels))
        rows = rows.reshape(-1, 1)
    return rows if valid is None else rows[valid]


def no_rows(unit: Values | Products | Gradients, device: str = "cpu") -> Sums:
    """The sums of no rows; on the device `meta` their shapes and dtypes alone."""
    import torch

    with torch.device(device):
        rows = torch.zeros((), dtype=torch.int64)
        if isinstance(unit, Products):
            shape = (unit.size, unit.size)
            products = torch.zeros(shape if unit.parts == 1 else (unit.parts, *shape))
            return {"rows": torch.zeros(unit.parts, dtype=torch.int64), "products": products}
        if isinstance(unit, Gradients):
            return {"rows": rows, "squares": torch.zeros(unit.shape, dtype=None if unit.is_weight else torch.float64)}
        return {
            "rows": rows,
            "minimum": torch.full(unit.shape, torch.inf),
            "maximum": torch.full(unit.shape, -torch.inf),
            **{name: torch.zeros(unit.shape, dtype=torch.float64) for name in ("sum", "magnitude", "square")},
            "counts": torch.zeros((prod(unit.shape), COARSE.bins), dtype=torch.int32),
            "signed_counts": torch.zeros((2, FINE.bins), dtype=torch.int64),
        }


def add_values(sums: Sums, values: Values, tensor: Tensor, sample: Sample) -> None:
    """Add the rows of one sample: their number, the extremes, moments and counts of magnitudes of each channel."""
    import torch

    rows = rows_of(values, tensor.detach(), sample)
    if not len(rows):
        return
    rows = rows.float()
    least, most = rows.aminmax(dim=0)
    if not bool((least.isfinite() & most.isfinite()).all()):
        raise MxloomError(
            f"{values.key}: {int((~rows.isfinite()).sum())} of {rows.numel()} values are NaN or infinite; "
            "the model, or an input, is at fault: no statistics can be had of them"
        )
    sums["rows"] += len(rows)
    torch.minimum(sums["minimum"], least, out=sums["minimum"])
    torch.maximum(sums["maximum"], most, out=sums["maximum"])
    sums["sum"] += rows.sum(0)
    sums["magnitude"] += rows.abs().sum(0)
    sums["square"] += rows.square().sum(0)
    counts, signed = counted(rows.reshape(len(rows), -1))
    sums["counts"] += counts
    sums["signed_counts"] += signed


def add_products(sums: Sums, products: Products, tensor: Tensor, index: Tensor | None, sample: Sample) -> None:
    """Add X^T X of the rows X [rows, K] of one sample: [K, K], or [parts, K, K] for experts and groups."""
    for part, rows in enumerate(parts_of(products, tensor.detach(), index, sample)):
        held = sums["products"] if products.parts == 1 else sums["products"][part]
        rows = rows.float()
        held.addmm_(rows.T, rows)
        sums["rows"][part] += len(rows)


def parts_of(products: Products, tensor: Tensor, index: Tensor | None, sample: Sample) -> list[Tensor]:
    """The rows that are data, [rows, K], of each part: all of them, or those of each expert, or of each group."""
    operation = products.operation
    if isinstance(operation, ConvOp):
        windows = windows_of(operation, tensor)
        valid = sample.rows(windows.shape[:-1], products.key)
        rows = windows.reshape(-1, products.parts, products.size)
        rows = rows if valid is None else rows[valid]
        return list(rows.unbind(1))
    channel = operation.reduced()[products.operand][0]
    rows = tensor.movedim(channel, -1)
    valid = sample.rows(rows.shape[:-1], products.key)
    rows = rows.reshape(-1, rows.shape[-1])
    if isinstance(operation, ExpertLinearOp):
        assert index is not None
        index = index if valid is None else index.masked_fill(~valid, -1)
        return [rows[index == expert] for expert in range(products.parts)]
    return [rows if valid is None else rows[valid]]


def windows_of(operation: ConvOp, tensor: Tensor) -> Tensor:
    """What a convolution multiplies with its weight at each position: [B, *positions, C * kernel] (im2col).

    The columns lie as the weight's own do: channel, then kernel position; those of a group lie together.
    """
    import torch

    stride, padding, dilation = (operation.per_dimension(name) for name in ("stride", "padding", "dilation"))
    kernel = shape_of(operation.weight)[2:]
    edges = [size for pad in reversed(padding) for size in (pad, pad)]
    tensor = torch.nn.functional.pad(tensor, edges)
    spatial = tensor.shape[2:]
    positions = [
        (size - step * (width - 1) - 1) // by + 1
        for size, width, by, step in zip(spatial, kernel, stride, dilation, strict=True)
    ]
    strides = tensor.stride()
    moved = [by * size for by, size in zip(stride, strides[2:], strict=True)]
    inside = [step * size for step, size in zip(dilation, strides[2:], strict=True)]
    view = tensor.as_strided((*tensor.shape[:2], *positions, *kernel), (*strides[:2], *moved, *inside))
    channels_last = view.movedim(1, 1 + len(positions))
    return channels_last.reshape(tensor.shape[0], *positions, -1)


def add_gradient(sums: Sums, gradients: Gradients, gradient: Tensor, sample: Sample) -> None:
    """Add the squares of one sample's gradient: of a weight element by element, of another value by channel."""
    if gradients.is_weight:
        sums["squares"].addcmul_(gradient, gradient)
        sums["rows"] += 1
        return
    rows = rows_of(gradients, gradient, sample).float()
    sums["squares"] += rows.square().sum(0)
    sums["rows"] += len(rows)


def add_table_gradient(sums: Sums, indices: Tensor, gradient: Tensor) -> None:
    """As `add_gradient` for a table [V, D] of which rows were looked up: only those have a gradient.

    indices [...], gradient [..., D] of what was found there.
    """
    used, place = indices.flatten().unique(return_inverse=True)
    total = gradient.new_zeros(len(used), gradient.shape[-1])
    total.index_add_(0, place, gradient.reshape(-1, gradient.shape[-1]))
    sums["squares"].index_add_(0, used, cast("Tensor", total.square()))
    sums["rows"] += 1
