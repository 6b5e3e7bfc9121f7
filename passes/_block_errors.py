"""The error of rounding, block by block: plain, weighted element by element, or weighted by a block's Hessian."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from ..dialects.formats import BlockType
from ..dialects.formats._tiling import Tiling

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, eq=False)
class BlockError:
    """sum of weight x (rounded - value)^2 over each block, or d^T H d with the block's own part of `hessian`.

    `weights` broadcasts to the tensor, f32, not negative; None for 1. `hessian` [K, K] has a row for each place along
    the sum, and `columns` says which: integers in the tensor's shape; `reduced` are the dimensions that are summed,
    counted from the end. Rows of a block that has several do not meet.
    """

    fmt: BlockType
    weights: Tensor | None = None
    hessian: Tensor | None = None
    columns: Tensor | None = None
    reduced: tuple[int, ...] = (-1,)

    @property
    def is_diagonal(self) -> bool:
        return self.hessian is None

    def of(self, x: Tensor, rounded: Tensor) -> Tensor:
        """The error of each block, f64, in the shape of the grid of blocks."""
        import torch

        tiling = self.fmt.tiling(x.shape)
        off = rounded.to(torch.float64) - x.to(torch.float64)
        if self.hessian is not None:
            return self._quadratic(off)
        terms = off.square_() if self.weights is None else off.square_() * self.weights.to(torch.float64)
        return tiling.split(terms).sum(tiling.axes).reshape(tiling.grid)

    def _quadratic(self, off: Tensor) -> Tensor:
        places, which = self._places
        stream = self._lines.tiling(off.shape).stream(off)
        blocks = stream.reshape(-1, places.shape[1])
        assert self.hessian is not None
        found = blocks.new_zeros(len(blocks))
        for number, place in enumerate(places):
            rows = which == number
            part = blocks[rows]
            found[rows] = ((part @ self.hessian[place][:, place].to(part.dtype)) * part).sum(-1)
        lines = found.reshape(self._lines.tiling(off.shape).grid)
        tiling = self.fmt.tiling(off.shape)
        rows = [size if dim not in self.reduced else 1 for dim, size in zip(_dims(tiling), tiling.block, strict=True)]
        gathered = Tiling(tuple(lines.shape), tuple(rows))
        return gathered.split(lines).sum(gathered.axes).reshape(tiling.grid)

    @property
    def _lines(self) -> BlockType:
        """The format with blocks of one row each."""
        dims = self.fmt.dims
        places = range(-len(dims), 0)
        return self.fmt.with_dims([dim if at in self.reduced else 1 for at, dim in zip(places, dims, strict=True)])

    @cached_property
    def _places(self) -> tuple[Tensor, Tensor]:
        """The distinct rows of columns that blocks stand on, and for each block which; padding has no error."""
        import torch

        assert self.columns is not None
        tiling = self._lines.tiling(self.columns.shape)
        rows = tiling.stream(self.columns.to(torch.int32)).reshape(-1, _product(tiling.block)).long()
        return torch.unique(rows, dim=0, return_inverse=True)


def _dims(tiling: Tiling) -> range:
    """The dimensions that blocks lie on, counted from the end."""
    return range(-len(tiling.dims), 0)


def _product(sizes: tuple[int, ...]) -> int:
    found = 1
    for size in sizes:
        found *= size
    return found
