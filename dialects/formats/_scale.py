"""Scale rules: from the values of a block to the scale it shares.

Power-of-two scales (OCP MX 1.0, sections 5.3 and 6.3) are computed exactly: exponents by frexp, never by log2, and
powers of two from bit fields, never by exp2 (which loses 2^-127) or by shifting a byte into an f32 exponent.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

from xdsl.dialects.builtin import Float32Type, ReducedPrecisionFloatType, bf16, f8E4M3FN, f8E5M2, f8E8M0FNU, f16, f32

from ._element import Element, Minifloat
from ._format import Rounding
from ._semantics import BF16, F16, F32

if TYPE_CHECKING:
    import torch
    from numpy import ndarray
    from torch import Tensor
    from xdsl.ir import Attribute

NEAREST = Rounding()
SCALE_TYPES = (f8E8M0FNU, f8E4M3FN, f8E5M2, bf16, f16, f32)
NAN_BYTE = 255


def scale_dtype(scale: Attribute) -> torch.dtype:
    """The torch dtype in which scales of a type are stored."""
    import torch

    return {
        f8E8M0FNU: torch.float8_e8m0fnu,
        f8E4M3FN: torch.float8_e4m3fn,
        f8E5M2: torch.float8_e5m2,
        bf16: torch.bfloat16,
        f16: torch.float16,
        f32: torch.float32,
    }[scale]


def power_of_two_bytes(largest: Tensor, element: Element, rule: str) -> Tensor:
    """The E8M0 bytes of blocks whose largest magnitudes are `largest` (f32 or f64), by the rule.

    With a = largest, floor: floor(log2 a) - emax. ceil: ceil(log2 a) - emax. even: floor(log2 of a rounded, half up, to
    the element's mantissa) - emax. rceil: the smallest e with a <= max * 2^e. The exponent is clamped to [-127, 127].
    A zero block has byte 0, NaN byte 255; infinity counts as 2^128 (rceil: 127).
    """
    import torch

    fraction, above = torch.frexp(largest.masked_fill(~largest.isfinite(), 1.0))
    exponent = above - 1
    match rule:
        case "ceil":
            exponent = exponent + (fraction > 0.5)
        case "even":
            exponent = exponent + (fraction >= 1 - 2.0 ** -(element.precision + 2))
        case "rceil":
            exponent = exponent + (fraction * 2 > element.largest * 2.0**-element.largest_exponent)
    exponent = (exponent - element.largest_exponent).clamp_(-127, 127)
    infinite = 127 if rule == "rceil" else 128 - element.largest_exponent
    codes = exponent.masked_fill_(largest.isinf(), min(infinite, 127)) + 127
    codes = codes.masked_fill_(largest == 0, 0).masked_fill_(largest.isnan(), NAN_BYTE)
    return codes.to(torch.uint8)


def powers_of_two(codes: Tensor, dtype: torch.dtype, *, inverse: bool = False) -> Tensor:
    """2^(byte - 127), or its exact inverse, of E8M0 bytes in f32 or f64; byte 255 is NaN."""
    import torch

    table = torch.from_numpy(_power_table(dtype == torch.float64, inverse)).to(codes.device)
    return table[codes.to(torch.int32)]


@cache
def _power_table(wide: bool, inverse: bool) -> ndarray:
    """The 256 powers of two, kept as numpy's: a tensor made while torch traces would not be a real one."""
    import numpy as np

    exponents = np.arange(-127, 128)
    exponents = -exponents if inverse else exponents
    if wide:
        return np.append(((exponents + 1023) << 52).view(np.float64), np.nan)
    bits = np.where(exponents == -127, 1 << 22, (exponents + 127) << 23)
    return np.append(bits.astype(np.int32).view(np.float32), np.float32(np.nan))


def finite(values: Tensor) -> Tensor:
    """Infinities as the largest finite number of the dtype; NaN stays."""
    import torch

    top = torch.finfo(values.dtype).max
    return values.clamp(-top, top)


def store_scale(quotient: Tensor, scale: Attribute) -> Tensor:
    """Float scales (f64 quotients, not negative) rounded to nearest even into their type, never 0 and never infinite.

    A quotient that rounds to 0 becomes the type's smallest positive value; a zero block has scale 1 where the scale is
    f32, bf16 or f16, and the smallest positive value where it is an 8-bit float.
    """
    import torch

    kind = minifloat_of_scale(scale)
    zero_scale = kind.smallest if kind.bits == 8 else 1.0
    if isinstance(scale, Float32Type):
        rounded = quotient.clamp(max=kind.largest).to(torch.float32)
    else:
        rounded = kind.round(quotient.clone(), NEAREST).to(torch.float32)
    rounded = rounded.clamp_(min=kind.smallest).masked_fill_(quotient == 0, zero_scale)
    return rounded.to(scale_dtype(scale))


def divided(values: Tensor, divisor: float) -> Tensor:
    """values / divisor, rounded correctly on every device: on GPUs torch multiplies by inverses of plain numbers."""
    return values / values.new_full((), divisor)


def tensor_scale(largest: Tensor, element: Element, scale: Attribute) -> Tensor:
    """The f32 scale over the block scales of a tensor: largest / (element's largest * scale's largest); NVFP4's gs."""
    import torch

    reach = element.largest * minifloat_of_scale(scale).largest
    return store_scale(divided(largest, reach).to(torch.float64), f32)


def minifloat_of_scale(scale: Attribute) -> Minifloat:
    """The numbers of a float scale's type."""
    if isinstance(scale, ReducedPrecisionFloatType):
        return Minifloat(scale.SEMANTICS)
    return Minifloat({bf16: BF16, f16: F16, f32: F32}[scale])
