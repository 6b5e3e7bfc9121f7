"""The stored form of a mixed tensor: the blocks of each format dense in streams of their own, and which block is where.

Blocks are numbered as their grid is, the last dimension first. `choice` holds one bit for each, lowest bit first: 1 for
a high one. `offsets` holds, for each group of 1024 blocks, how many high ones lie before it; with the ones of `choice`
between the group's start and a block, at most 1023, they say where in its stream the block lies.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import TYPE_CHECKING

from xdsl.dialects.builtin import NoneAttr
from xdsl.ir import TypeAttribute

from ..errors import MxloomError, UsageError
from ._builtin import element_of, numbers_of
from ._element import Element
from ._format import Layout, Parts
from ._packing import pack_bits, unpack_bits
from ._plain import byte_stream
from ._scale import scale_dtype
from ._tiling import Tiling
from .block import BlockType

if TYPE_CHECKING:
    import torch
    from torch import Tensor

GROUP = 1024
"""Blocks to an offset."""

OFFSET_BITS = 32
MOST_BLOCKS = 2**31 - 1
"""Blocks that an offset can count."""

_WHOLE_BYTES = 40
"""So many codes take whole bytes, of however many bits, and of trits, five to a byte."""


@dataclass(frozen=True)
class Side:
    """One format of a mixed tensor and what is stored of it: codes, scales and zero points of the blocks that it has.

    `blocks` is how the blocks of which each has one of two formats lie on the tensor; `prefix` stands before the names.
    """

    format: TypeAttribute
    blocks: Tiling
    prefix: str

    @cached_property
    def element(self) -> Element:
        return element_of(self.format.element if isinstance(self.format, BlockType) else self.format)

    @cached_property
    def block_size(self) -> int:
        """Elements of a block, padding included."""
        return prod(self.blocks.block)

    @cached_property
    def has_own_scales(self) -> bool:
        """Whether each block has a scale, not the whole tensor (or each of its rows) one."""
        return isinstance(self.format, BlockType) and self.format.dims == self.blocks.dims

    def scale_shape(self, count: int) -> tuple[int, ...]:
        """The shape of the stored scales where `count` blocks have this format."""
        assert isinstance(self.format, BlockType)
        return (count,) if self.has_own_scales else self.format.tiling(self.blocks.shape).grid

    def bits(self, count: int) -> int:
        """Bits of what is stored for `count` blocks."""
        codes = self.element.stream_bits(count * self.block_size)
        if not isinstance(self.format, BlockType):
            return codes
        scales = prod(self.scale_shape(count))
        zeros = 0 if self.format.zero == NoneAttr() else self.element.stream_bits(scales)
        over = 0 if self.format.tensor_scale == NoneAttr() else 32
        return codes + scales * int(numbers_of(self.format.scale).bits) + zeros + over

    def layout(self, count: int) -> Layout:
        """What is stored for `count` blocks."""
        import torch

        layout: Layout = {"codes": byte_stream(self.element.stream_bits(count * self.block_size))}
        if isinstance(self.format, BlockType):
            layout["scales"] = scale_dtype(self.format.scale), self.scale_shape(count)
            if self.format.tensor_scale != NoneAttr():
                layout["global_scale"] = torch.float32, ()
            if self.format.zero != NoneAttr():
                layout["zero_points"] = byte_stream(self.element.stream_bits(prod(self.scale_shape(count))))
        return {self.prefix + name: size for name, size in layout.items()}

    def store(self, parts: Parts, own: Tensor) -> dict[str, Tensor]:
        """The tensors of the blocks where `own` (bool, one per block) is set."""
        found = {"codes": self.element.pack(self._per_block(parts.codes)[own].reshape(-1))}
        if parts.scales is not None:
            found["scales"] = self._own(parts.scales, own)
        if parts.global_scale is not None:
            found["global_scale"] = parts.global_scale
        if parts.zero_points is not None:
            found["zero_points"] = self.element.pack(self._own(parts.zero_points, own).reshape(-1))
        return {self.prefix + name: tensor for name, tensor in found.items()}

    def restore(self, tensors: Mapping[str, Tensor], own: Tensor) -> Parts:
        """The parts of stored tensors that have the layout; blocks of the other format are 0."""
        import torch

        codes = torch.zeros(len(own), self.block_size, dtype=self.element.code_dtype, device=own.device)
        count = int(own.sum())
        stored = self.element.unpack(tensors[f"{self.prefix}codes"], count * self.block_size)
        codes[own] = stored.reshape(count, self.block_size)
        scales, zeros = tensors.get(f"{self.prefix}scales"), tensors.get(f"{self.prefix}zero_points")
        return Parts(
            self.blocks.unstream(codes.reshape(-1)),
            None if scales is None else self._spread(scales, own),
            tensors.get(f"{self.prefix}global_scale"),
            None if zeros is None else self._spread(self.zero_points(zeros, count), own),
        )

    def zero_points(self, stored: Tensor, count: int) -> Tensor:
        """The stored zero points where `count` blocks have this format, or of the first `count` blocks."""
        shape = self.scale_shape(count)
        return self.element.unpack(stored, prod(shape)).reshape(shape)

    def streams(self, count: int) -> dict[str, int]:
        """How many codes each packed stream holds where `count` blocks have this format."""
        found = {f"{self.prefix}codes": count * self.block_size}
        if isinstance(self.format, BlockType) and self.format.zero != NoneAttr():
            found[f"{self.prefix}zero_points"] = prod(self.scale_shape(count))
        return found

    def cleared(self, parts: Parts, own: Tensor) -> Parts:
        """The parts with 0 in the blocks where `own` (bool, [grid of blocks]) is not set."""
        split = self.blocks.split(parts.codes)
        codes = self.blocks.merge(split.masked_fill(self.blocks.spread(~own), 0))
        scales, zeros = parts.scales, parts.zero_points
        if self.has_own_scales:
            scales = None if scales is None else _zeroed(scales, own)
            zeros = None if zeros is None else _zeroed(zeros, own)
        return Parts(codes, scales, parts.global_scale, zeros)

    def _per_block(self, codes: Tensor) -> Tensor:
        return self.blocks.stream(codes).reshape(-1, self.block_size)

    def _own(self, per_block: Tensor, own: Tensor) -> Tensor:
        return as_whole(per_block).reshape(-1)[own].view(per_block.dtype) if self.has_own_scales else per_block

    def _spread(self, stored: Tensor, own: Tensor) -> Tensor:
        if not self.has_own_scales:
            return stored
        found = as_whole(stored).new_zeros(len(own))
        found[own] = as_whole(stored)
        return found.view(stored.dtype).reshape(self.blocks.grid)


class Packing:
    """How a mixed tensor of one shape is stored."""

    def __init__(self, low: BlockType, high: TypeAttribute, shape: Sequence[int]) -> None:
        self.tiling = low.tiling(shape)
        self.low, self.high = Side(low, self.tiling, ""), Side(high, self.tiling, "high_")
        self.blocks = prod(self.tiling.grid)

    def bits(self, high_blocks: int) -> int:
        """Bits of all streams where so many blocks are high."""
        if not 0 <= high_blocks <= self.blocks:
            raise UsageError(f"of {self.blocks} blocks, 0 to {self.blocks} can be high, not {high_blocks}")
        sides = self.low.bits(self.blocks - high_blocks) + self.high.bits(high_blocks)
        return sides + self.blocks + self._groups * OFFSET_BITS

    def layout(self, high_blocks: int) -> Layout:
        """What is stored where so many blocks are high."""
        import torch

        layout = self.low.layout(self.blocks - high_blocks) | self.high.layout(high_blocks)
        return {**layout, "choice": byte_stream(self.blocks), "offsets": (torch.int32, (self._groups,))}

    def store(self, low: Parts, high: Parts, choice: Tensor) -> dict[str, Tensor]:
        """The tensors of both sides' parts; `choice` [grid of blocks]: 1 where a block is high."""
        own = choice.reshape(-1).bool()
        tensors = self.low.store(low, ~own) | self.high.store(high, own)
        return {**tensors, "choice": pack_bits(own, 1), "offsets": self._offsets(own)}

    def restore(self, tensors: Mapping[str, Tensor]) -> tuple[Parts, Parts, Tensor]:
        """The parts of both sides and the choice [grid of blocks] of stored tensors that have passed `check`."""
        import torch

        own = self._choice(tensors)
        low, high = self.low.restore(tensors, ~own), self.high.restore(tensors, own)
        return low, high, own.to(torch.uint8).reshape(self.tiling.grid)

    def high_blocks(self, tensors: Mapping[str, Tensor]) -> int:
        """How many blocks the stored choice makes high. Raises MxloomError where it is none for this shape."""
        dtype, size = byte_stream(self.blocks)
        choice = tensors.get("choice")
        if choice is None:
            raise MxloomError("choice: is missing, so that nothing says which blocks are high")
        if choice.dtype != dtype or tuple(choice.shape) != size:
            raise MxloomError(
                f"choice: is {choice.dtype} of shape {list(choice.shape)}; {self.blocks} blocks take a bit each, "
                f"{dtype} of shape {list(size)}"
            )
        return int(self._choice(tensors).sum())

    def check(self, tensors: Mapping[str, Tensor]) -> None:
        """MxloomError, beginning with the tensor's name, where offsets are wrong or padding is not zero."""
        own = self._choice(tensors)
        if not pack_bits(own, 1).equal(tensors["choice"]):
            raise MxloomError(f"choice: the bits behind its {self.blocks} blocks are not zero")
        offsets, right = tensors["offsets"], self._offsets(own)
        if not offsets.equal(right):
            group = int((offsets != right).nonzero()[0])
            raise MxloomError(
                f"offsets: entry {group} is {int(offsets[group])}, and {int(right[group])} of the "
                f"{group * GROUP} blocks before it are high"
            )
        count = int(own.sum())
        for side, blocks in ((self.low, self.blocks - count), (self.high, count)):
            for name, codes in side.streams(blocks).items():
                _check_tail(name, tensors[name], codes, side.element)

    def block(self, tensors: Mapping[str, Tensor], place: Sequence[int], dtype: torch.dtype) -> Tensor:
        """The values of the block at a place of the grid, the padding cut off."""
        number = self._number(place)
        high = self._high_before(tensors, number)
        is_high = bool(tensors["choice"][number // 8] >> (number % 8) & 1)
        side, index = (self.high, high) if is_high else (self.low, number - high)
        return self._decoded(tensors, side, index, place, dtype)

    def _number(self, place: Sequence[int]) -> int:
        grid = self.tiling.grid
        if len(place) != len(grid) or not all(0 <= at < size for at, size in zip(place, grid, strict=True)):
            raise UsageError(f"a block of a grid {list(grid)} has a place in it, got {list(place)}")
        number = 0
        for at, size in zip(place, grid, strict=True):
            number = number * size + at
        return number

    def _high_before(self, tensors: Mapping[str, Tensor], number: int) -> int:
        """How many blocks before this one are high: the group's offset, and the ones from its start to the block."""
        group = number // GROUP
        bits = unpack_bits(tensors["choice"][group * GROUP // 8 : number // 8 + 1], 1, number % GROUP, signed=False)
        return int(tensors["offsets"][group]) + int(bits.sum())

    def _decoded(
        self, tensors: Mapping[str, Tensor], side: Side, index: int, place: Sequence[int], dtype: torch.dtype
    ) -> Tensor:
        """Block `index` of a side's streams, which lies at `place`: its codes under its scale."""
        starts, sizes = self._extent(place)
        stored = tensors[f"{side.prefix}codes"]
        codes = _codes_at(stored, side.element, index * side.block_size, side.block_size)
        codes = codes.reshape(self.tiling.block)[tuple(slice(size) for size in sizes[-len(self.tiling.block) :])]
        if not isinstance(side.format, BlockType):
            return numbers_of(side.format).decode(Parts(codes), dtype)
        at = _scale_places(side, index, starts, sizes)
        grid = side.format.tiling(sizes).grid
        scales, zeros = tensors[f"{side.prefix}scales"], tensors.get(f"{side.prefix}zero_points")
        parts = Parts(
            codes.reshape(sizes),
            as_whole(scales)[at].view(scales.dtype).reshape(grid),
            tensors.get(f"{side.prefix}global_scale"),
            None if zeros is None else side.zero_points(zeros, index + 1)[at].reshape(grid),
        )
        return side.format.decode(parts, dtype).reshape(codes.shape)

    def _extent(self, place: Sequence[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Where the block at a place starts in the tensor, and its size there, the padding cut off."""
        steps = (*(1 for _ in self.tiling.leading), *self.tiling.block)
        starts = tuple(at * step for at, step in zip(place, steps, strict=True))
        ends = zip(starts, steps, self.tiling.shape, strict=True)
        return starts, tuple(min(step, size - start) for start, step, size in ends)

    def _choice(self, tensors: Mapping[str, Tensor]) -> Tensor:
        return unpack_bits(tensors["choice"], 1, self.blocks, signed=False).bool()

    @property
    def _groups(self) -> int:
        return -(-self.blocks // GROUP)

    def _offsets(self, own: Tensor) -> Tensor:
        import torch

        counts = torch.nn.functional.pad(own.to(torch.int64), (0, -len(own) % GROUP)).reshape(-1, GROUP).sum(-1)
        return (counts.cumsum(0) - counts).to(torch.int32)


def _scale_places(side: Side, index: int, starts: Sequence[int], sizes: Sequence[int]) -> tuple[slice, ...]:
    """Where in the stored scales those of a block are: its own, or what the tensor has for the rows that it spans."""
    assert isinstance(side.format, BlockType)
    if side.has_own_scales:
        return (slice(index, index + 1),)
    rows = len(starts) - len(side.format.dims)
    along = zip(starts[:rows], sizes[:rows], strict=True)
    return (*(slice(start, start + size) for start, size in along), *(slice(1) for _ in side.format.dims))


def _codes_at(stream: Tensor, element: Element, first: int, count: int) -> Tensor:
    """`count` codes of a dense stream from the code `first` on, of which no more bytes are read than hold them."""
    start = first - first % _WHOLE_BYTES
    end = -(-element.stream_bits(first + count) // 8)
    return element.unpack(stream[element.stream_bits(start) // 8 : end], first + count - start)[first - start :]


def _check_tail(name: str, stream: Tensor, count: int, element: Element) -> None:
    """The bits behind the last code are those that packing leaves there."""
    start = count - count % _WHOLE_BYTES
    tail = stream[element.stream_bits(start) // 8 :]
    try:
        right = element.pack(element.unpack(tail, count - start)).equal(tail)
    except MxloomError as error:
        raise MxloomError(f"{name}: {error}") from error
    if not right:
        raise MxloomError(f"{name}: the bits behind its {count} codes are not zero")


def as_whole(x: Tensor) -> Tensor:
    """The bits of narrow floats as integers, which torch can select and fill; anything else as it is."""
    import torch

    kinds = {1: torch.uint8, 2: torch.int16, 4: torch.int32}
    return x.view(kinds[x.dtype.itemsize]) if x.is_floating_point() and x.dtype.itemsize in kinds else x


def _zeroed(per_block: Tensor, own: Tensor) -> Tensor:
    return as_whole(per_block).masked_fill(~own, 0).view(per_block.dtype)
