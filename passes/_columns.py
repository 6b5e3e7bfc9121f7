"""Where each element of a weight stands along the sum: the row of the Hessian that it meets."""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING, cast

from ..dialects.operations.contraction import Contraction
from ._sites import Site

if TYPE_CHECKING:
    from torch import Tensor

    from ._statistics import Statistics


def reduced_axes(site: Site) -> tuple[int, ...]:
    """The dimensions of a weight, from 0, that its contraction sums over, in order."""
    rank = len(site.shape)
    return tuple(sorted(dim % rank for dim in cast(Contraction, site.operation).reduced()[site.operand]))


def from_end(site: Site) -> tuple[int, ...]:
    """The dimensions of a weight that its contraction sums over, counted from the end."""
    return tuple(axis - len(site.shape) for axis in reduced_axes(site))


def columns_of(site: Site, *, channels: bool = False) -> Tensor:
    """For each element of a weight its place along the sum, integers in the weight's shape.

    With `channels` its input channel: the first of the summed dimensions alone.
    """
    import torch

    axes = reduced_axes(site)
    counted = axes[:1] if channels else axes
    places = torch.arange(prod(site.shape[axis] for axis in counted))
    shape = [site.shape[axis] if axis in counted else 1 for axis in range(len(site.shape))]
    return places.reshape(shape).expand(site.shape)


def matrix(site: Site, tensor: Tensor) -> Tensor:
    """A tensor of the weight's shape as [rows, K], K in the order of the Hessian's rows."""
    axes = reduced_axes(site)
    kept = [axis for axis in range(tensor.dim()) if axis not in axes]
    return tensor.permute(*kept, *axes).reshape(-1, prod(site.shape[axis] for axis in axes))


def from_matrix(site: Site, rows: Tensor) -> Tensor:
    """The tensor of the weight's shape whose `matrix` is `rows`."""
    axes = reduced_axes(site)
    kept = [axis for axis in range(len(site.shape)) if axis not in axes]
    order = [*kept, *axes]
    back = [order.index(axis) for axis in range(len(order))]
    return rows.reshape([site.shape[axis] for axis in order]).permute(back).contiguous()


def hessian_of(site: Site, statistics: Statistics) -> Tensor:
    """H = 2 X^T X / n of what the weight is multiplied with: [K, K] f32."""
    return statistics.hessian(site)
