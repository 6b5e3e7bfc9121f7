"""Formats without a scale: every element stands for itself."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from math import prod
from typing import TYPE_CHECKING

from ..errors import MxloomError, UsageError
from ._element import Element
from ._format import Given, Layout, Numbers, Parts, Rounding

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class Plain(Numbers):
    """A format whose values are those of one element.

    NaN stays NaN in `quantize`, so that it is seen; where it has no code, `encode` refuses it.
    """

    @property
    @abstractmethod
    def element_numbers(self) -> Element: ...

    def storage_bits(self, shape: Sequence[int]) -> int:
        return self.element_numbers.stream_bits(prod(shape))

    def quantize(self, x: Tensor, how: Rounding) -> Tensor:
        refuse_scale_options(self, how)
        element = self.element_numbers
        return narrowed(element.round(x.to(working_dtype(x.dtype, element), copy=True), how), x.dtype)

    def encode(self, x: Tensor, how: Rounding, given: Given) -> Parts:
        refuse_scale_options(self, how)
        if given:
            raise MxloomError(f"{self} has no scale, but scales were given")
        element = self.element_numbers
        values = element.round(x.to(working_dtype(x.dtype, element), copy=True), how)
        if element.nan_code is None and values.isnan().any():
            raise MxloomError(f"NaN has no code in {self}: replace it before encoding, or use a format with NaN")
        return Parts(element.codes(values))

    def decode(self, parts: Parts, dtype: torch.dtype) -> Tensor:
        element = self.element_numbers
        return narrowed(element.values(parts.codes, working_dtype(dtype, element)), dtype)

    def pack(self, parts: Parts) -> Tensor:
        return self.element_numbers.pack(parts.codes.reshape(-1))

    def layout(self, shape: Sequence[int], tensors: Mapping[str, Tensor]) -> Layout:
        return {"codes": byte_stream(self.storage_bits(shape))}

    def restore(self, tensors: Mapping[str, Tensor], shape: Sequence[int]) -> Parts:
        return Parts(self.element_numbers.unpack(tensors["codes"], prod(shape)).reshape(tuple(shape)))


def working_dtype(dtype: torch.dtype, element: Element) -> torch.dtype:
    """f64 for f64 and for elements that f32 would round twice, f32 otherwise."""
    import torch

    return torch.float64 if dtype == torch.float64 or element.needs_f64 else torch.float32


def narrowed(values: Tensor, dtype: torch.dtype) -> Tensor:
    """`values` in `dtype`, copied; what is finite stays so: at most the largest finite number of `dtype`."""
    import torch

    top = torch.finfo(dtype).max
    if top < torch.finfo(values.dtype).max:
        values = torch.where(values.isinf(), values, values.clamp(-top, top))
    return values.to(dtype, copy=True)


def byte_stream(bits: int) -> tuple[torch.dtype, tuple[int, ...]]:
    """Dtype and shape of a stream of so many bits."""
    import torch

    return torch.uint8, (-(-bits // 8),)


def refuse_scale_options(numbers: object, how: Rounding) -> None:
    """Options about scales have no meaning for a format without one, and are refused rather than ignored."""
    for option in ("scale_rule", "clip", "threshold"):
        if getattr(how, option) is not None:
            raise UsageError(
                f"{numbers} has no scale: {option}={getattr(how, option)} would have no effect; leave it out"
            )
