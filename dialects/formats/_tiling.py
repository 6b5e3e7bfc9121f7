"""How blocks lie on a tensor: its last dimensions are cut into tiles, a ragged last tile is padded with zeros."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import TYPE_CHECKING

from xdsl.dialects.builtin import DYNAMIC_INDEX

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Tiling:
    """Blocks of `dims` (`?` is DYNAMIC_INDEX: the whole dimension) on the last dimensions of a tensor of `shape`."""

    shape: tuple[int, ...]
    dims: tuple[int, ...]

    @cached_property
    def leading(self) -> tuple[int, ...]:
        """The dimensions that no block reaches into."""
        return self.shape[: len(self.shape) - len(self.dims)]

    @cached_property
    def trailing(self) -> tuple[int, ...]:
        return self.shape[len(self.leading) :]

    @cached_property
    def block(self) -> tuple[int, ...]:
        """The block's size in each trailing dimension."""
        sizes = zip(self.trailing, self.dims, strict=True)
        return tuple(max(size, 1) if dim == DYNAMIC_INDEX else dim for size, dim in sizes)

    @cached_property
    def tiles(self) -> tuple[int, ...]:
        """The number of blocks along each trailing dimension."""
        return tuple(-(-size // step) for size, step in zip(self.trailing, self.block, strict=True))

    @cached_property
    def grid(self) -> tuple[int, ...]:
        """The shape of one number per block."""
        return (*self.leading, *self.tiles)

    @cached_property
    def stored_elements(self) -> int:
        """Elements, padding included."""
        return prod(self.grid) * prod(self.block)

    @cached_property
    def axes(self) -> tuple[int, ...]:
        """The axes of a split tensor that run inside a block."""
        return tuple(range(len(self.leading) + 1, len(self.leading) + 2 * len(self.dims), 2))

    @cached_property
    def is_ragged(self) -> bool:
        return any(size % step for size, step in zip(self.trailing, self.block, strict=True))

    def split(self, x: Tensor) -> Tensor:
        """`x` as [leading..., tiles, block, tiles, block, ...]; a view where nothing is padded."""
        if self.is_ragged:
            x = _pad(x, [-size % step for size, step in zip(self.trailing, self.block, strict=True)])
        pairs = zip(self.tiles, self.block, strict=True)
        return x.reshape(*self.leading, *(size for pair in pairs for size in pair))

    def merge(self, split: Tensor) -> Tensor:
        """The tensor of a split one, padding cut off."""
        padded = [count * step for count, step in zip(self.tiles, self.block, strict=True)]
        x = split.reshape(*self.leading, *padded)
        if not self.is_ragged:
            return x
        return x[(..., *(slice(size) for size in self.trailing))].contiguous()

    def spread(self, per_block: Tensor) -> Tensor:
        """One number per block ([grid]) so that it broadcasts over a split tensor."""
        return per_block.reshape(*self.leading, *(size for count in self.tiles for size in (count, 1)))

    def stream(self, x: Tensor) -> Tensor:
        """`x` as one dimension: block after block, each with its padding."""
        return self.stream_of_split(self.split(x))

    def stream_of_split(self, split: Tensor) -> Tensor:
        """A split tensor as one dimension."""
        return split.permute(self._stream_order).reshape(-1)

    def unstream(self, stream: Tensor) -> Tensor:
        """The tensor of a stream."""
        order = self._stream_order
        back = [order.index(axis) for axis in range(len(order))]
        return self.merge(stream.reshape(*self.grid, *self.block).permute(back))

    @property
    def _stream_order(self) -> list[int]:
        outer = [axis for axis in range(len(self.leading) + 2 * len(self.dims)) if axis not in self.axes]
        return [*outer, *self.axes]


def _pad(x: Tensor, amounts: Sequence[int]) -> Tensor:
    import torch

    pads = [pad for amount in reversed(amounts) for pad in (0, amount)]
    if x.dtype in (torch.int16, torch.int32, torch.int8, torch.uint8) or x.is_floating_point():
        return torch.nn.functional.pad(x, pads)
    raise TypeError(f"no padding for {x.dtype}")
