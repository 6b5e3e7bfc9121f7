"""The functions through which everything else asks about formats: size, fit, rounding, encoding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from xdsl.dialects.builtin import IndexType, IntegerType, TensorType, f8E8M0FNU, f64
from xdsl.ir import Attribute, TypeAttribute
from xdsl.utils.exceptions import VerifyException

from ..arguments import came
from ..errors import MxloomError, UsageError
from ._builtin import WIDE_FLOATS, Counted, ScaleOnly, numbers_of
from ._encoded import Encoded
from ._format import GIVEN_PARTS, POWER_OF_TWO_RULES, Format, Given, Rounding

if TYPE_CHECKING:
    from torch import Tensor

_DEFAULT = Rounding()


def bits(fmt: Attribute) -> float:
    """Bits per element of a large tensor, scales, zero points and metadata included (a scale per `?` counts 0)."""
    return numbers_of(fmt).bits


def storage_bits(fmt: Attribute, shape: Sequence[int]) -> int:
    """Bits that a tensor of `shape` takes: codes, padding of ragged blocks, scales, zero points, tensor scale.

    Of a mixed format the most that it can take; `MixedType.storage_bits_at` counts for a number of high blocks.
    """
    return numbers_of(fmt).storage_bits(shape)


def verify_tensor(tensor_type: TensorType) -> None:
    """Raise VerifyException where the element type is a format that cannot lie on the tensor's shape."""
    element = tensor_type.element_type
    if isinstance(element, Format) and (reason := element.why_not(tensor_type.get_shape())):
        raise VerifyException(reason)
    if element == f8E8M0FNU:
        raise VerifyException(str(ScaleOnly(element).refusal))


def default_scale_rule(fmt: Attribute) -> str | None:
    """The scale rule of a cast that names none; None where the format has no scale."""
    return numbers_of(fmt).default_scale_rule


def refusal(fmt: Attribute) -> str | None:
    """Why no values are rounded into a type; None where it is a number format.

    Formats are the types of this dialect, narrow floats, and f32, bf16 and f16. Integers and index hold indices and
    masks, f8E8M0FNU holds scales, and f64 is wider than anything here computes.
    """
    if isinstance(fmt, Format):
        return None
    try:
        numbers = numbers_of(fmt)
    except MxloomError as error:
        return str(error)
    if isinstance(numbers, Counted):
        return str(numbers.refusal)
    return f"mxloom computes in f32 and keeps nothing in {fmt}: use f32" if fmt == f64 else None


def is_wide(fmt: Attribute) -> bool:
    """Whether values of the type are what torch has: f64, f32, f16, bf16, and builtin integers and index."""
    return fmt in WIDE_FLOATS or isinstance(fmt, IntegerType | IndexType)


def takes_scale_rule(fmt: Attribute) -> bool:
    """Whether the format has power-of-two scales, which alone are chosen by a rule."""
    return default_scale_rule(fmt) in POWER_OF_TWO_RULES


def quantize(x: Tensor, fmt: Attribute, how: Rounding = _DEFAULT) -> Tensor:
    """`x` (any float dtype) rounded to the values that the format can hold, in the dtype and shape of `x`.

    Computed in f32, or in f64 for f64 (and for elements that f32 would round twice). The result carries no gradient.
    The result shares no memory with `x`. Blocks with a NaN are NaN as a whole; infinities saturate, and a finite number
    becomes infinite only in f16, bf16 and f32; subnormals are kept unless the process runs with
    `torch.set_flush_denormal(True)`, under which values and scales below 2^-126 count as zero.
    """
    import torch

    with torch.no_grad():
        return numbers_of(fmt).quantize(_floats(x, fmt), how)


def encode_tensor(
    x: Tensor,
    fmt: TypeAttribute,
    how: Rounding = _DEFAULT,
    *,
    symmetric: bool = False,
    **given: Tensor | None,
) -> Encoded:
    """`x` as codes and scales.

    Given parts (`Given`: scales, global_scale, zero_points; of a mixed format also choice, high_scales,
    high_global_scale, high_zero_points) are kept bit for bit. Integers then use their full two's complement range, or,
    if `symmetric`, the range without its most negative number that they have where no scales are given.
    """
    import torch

    if unknown := sorted(given.keys() - set(GIVEN_PARTS)):
        raise UsageError(f"{unknown[0]} is no part of an encoded tensor; these are: {', '.join(GIVEN_PARTS)}")
    with torch.no_grad():
        parts = numbers_of(fmt).encode(_floats(x, fmt), how, Given(**given, symmetric=symmetric))
        return Encoded.of(fmt, parts)


def _floats(x: Tensor, fmt: Attribute) -> Tensor:
    import torch

    if not isinstance(x, torch.Tensor):
        raise UsageError(f"x is a torch tensor, got {came(x)}: make a tensor of it first")
    if x.is_nested or x.layout != torch.strided:
        raise UsageError(f"x is a plain, dense tensor, got {_kind(x)}: convert it first")
    if x.is_meta:
        raise UsageError("x lies on the meta device and has no values to round")
    if not x.is_floating_point() or x.dtype in (torch.float8_e8m0fnu, torch.float4_e2m1fn_x2):
        raise UsageError(f"only float tensors are rounded into {fmt}, got {x.dtype}: convert it first")
    return x.detach().clone() if x._is_zerotensor() else x.detach()  # lazy zeros refuse to be worked on in place


def _kind(x: Tensor) -> str:
    return "a nested one" if x.is_nested else f"one of {x.layout}"
