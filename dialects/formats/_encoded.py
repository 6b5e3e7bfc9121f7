"""An encoded tensor: what a checkpoint stores, and the way back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from math import prod
from typing import TYPE_CHECKING

from xdsl.ir import TypeAttribute

from ..arguments import came
from ..errors import MxloomError, UsageError
from ._builtin import numbers_of
from ._format import Parts

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass(frozen=True, eq=False)
class Encoded:
    """A tensor of `shape` in `format`.

    codes [shape]: uint8 for minifloats, int8 (int16, int32 where wider) for integers; scales: one per block, in the
    shape of the grid of blocks and the torch dtype of the format's scale; global_scale: f32 without dimension;
    zero_points: like scales, in the dtype of the codes. Of a mixed format these are the low format's, `high_...` the
    high one's, and choice (uint8, the shape of the grid of blocks) is 1 where a block is high; codes and scales of the
    format that a block is not in are 0. What the format lacks is None.
    """

    format: TypeAttribute
    shape: tuple[int, ...]
    codes: Tensor
    scales: Tensor | None = None
    global_scale: Tensor | None = None
    zero_points: Tensor | None = None
    choice: Tensor | None = None
    high_codes: Tensor | None = None
    high_scales: Tensor | None = None
    high_global_scale: Tensor | None = None
    high_zero_points: Tensor | None = None

    @classmethod
    def of(cls, format: TypeAttribute, parts: Parts) -> Encoded:
        """The encoded tensor that consists of `parts`."""
        found = vars(parts) | {"codes": parts.codes.contiguous()}
        return cls(format, tuple(parts.codes.shape), **found)

    @property
    def parts(self) -> Parts:
        return Parts(**{field.name: getattr(self, field.name) for field in fields(Parts)})

    def decode(self, dtype: torch.dtype | None = None) -> Tensor:
        """The values, computed in f32 (f64 if `dtype` is f64) and returned in `dtype` (default f32).

        A finite value is at most the largest finite number of `dtype`. Raises UsageError for a dtype of no floats.
        """
        import torch

        dtype = torch.float32 if dtype is None else dtype
        if not isinstance(dtype, torch.dtype):
            raise UsageError(f"dtype is a float dtype of torch, torch.float32 for one, got {came(dtype)}")
        if not dtype.is_floating_point or dtype in (torch.float8_e8m0fnu, torch.float4_e2m1fn_x2):
            raise UsageError(f"values are decoded into a float dtype, got {dtype}: decode first, then convert")
        return numbers_of(self.format).decode(self.parts, dtype)

    def packed(self) -> Tensor:
        """The codes as uint8, one dimension: block after block, lowest bit first, padding of ragged blocks included.

        Of a mixed format those of the low blocks; `tensors()` has all streams.
        """
        return numbers_of(self.format).pack(self.parts)

    @property
    def storage_bits(self) -> int:
        """Bits of codes, scales, zero points and tensor scale, padding of ragged blocks included."""
        return numbers_of(self.format).stored_bits(self.parts)

    @property
    def bits_per_element(self) -> float:
        return self.storage_bits / max(prod(self.shape), 1)

    def tensors(self) -> dict[str, Tensor]:
        """What a file stores: packed `codes`, and `scales`, `global_scale`, `zero_points` where the format has them.

        Zero points are packed like codes, so that the bytes of a file are those that `storage_bits` counts. A mixed
        format has the low format's of the low blocks alone, the same of the high blocks under `high_...`, `choice`, one
        bit for each block, and `offsets`: for each 1024 blocks, how many high ones lie before them.
        """
        return numbers_of(self.format).store(self.parts)

    @classmethod
    def from_tensors(cls, format: TypeAttribute, shape: Sequence[int], tensors: Mapping[str, Tensor]) -> Encoded:
        """The encoded tensor that `tensors()` gave. Raises MxloomError where a tensor does not fit format and shape."""
        numbers = numbers_of(format)
        if reason := numbers.why_not(shape):
            raise MxloomError(reason)
        layout = numbers.layout(shape, tensors)
        if set(tensors) != set(layout):
            raise MxloomError(
                f"{format} is stored as {', '.join(layout)}; got {', '.join(sorted(tensors)) or 'nothing'}"
            )
        for name, (dtype, size) in layout.items():
            _check(name, tensors[name], dtype, size, format)
        numbers.check(tensors, shape)
        return cls.of(format, numbers.restore(tensors, shape))


def _check(name: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...], format: TypeAttribute) -> None:
    if tensor.dtype != dtype or tuple(tensor.shape) != shape:
        raise MxloomError(
            f"{name} of {format} must be {dtype} of shape {list(shape)}, "
            f"got {tensor.dtype} of shape {list(tensor.shape)}"
        )
