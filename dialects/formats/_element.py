"""Elements by their numbers: a minifloat or a fixed-point number, rounded, coded and decoded on torch tensors."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import lru_cache
from math import frexp
from typing import TYPE_CHECKING

from xdsl.dialects.builtin import FloatNanEncoding, FloatNonfiniteBehavior, FloatSemantics

from ._packing import pack_bits, pack_trits, trit_bytes, unpack_bits, unpack_trits
from ._rounding import round_to_integers

if TYPE_CHECKING:
    import torch
    from numpy import ndarray
    from torch import Tensor

    from ._format import Rounding


class Element(ABC):
    """One number: the values it can hold, and how a wide value becomes one of them."""

    @property
    @abstractmethod
    def largest(self) -> float:
        """The largest finite value that rounding gives."""

    @property
    @abstractmethod
    def precision(self) -> int:
        """Mantissa (fractional) bits after the leading one at the largest exponent."""

    @property
    @abstractmethod
    def needs_f64(self) -> bool:
        """Whether rounding in f32 would lose bits."""

    @property
    @abstractmethod
    def code_dtype(self) -> torch.dtype:
        """The torch dtype that holds a code."""

    @abstractmethod
    def round(self, values: Tensor, how: Rounding) -> Tensor:
        """Round `values` (f32 or f64, overwritten) to values of the element, saturating; NaN stays NaN."""

    @abstractmethod
    def codes(self, values: Tensor) -> Tensor:
        """The codes of values that the element holds exactly; NaN, where it has no code, becomes code 0."""

    @abstractmethod
    def values(self, codes: Tensor, dtype: torch.dtype) -> Tensor:
        """The values of codes, in f32 or f64."""

    @abstractmethod
    def stream_bits(self, count: int) -> int:
        """Bits that `count` packed codes take."""

    @abstractmethod
    def pack(self, codes: Tensor) -> Tensor:
        """Codes (one dimension, in order) as bytes."""

    @abstractmethod
    def unpack(self, packed: Tensor, count: int) -> Tensor:
        """The first `count` codes of packed bytes."""

    @property
    def has_infinity(self) -> bool:
        """Whether a code means infinity; rounding gives none."""
        return False

    @property
    def nan_code(self) -> int | None:
        """One code of NaN, or None for an element without NaN."""
        return None

    @property
    def largest_exponent(self) -> int:
        """floor(log2(largest)): emax of OCP MX 1.0, section 5.3."""
        return frexp(self.largest)[1] - 1


@dataclass(frozen=True)
class Minifloat(Element):
    """Sign, exponent and mantissa, subnormals included. Rounding saturates; -0 is kept where it has a code."""

    semantics: FloatSemantics
    saturating: bool = True

    @property
    def bits(self) -> int:
        return self.semantics.bitwidth

    @property
    def precision(self) -> int:
        return self.semantics.mantissa_bits

    @property
    def lowest_exponent(self) -> int:
        """Exponent of the smallest normal value and of all subnormals."""
        return 1 - self.semantics.exponent_bias

    @property
    def largest(self) -> float:
        s = self.semantics
        if s.nonfinite is FloatNonfiniteBehavior.IEEE:
            return (2 - 2.0**-s.mantissa_bits) * 2.0 ** (s.max_exponent - 1 - s.exponent_bias)
        top_is_nan = s.nonfinite is FloatNonfiniteBehavior.NAN_ONLY and s.nan_encoding is FloatNanEncoding.ALL_ONES
        if top_is_nan and s.mantissa_bits == 0:
            return 2.0 ** (s.max_exponent - 1 - s.exponent_bias)
        return (2 - (1 + top_is_nan) * 2.0**-s.mantissa_bits) * 2.0 ** (s.max_exponent - s.exponent_bias)

    @property
    def smallest(self) -> float:
        """The smallest positive value."""
        return 2.0 ** (self.lowest_exponent - self.precision)

    @property
    def has_negative_zero(self) -> bool:
        return self.semantics.nan_encoding is not FloatNanEncoding.NEGATIVE_ZERO

    @property
    def has_infinity(self) -> bool:
        return self.semantics.nonfinite is FloatNonfiniteBehavior.IEEE

    @property
    def needs_f64(self) -> bool:
        return self.lowest_exponent - self.precision < -126 or self.precision > 22

    @property
    def nan_code(self) -> int | None:
        s = self.semantics
        if s.nonfinite is FloatNonfiniteBehavior.FINITE_ONLY:
            return None
        if s.nan_encoding is FloatNanEncoding.NEGATIVE_ZERO:
            return 1 << s.sign_shift
        return (1 << s.sign_shift) - 1

    @property
    def code_dtype(self) -> torch.dtype:
        import torch

        return torch.uint8 if self.bits <= 8 else torch.int16 if self.bits <= 16 else torch.int32

    def round(self, values: Tensor, how: Rounding) -> Tensor:
        if self.saturating:
            values.clamp_(-self.largest, self.largest)
        step = _exponent_field(values).clamp_(min=_field(self.lowest_exponent, values.dtype))
        step -= self.precision << _mantissa_bits(values.dtype)
        values *= (_field(_bias(values.dtype), values.dtype) - step).view(values.dtype)
        values = round_to_integers(values, how)
        values *= step.view(values.dtype)
        if not self.has_negative_zero:
            values += 0.0
        return values

    def codes(self, values: Tensor) -> Tensor:
        import torch

        exponent = _exponent_field(values).clamp_(min=_field(self.lowest_exponent, values.dtype))
        unit = exponent - (self.precision << _mantissa_bits(values.dtype))
        inverse = (_field(_bias(values.dtype), values.dtype) - unit).view(values.dtype)
        significand = (values.abs() * inverse).nan_to_num_(nan=0.0).to(torch.int32)
        binade = (exponent >> _mantissa_bits(values.dtype)) - (self.lowest_exponent + _bias(values.dtype))
        codes = (binade.to(torch.int32) << self.precision) + significand
        negative = values.signbit()
        if not self.has_negative_zero:
            negative &= values != 0
        codes += negative.to(torch.int32) << self.semantics.sign_shift
        codes = codes.masked_fill_(values.isnan(), self.nan_code or 0)
        return codes.to(self.code_dtype)

    def values(self, codes: Tensor, dtype: torch.dtype) -> Tensor:
        import torch

        table = torch.from_numpy(_value_table(self)).to(device=codes.device, dtype=dtype)
        return table[codes.to(torch.int32) & ((1 << self.bits) - 1)]

    def stream_bits(self, count: int) -> int:
        return count * self.bits

    def pack(self, codes: Tensor) -> Tensor:
        return pack_bits(codes, self.bits)

    def unpack(self, packed: Tensor, count: int) -> Tensor:
        return unpack_bits(packed, self.bits, count, signed=False).to(self.code_dtype)


@dataclass(frozen=True)
class Fixed(Element):
    """Two's complement with `fraction` bits after the point; symmetric leaves the most negative code out. No -0."""

    width: int
    fraction: int = 0
    symmetric: bool = False

    @property
    def bits(self) -> int:
        return self.width

    @property
    def top_code(self) -> int:
        return (1 << (self.width - 1)) - 1

    @property
    def bottom_code(self) -> int:
        return -self.top_code if self.symmetric else -self.top_code - 1

    @property
    def largest(self) -> float:
        return self.top_code * 2.0**-self.fraction

    @property
    def precision(self) -> int:
        return self.width - 2

    @property
    def needs_f64(self) -> bool:
        return self.width > 24

    @property
    def code_dtype(self) -> torch.dtype:
        import torch

        return torch.int8 if self.width <= 8 else torch.int16 if self.width <= 16 else torch.int32

    def round(self, values: Tensor, how: Rounding) -> Tensor:
        if self.fraction:
            values *= 2.0**self.fraction
        # Clamped first: infinity minus infinity, which rounding would form, is no number.
        values = round_to_integers(values.clamp_(self.bottom_code, self.top_code), how)
        if self.fraction:
            values *= 2.0**-self.fraction
        values += 0.0
        return values

    def codes(self, values: Tensor) -> Tensor:
        return (values * 2.0**self.fraction).nan_to_num_(nan=0.0).to(self.code_dtype)

    def values(self, codes: Tensor, dtype: torch.dtype) -> Tensor:
        return codes.to(dtype).mul_(2.0**-self.fraction)

    def stream_bits(self, count: int) -> int:
        return count * self.width

    def pack(self, codes: Tensor) -> Tensor:
        return pack_bits(codes, self.width)

    def unpack(self, packed: Tensor, count: int) -> Tensor:
        return unpack_bits(packed, self.width, count, signed=True).to(self.code_dtype)


@dataclass(frozen=True)
class Trit(Fixed):
    """-1, 0 or 1; five to a byte (3^5 = 243), the first the most significant."""

    width: int = 2
    symmetric: bool = True

    def stream_bits(self, count: int) -> int:
        return 8 * trit_bytes(count)

    def pack(self, codes: Tensor) -> Tensor:
        return pack_trits(codes)

    def unpack(self, packed: Tensor, count: int) -> Tensor:
        return unpack_trits(packed, count)


@lru_cache(maxsize=64)
def _value_table(element: Minifloat) -> ndarray:
    """Every code's value in f64, exact by construction; numpy's: a tensor made while torch traces is not a real one."""
    import numpy as np

    s = element.semantics
    codes = np.arange(1 << s.bitwidth)
    field = codes >> s.mantissa_bits & s.max_exponent
    mantissa = codes & s.max_mantissa
    significand = np.where(field > 0, mantissa + (1 << s.mantissa_bits), mantissa).astype(np.float64)
    values = np.ldexp(significand, np.maximum(field, 1) - s.exponent_bias - s.mantissa_bits)
    values = np.where(codes >> s.sign_shift > 0, -values, values)
    if s.nonfinite is FloatNonfiniteBehavior.IEEE:
        special = field == s.max_exponent
        values[special & (mantissa == 0)] *= np.inf
        values[special & (mantissa > 0)] = np.nan
    elif element.nan_code is not None:
        values[element.nan_code] = np.nan
        if s.nan_encoding is FloatNanEncoding.ALL_ONES:
            values[-1] = np.nan
    return values


def _mantissa_bits(dtype: torch.dtype) -> int:
    return 52 if dtype.itemsize == 8 else 23


def _bias(dtype: torch.dtype) -> int:
    return 1023 if dtype.itemsize == 8 else 127


def _field(exponent: int, dtype: torch.dtype) -> int:
    """The bits of 2^exponent in f32 or f64."""
    return (exponent + _bias(dtype)) << _mantissa_bits(dtype)


def _exponent_field(values: Tensor) -> Tensor:
    """The bits of the power of two at or below |values|, as integers; 0 for subnormals and zeros."""
    import torch

    wide = values.dtype == torch.float64
    bits = values.view(torch.int64 if wide else torch.int32)
    return bits & (0x7FF << 52 if wide else 0xFF << 23)
