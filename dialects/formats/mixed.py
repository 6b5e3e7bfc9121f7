"""Mixed formats: each block is stored in one of two formats (FGMP, arXiv 2504.14152)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import TYPE_CHECKING

from xdsl.dialects.builtin import DYNAMIC_INDEX, NoneAttr
from xdsl.ir import Attribute, ParametrizedAttribute, TypeAttribute
from xdsl.irdl import irdl_attr_definition
from xdsl.parser import AttrParser
from xdsl.printer import Printer
from xdsl.utils.exceptions import VerifyException

from ..errors import MxloomError, UsageError
from ._builtin import numbers_of
from ._format import Format, Given, Layout, Parts, Rounding
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
        """Bits per element where `low_share` of the blocks stand in the low format (FGMP, section 4)."""
        low, high = numbers_of(self.low).bits, numbers_of(self.high).bits
        return low_share * low + (1 - low_share) * high + 1 / prod(self.low_block.dims)

    @property
    def bits(self) -> float:
        """The most that an element can cost: every block in the dearer format."""
        return max(self.bits_at(0.0), self.bits_at(1.0))

    def storage_bits(self, shape: Sequence[int]) -> int:
        """The most that a tensor can cost: every block in the dearer format, one bit each, both tensor scales."""
        blocks = prod(self.low_block.tiling(shape).grid)
        once = [_bits_per_tensor(part) for part in (self.low, self.high)]
        sizes = [numbers_of(part).storage_bits(shape) for part in (self.low, self.high)]
        return max(size - whole for size, whole in zip(sizes, once, strict=True)) + blocks + sum(once)

    @property
    def default_scale_rule(self) -> str | None:
        return None

    def why_not(self, shape: Sequence[int]) -> str | None:
        return numbers_of(self.low).why_not(shape) or numbers_of(self.high).why_not(shape)

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

    @property
    def has_stored_form(self) -> bool:
        return False

    def encode(self, x: Tensor, how: Rounding, given: Given) -> Parts:
        raise self._not_stored

    def decode(self, parts: Parts, dtype: torch.dtype) -> Tensor:
        raise self._not_stored

    def pack(self, parts: Parts) -> Tensor:
        raise self._not_stored

    def layout(self, shape: Sequence[int]) -> Layout:
        raise self._not_stored

    def restore(self, tensors: Mapping[str, Tensor], shape: Sequence[int]) -> Parts:
        raise self._not_stored

    @property
    def _not_stored(self) -> MxloomError:
        return MxloomError(
            f"{self} has no stored form yet: quantize into it to measure it, "
            f"or store the tensor as {self.low} or {self.high}"
        )

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


def _bits_per_tensor(part: TypeAttribute) -> int:
    """Bits of the scales that a tensor has once."""
    if not isinstance(part, BlockType):
        return 0
    if set(part.dims) == {DYNAMIC_INDEX}:
        return int(numbers_of(part.scale).bits)
    return 0 if part.tensor_scale == NoneAttr() else 32


def _impact(low: Tensor, high: Tensor, sensitivity: Tensor | None, tiling: Tiling, exact: bool) -> Tensor:
    import torch

    wide = torch.float64 if exact or low.dtype == torch.float64 else torch.float32
    excess = (low.to(wide) - high.to(wide)).square()
    if sensitivity is not None:
        excess = excess * sensitivity.to(wide)
    return tiling.split(excess).sum(tiling.axes)
