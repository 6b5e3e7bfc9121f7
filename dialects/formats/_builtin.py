"""Builtin types as formats: narrow floats stand for themselves, wide ones are torch's, integers are only counted."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from typing import TYPE_CHECKING

from xdsl.dialects.builtin import (
    AnyFloat,
    FixedBitwidthType,
    Float32Type,
    Float64Type,
    IndexType,
    IntegerType,
    ReducedPrecisionFloatType,
    Signedness,
    bf16,
    f8E8M0FNU,
    f16,
    f32,
    f64,
)
from xdsl.ir import Attribute

from ..errors import MxloomError
from ._element import Element, Fixed, Minifloat
from ._format import Given, Layout, Numbers, Parts, Rounding
from ._plain import Plain, byte_stream, narrowed, refuse_scale_options
from ._semantics import BF16, F16, F32

if TYPE_CHECKING:
    import torch
    from torch import Tensor

WIDE_FLOATS: tuple[AnyFloat, ...] = (f64, f32, f16, bf16)


@lru_cache(maxsize=256)
def numbers_of(format: Attribute) -> Numbers:
    """What a type answers as a format, or an error that names the type."""
    if isinstance(format, Numbers):
        return format
    for wide in WIDE_FLOATS:
        if format == wide:
            return WideFloat(wide)
    if format == f8E8M0FNU:
        return ScaleOnly(format)
    if isinstance(format, ReducedPrecisionFloatType) and format.bitwidth <= 19:
        return NarrowFloat(format)
    if isinstance(format, IntegerType | IndexType):
        return Integer(format)
    raise MxloomError(f"{format} is not a number format of mxloom: use a float, an integer or a type of the dialect mx")


def element_of(format: Attribute, error: type[Exception] = MxloomError) -> Element:
    """The element's numbers of a type that can stand inside a block."""
    if isinstance(format, Plain):
        return format.element_numbers
    if isinstance(format, IntegerType):
        if format.signedness.data is Signedness.UNSIGNED or not 2 <= format.width.data <= 32:
            raise error(f"an integer element is signed and has 2 to 32 bits, got {format}")
        return Fixed(format.width.data)
    if format in (bf16, f16):
        return Minifloat(BF16 if format == bf16 else F16)
    if isinstance(format, ReducedPrecisionFloatType) and format != f8E8M0FNU and format.bitwidth <= 19:
        return Minifloat(format.SEMANTICS)
    raise error(
        f"an element is an integer, a float of at most 19 bits, !mx.fixed, !mx.float or !mx.ternary, got {format}"
    )


@dataclass(frozen=True)
class NarrowFloat(Plain):
    """f8E4M3FN, f4E2M1FN ...: rounding saturates; infinity becomes the largest finite value."""

    format: ReducedPrecisionFloatType

    @property
    def element_numbers(self) -> Minifloat:
        return Minifloat(self.format.SEMANTICS)

    @property
    def bits(self) -> float:
        return self.format.bitwidth

    def __str__(self) -> str:
        return str(self.format)


@dataclass(frozen=True)
class Counted(Numbers):
    """A type that has a size but into which nothing is rounded."""

    format: Attribute

    @property
    def bits(self) -> float:
        return self.format.bitwidth if isinstance(self.format, FixedBitwidthType) else 64

    def storage_bits(self, shape: Sequence[int]) -> int:
        return prod(shape) * int(self.bits)

    def quantize(self, x: Tensor, how: Rounding) -> Tensor:
        raise self.refusal

    def encode(self, x: Tensor, how: Rounding, given: Given) -> Parts:
        raise self.refusal

    def decode(self, parts: Parts, dtype: torch.dtype) -> Tensor:
        raise self.refusal

    def pack(self, parts: Parts) -> Tensor:
        raise self.refusal

    def layout(self, shape: Sequence[int], tensors: Mapping[str, Tensor]) -> Layout:
        raise self.refusal

    def restore(self, tensors: Mapping[str, Tensor], shape: Sequence[int]) -> Parts:
        raise self.refusal

    @property
    @abstractmethod
    def refusal(self) -> MxloomError:
        """Why no values are rounded into the type, and what to use instead."""


class Integer(Counted):
    """Builtin integers and index: indices and masks; an integer format of values is a block or a fixed point."""

    @property
    def refusal(self) -> MxloomError:
        width = int(self.bits)
        instead = (
            f"use !mx.fixed<{width}, 0> for plain integers or !mx.block<?xi{width}, f32> for scaled ones"
            if 2 <= width <= 32
            else "!mx.fixed holds plain integers of 2 to 32 bits"
        )
        return MxloomError(f"nothing is rounded into {self.format}, which holds indices and masks: {instead}")


class ScaleOnly(Counted):
    """f8E8M0FNU: powers of two without sign or zero, of use only as the scale of a block."""

    @property
    def refusal(self) -> MxloomError:
        return MxloomError(
            f"{self.format} has neither sign nor zero: it is the scale of a block, not a format of values"
        )


@dataclass(frozen=True)
class WideFloat(Numbers):
    """f64, f32, f16 and bf16 with torch's meaning: overflow gives infinity (but towards zero, the largest finite)."""

    format: AnyFloat

    @property
    def bits(self) -> float:
        return self.format.bitwidth

    def __str__(self) -> str:
        return str(self.format)

    @property
    def dtype(self) -> torch.dtype:
        """The torch dtype of the format."""
        import torch

        return {f64: torch.float64, f32: torch.float32, f16: torch.float16, bf16: torch.bfloat16}[self.format]

    def storage_bits(self, shape: Sequence[int]) -> int:
        return prod(shape) * int(self.bits)

    def quantize(self, x: Tensor, how: Rounding) -> Tensor:
        return narrowed(self._rounded(x, how), x.dtype)

    def encode(self, x: Tensor, how: Rounding, given: Given) -> Parts:
        if given:
            raise MxloomError(f"{self} has no scale, but scales were given")
        return Parts(self._rounded(x, how).contiguous().view(self._code_dtype))

    def decode(self, parts: Parts, dtype: torch.dtype) -> Tensor:
        return narrowed(parts.codes.view(self.dtype), dtype)

    def pack(self, parts: Parts) -> Tensor:
        import torch

        return parts.codes.reshape(-1).view(torch.uint8)

    def layout(self, shape: Sequence[int], tensors: Mapping[str, Tensor]) -> Layout:
        return {"codes": byte_stream(self.storage_bits(shape))}

    def restore(self, tensors: Mapping[str, Tensor], shape: Sequence[int]) -> Parts:
        return Parts(tensors["codes"].clone().view(self._code_dtype).reshape(tuple(shape)))

    @property
    def _code_dtype(self) -> torch.dtype:
        import torch

        return {2: torch.int16, 4: torch.int32, 8: torch.int64}[self.dtype.itemsize]

    def _rounded(self, x: Tensor, how: Rounding) -> Tensor:
        """`x` in the format's own dtype, in memory of its own."""
        refuse_scale_options(self, how)
        if how.rounding == "rne" or x.dtype == self.dtype or isinstance(self.format, Float64Type):
            return _to_nearest(x, self.dtype)
        semantics = F32 if isinstance(self.format, Float32Type) else BF16 if self.format == bf16 else F16
        return _to_grid(x, Minifloat(semantics), how).to(self.dtype)


def _to_nearest(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Like `Tensor.to`, but f64 goes into bf16 and f16 in one rounding, not by way of f32."""
    import torch

    if x.dtype != torch.float64 or dtype in (torch.float64, torch.float32):
        return x.to(dtype, copy=True)
    return _to_grid(x, Minifloat(BF16 if dtype == torch.bfloat16 else F16), Rounding()).to(dtype)


def _to_grid(x: Tensor, target: Minifloat, how: Rounding) -> Tensor:
    """`x` in f64 on the target's grid, its exponents unbounded above; what exceeds the largest value is infinite."""
    import torch

    wide = x.to(torch.float64, copy=True)
    beyond = wide.isinf()
    unbounded = Minifloat(target.semantics, saturating=False).round(wide, how)
    infinite = torch.full_like(unbounded, torch.inf).copysign(unbounded)
    over = unbounded.abs() > target.largest
    if how.rounding == "rtz":
        return torch.where(beyond, infinite, unbounded.clamp(-target.largest, target.largest))
    return torch.where(beyond | over, infinite, unbounded)
