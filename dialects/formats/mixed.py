"""Mixed formats: each block is stored in one of two formats (FGMP, arXiv 2504.14152)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import TYPE_CHECKING

from xdsl.dialects.builtin import DYNAMIC_INDEX
from xdsl.ir import Attribute, ParametrizedAttribute, TypeAttribute
from xdsl.irdl import irdl_attr_definition
from xdsl.parser import AttrParser
from xdsl.printer import Printer
from xdsl.utils.exceptions import VerifyException

from ..errors import MxloomError, UsageError
from ._builtin import numbers_of
from ._format import Format, Given, Layout, Parts, Rounding
from ._mixed_packing import GROUP, MOST_BLOCKS, OFFSET_BITS, Packing, as_whole
from ._plain import Plain
from ._tiling import Tiling
from .block import BlockType

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@irdl_attr_definition
class MixedType(ParametrizedAttribute, Format):
    """`!mx.mixed<low, high>`: every block of `low` is kept either in `low` or in `high`; one bit per block says which.

    `low` is a block format; `high` has blocks of the same shape, one scale for the tensor, or no scale.
    """

    name = "mx.mixed"
    low: TypeAttribute
    high: TypeAttribute

    @property
    def low_block(self) -> BlockType:
        assert isinstance(self.low, BlockType)
        return self.low

    def bits_at(self, low_share: float) -> float:
        """Bits per element where `low_share` of the blocks stand in the low format (FGMP, section 4).

        A block costs a bit that says its format, and its share of the offsets: 32 bits to 1024 blocks, which FGMP's
        formula leaves out.
        """
        low, high = numbers_of(self.low).bits, numbers_of(self.high).bits
        metadata = (1 + OFFSET_BITS / GROUP) / prod(self.low_block.dims)
        return low_share * low + (1 - low_share) * high + metadata

    @property
    def bits(self) -> float:
        """The most that an element can cost: every block in the dearer format."""
        return max(self.bits_at(0.0), self.bits_at(1.0))

    def storage_bits(self, shape: Sequence[int]) -> int:
        """The most that a tensor can cost: every block in the dearer format."""
        packing = self.packing(shape)
        return max(packing.bits(0), packing.bits(packing.blocks))

    def storage_bits_at(self, shape: Sequence[int], high_blocks: int) -> int:
        """Bits that a tensor takes of whose blocks so many are high: both formats' codes, scales, zero points, tensor
        scales; a bit for each block; offsets."""
        return self.packing(shape).bits(high_blocks)

    def blocks(self, shape: Sequence[int]) -> int:
        """How many blocks a tensor of `shape` has."""
        return prod(Tiling(tuple(shape), self.low_block.dims).grid)

    def high_blocks(self, shape: Sequence[int], tensors: Mapping[str, Tensor]) -> int:
        """How many blocks of a stored tensor are high, by its `choice`; MxloomError where that does not fit `shape`."""
        return self.packing(shape).high_blocks(tensors)

    def packing(self, shape: Sequence[int]) -> Packing:
        """How a tensor of `shape` is stored."""
        return Packing(self.low_block, self.high, shape)

    @property
    def default_scale_rule(self) -> str | None:
        return None

    def why_not(self, shape: Sequence[int]) -> str | None:
        if reason := numbers_of(self.low).why_not(shape) or numbers_of(self.high).why_not(shape):
            return reason
        is_known = all(size >= 0 for size in shape)
        if is_known and (blocks := self.blocks(shape)) > MOST_BLOCKS:
            return f"{list(shape)} has {blocks} blocks; a mixed format counts at most {MOST_BLOCKS}: split the tensor"
        return None

    def quantize(self, x: Tensor, how: Rounding, sensitivity: Tensor | None = None) -> Tensor:
        """Blocks whose impact exceeds `how.threshold` rounded into `high`, all others into `low`."""
        if how.threshold is None:
            raise UsageError(
                f"{self} chooses a format block by block: a cast into it needs a threshold of block impact"
            )
        return self.chosen(*self.candidates(x, how), how.threshold, sensitivity, exact=how.exact)

    def chosen(
        self, low: Tensor, high: Tensor, threshold: float, sensitivity: Tensor | None = None, *, exact: bool = False
    ) -> Tensor:
        """Of a tensor in both formats the blocks of `high` whose impact exceeds `threshold`, all others of `low`.

        `exact`: the impact is summed in f64.
        """
        import torch

        tiling = self.low_block.tiling(low.shape)
        keep = tiling.spread(_impact(low, high, sensitivity, tiling, exact) > threshold)
        return tiling.merge(torch.where(keep, tiling.split(high), tiling.split(low)))

    def candidates(self, x: Tensor, how: Rounding) -> tuple[Tensor, Tensor]:
        """The whole tensor in the low and in the high format."""
        (low, low_how), (high, high_how) = self.roundings(how)
        return numbers_of(low).quantize(x, low_how), numbers_of(high).quantize(x, high_how)

    def roundings(self, how: Rounding) -> tuple[tuple[TypeAttribute, Rounding], tuple[TypeAttribute, Rounding]]:
        """The low and the high format, and how a rounding into this one rounds into each."""
        if how.scale_rule is not None:
            raise UsageError(f"{self} has two formats with scale rules of their own; leave scale_rule out")
        element = Rounding(rounding=how.rounding, seed=how.seed)
        scaled = Rounding(rounding=how.rounding, clip=how.clip, seed=how.seed)
        return (self.low, scaled), (self.high, scaled if isinstance(self.high, BlockType) else element)

    def encode(self, x: Tensor, how: Rounding, given: Given) -> Parts:
        """Both encodings, each with its given scales or its own, and 0 in the blocks that have the other format.

        `given.choice` says which blocks are high, or else `how.threshold`, as in `quantize`. UsageError for neither.
        """
        if given.choice is None and how.threshold is None:
            raise UsageError(
                f"{self} keeps each block in one of two formats, and nothing says which: run the pass `mix`, "
                "which decides, or state a threshold of block impact"
            )
        (low_format, low_how), (high_format, high_how) = self.roundings(how)
        of_low = Given(given.scales, given.global_scale, given.zero_points, symmetric=given.symmetric)
        of_high = Given(given.high_scales, given.high_global_scale, given.high_zero_points, symmetric=given.symmetric)
        low = numbers_of(low_format).encode(x, low_how, of_low)
        high = numbers_of(high_format).encode(x, high_how, of_high)
        return self.joined(low, high, self._choice(low, high, x.dtype, how, given))

    def joined(self, low: Parts, high: Parts, choice: Tensor) -> Parts:
        """The parts of a tensor of whose two encodings each block has the one that `choice` [grid of blocks] says."""
        import torch

        packing, is_high = self.packing(low.codes.shape), choice.bool()
        low, high = packing.low.cleared(low, ~is_high), packing.high.cleared(high, is_high)
        return _together(low, high, is_high.to(torch.uint8))

    def parted(self, parts: Parts) -> tuple[Parts, Parts, Tensor]:
        """The parts of the low and of the high format, and the choice."""
        assert parts.choice is not None and parts.high_codes is not None
        low = Parts(parts.codes, parts.scales, parts.global_scale, parts.zero_points)
        high = Parts(parts.high_codes, parts.high_scales, parts.high_global_scale, parts.high_zero_points)
        return low, high, parts.choice

    def _choice(self, low: Parts, high: Parts, dtype: torch.dtype, how: Rounding, given: Given) -> Tensor:
        """Which blocks are high, bool [grid of blocks]."""
        tiling = self.low_block.tiling(low.codes.shape)
        if given.choice is not None:
            return _checked_choice(given.choice, tiling)
        assert how.threshold is not None
        values = numbers_of(self.low).decode(low, dtype), numbers_of(self.high).decode(high, dtype)
        return _impact(*values, None, tiling, how.exact) > how.threshold

    def decode(self, parts: Parts, dtype: torch.dtype) -> Tensor:
        import torch

        low, high, choice = self.parted(parts)
        values = numbers_of(self.low).decode(low, dtype), numbers_of(self.high).decode(high, dtype)
        tiling = self.low_block.tiling(parts.codes.shape)
        split = [tiling.split(as_whole(each)) for each in values]
        return tiling.merge(torch.where(tiling.spread(choice).bool(), split[1], split[0])).view(dtype)

    def pack(self, parts: Parts) -> Tensor:
        return self.store(parts)["codes"]

    def store(self, parts: Parts) -> dict[str, Tensor]:
        return self.packing(parts.codes.shape).store(*self.parted(parts))

    def stored_bits(self, parts: Parts) -> int:
        assert parts.choice is not None
        return self.storage_bits_at(parts.codes.shape, int(parts.choice.sum()))

    def layout(self, shape: Sequence[int], tensors: Mapping[str, Tensor]) -> Layout:
        packing = self.packing(shape)
        return packing.layout(packing.high_blocks(tensors))

    def check(self, tensors: Mapping[str, Tensor], shape: Sequence[int]) -> None:
        self.packing(shape).check(tensors)

    def restore(self, tensors: Mapping[str, Tensor], shape: Sequence[int]) -> Parts:
        return _together(*self.packing(shape).restore(tensors))

    def verify(self) -> None:
        if not isinstance(self.low, BlockType) or DYNAMIC_INDEX in self.low.dims:
            raise VerifyException(f"the low format of a mixed format has blocks of a stated size, got {self.low}")
        if not isinstance(self.high, BlockType) and not isinstance(numbers_of(self.high), Plain):
            raise VerifyException(f"the high format of a mixed format is a block or a narrow number, got {self.high}")
        if not isinstance(self.high, BlockType) or set(self.high.dims) == {DYNAMIC_INDEX}:
            return
        if self.high.dims != self.low.dims:
            raise VerifyException(
                "both formats of a mixed format have the same blocks (or high has ? for the whole tensor), "
                f"got {self.low} and {self.high}"
            )

    @classmethod
    def parse_parameters(cls, parser: AttrParser) -> Sequence[Attribute]:
        with parser.in_angle_brackets():
            low = parser.parse_type()
            parser.parse_punctuation(",")
            return low, parser.parse_type()

    def print_parameters(self, printer: Printer) -> None:
        with printer.in_angle_brackets():
            printer.print_attribute(self.low)
            printer.print_string(", ")
            printer.print_attribute(self.high)


def block_impact(x: Tensor, mixed: MixedType, sensitivity: Tensor | None = None, how: Rounding | None = None) -> Tensor:
    """The cost of keeping each block in the low format: sum over the block of g^2 (Q_low - Q_high)^2.

    FGMP (arXiv 2504.14152), section 3.1. x [...], sensitivity (g^2, the squared gradient) broadcasts to x, None for 1;
    returns f32 or f64 (as `how.exact` says), one number per block in the shape of the grid of blocks.
    """
    how = how or Rounding()
    low, high = mixed.candidates(x, how)
    return _impact(low, high, sensitivity, mixed.low_block.tiling(x.shape), how.exact)


def decode_block(
    mixed: MixedType,
    shape: Sequence[int],
    tensors: Mapping[str, Tensor],
    place: Sequence[int],
    dtype: torch.dtype | None = None,
) -> Tensor:
    """The values of one block of a stored tensor of `shape`, from the bytes that hold it alone.

    tensors: as `Encoded.tensors()` gives them; place: in the grid of blocks, (row, block in the row) for a matrix.
    Returns the block's own shape, padding cut off, in `dtype` (f32). What lies before the block is not read: an offset
    and the ones among at most 1023 bits say where it is.
    """
    import torch

    return mixed.packing(shape).block(tensors, place, torch.float32 if dtype is None else dtype)


def _together(low: Parts, high: Parts, choice: Tensor) -> Parts:
    return Parts(
        *(low.codes, low.scales, low.global_scale, low.zero_points, choice),
        *(high.codes, high.scales, high.global_scale, high.zero_points),
    )


def _checked_choice(choice: Tensor, tiling: Tiling) -> Tensor:
    """A given choice as bool [grid of blocks]."""
    import torch

    if choice.dtype not in (torch.uint8, torch.bool) or tuple(choice.shape) != tiling.grid:
        raise MxloomError(
            f"given choice is {choice.dtype} of shape {list(choice.shape)}; it is uint8 or bool with one entry per "
            f"block, of shape {list(tiling.grid)}"
        )
    if choice.numel() and int(choice.max()) > 1:
        raise MxloomError(f"given choice is 0 for a low block and 1 for a high one, got {int(choice.max())}")
    return choice.bool()


def _impact(low: Tensor, high: Tensor, sensitivity: Tensor | None, tiling: Tiling, exact: bool) -> Tensor:
    import torch

    wide = torch.float64 if exact or low.dtype == torch.float64 else torch.float32
    excess = (low.to(wide) - high.to(wide)).square()
    if sensitivity is not None:
        excess = excess * sensitivity.to(wide)
    return tiling.split(excess).sum(tiling.axes)
