"""What every number format answers, how a cast rounds, and the tensors that an encoded tensor consists of."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

from xdsl.ir import TypeAttribute

from ..arguments import one_of, real_number, whole_number
from ..errors import UsageError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

ROUNDINGS = ("rne", "rna", "rtz", "stochastic")
POWER_OF_TWO_RULES = ("floor", "ceil", "even", "rceil")
FLOAT_RULES = ("absmax", "absmean", "minmax")
SEARCHED_RULES = ("outlier-aware", "four-over-six", "n-over-six", "sweep")
SCALE_RULES = (*POWER_OF_TWO_RULES, *FLOAT_RULES, *SEARCHED_RULES)


@dataclass(frozen=True)
class Rounding:
    """How a cast rounds: a property of the operation that rounds, never of the format.

    scale_rule: how a block's scale follows from its values (None: the format's default); rounding: of the elements,
    nearest with ties to even, nearest with ties away from zero, towards zero, or stochastic from `seed`;
    clip: the scale is made for `clip` times the largest magnitude (0 < clip <= 1), values above saturate; seed: a whole
    number of 64 bits;
    threshold: for mixed formats, the block impact above which a block is kept in the high format;
    exact: for mixed formats, sum a block's impact in f64, which holds it where hardware decides, instead of f32.
    """

    scale_rule: str | None = None
    rounding: str = "rne"
    clip: float | None = None
    seed: int = 0
    threshold: float | None = None
    exact: bool = False

    def __post_init__(self) -> None:
        one_of("rounding", self.rounding, ROUNDINGS)
        whole_number("seed", self.seed, -(2**63), 2**63 - 1)
        if self.scale_rule is not None:
            one_of("scale_rule", self.scale_rule, SCALE_RULES)
        if self.clip is not None and not 0 < real_number("clip", self.clip) <= 1:
            raise UsageError(f"clip is the part of the largest magnitude that is kept, in (0, 1], got {self.clip}")
        if self.threshold is not None:
            real_number("threshold", self.threshold)


@dataclass(frozen=True)
class Parts:
    """The tensors of an encoded tensor.

    codes: one per element, in the tensor's own shape; scales and zero_points: one per block, in the shape of the grid
    of blocks; global_scale: f32, no dimension. Of a mixed format these are the low format's, `high_...` are the high
    one's in the same shapes, and choice (uint8, in the shape of the grid of blocks) is 1 where a block is a high one;
    codes and scales of the format that a block is not in are 0.
    """

    codes: Tensor
    scales: Tensor | None = None
    global_scale: Tensor | None = None
    zero_points: Tensor | None = None
    choice: Tensor | None = None
    high_codes: Tensor | None = None
    high_scales: Tensor | None = None
    high_global_scale: Tensor | None = None
    high_zero_points: Tensor | None = None


Layout = dict[str, "tuple[torch.dtype, tuple[int, ...]]"]


@dataclass(frozen=True)
class Given:
    """Scales (and zero points, and the choice of a mixed format) that stand already and are to be kept as they are.

    scales, global_scale and zero_points are those of the format, of a mixed one those of its low format; choice: uint8
    or bool, one per block in the shape of the grid, 1 where the block is kept in the high format; high_...: of the high
    format. symmetric: integers keep the symmetric range that they have without given scales (-7 to 7, not -8 to 7).
    """

    scales: Tensor | None = None
    global_scale: Tensor | None = None
    zero_points: Tensor | None = None
    choice: Tensor | None = None
    high_scales: Tensor | None = None
    high_global_scale: Tensor | None = None
    high_zero_points: Tensor | None = None
    symmetric: bool = False

    def __bool__(self) -> bool:
        return any(getattr(self, part) is not None for part in GIVEN_PARTS)


GIVEN_PARTS = tuple(field.name for field in fields(Given) if field.name != "symmetric")
"""What may be given, by name."""


class Numbers(ABC):
    """What every format answers, whether a type of this dialect or a builtin one."""

    @property
    @abstractmethod
    def bits(self) -> float:
        """Bits per element, its share of scales, zero points and metadata included."""

    @abstractmethod
    def storage_bits(self, shape: Sequence[int]) -> int:
        """Bits that a tensor of `shape` takes, padding of ragged blocks, scales and zero points included.

        The most that it can take where that depends on its values (mixed formats).
        """

    def stored_bits(self, parts: Parts) -> int:
        """Bits that an encoded tensor takes."""
        return self.storage_bits(tuple(parts.codes.shape))

    @abstractmethod
    def quantize(self, x: Tensor, how: Rounding) -> Tensor:
        """`x` rounded to the values that the format can hold, in the dtype and shape of `x`."""

    @abstractmethod
    def encode(self, x: Tensor, how: Rounding, given: Given) -> Parts:
        """The codes and scales of `x`; given scales are kept as they are."""

    @abstractmethod
    def decode(self, parts: Parts, dtype: torch.dtype) -> Tensor:
        """The values of codes and scales, in `dtype` (computed in f32, or f64 for f64)."""

    @abstractmethod
    def pack(self, parts: Parts) -> Tensor:
        """The codes as a dense stream of bytes (uint8, one dimension), padding of ragged blocks included."""

    @abstractmethod
    def layout(self, shape: Sequence[int], tensors: Mapping[str, Tensor]) -> Layout:
        """Name, dtype and shape of the tensors in which a tensor of `shape` is stored, packed `codes` among them.

        `tensors` are what is stored: sizes may follow from values (which blocks of a mixed format are high). Raises
        MxloomError, beginning with the tensor's name, where these are none for the shape.
        """

    def check(self, tensors: Mapping[str, Tensor], shape: Sequence[int]) -> None:
        """Raise MxloomError, beginning with the tensor's name, where what stored tensors of the layout say is wrong."""
        return

    @abstractmethod
    def restore(self, tensors: Mapping[str, Tensor], shape: Sequence[int]) -> Parts:
        """The parts of stored tensors that have the layout and pass the check."""

    def store(self, parts: Parts) -> dict[str, Tensor]:
        """The tensors that a file stores."""
        return {"codes": self.pack(parts)}

    @property
    def default_scale_rule(self) -> str | None:
        """The scale rule of a cast that names none; None where the format has no scale."""
        return None

    def why_not(self, shape: Sequence[int]) -> str | None:
        """Why the format cannot lie on a tensor of `shape`; None if it can."""
        return None


class Format(TypeAttribute, Numbers):
    """A number format of this dialect; a family is one file of this package that defines one."""
