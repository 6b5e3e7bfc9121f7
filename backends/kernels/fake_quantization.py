"""Rounding of tensors by native kernels, and why it is not where torch's operations do the work."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache, lru_cache
from math import prod
from typing import TYPE_CHECKING, Any

from ...dialects import formats, torch_operators
from ...dialects.arguments import came
from ...dialects.errors import UsageError
from ...dialects.formats import MixedType, Rounding
from ...dialects.mx import parse_type
from ...dialects.numbers import laid_out
from ...dialects.torch_operators import operator
from . import native
from ._layout import layout_of
from ._mixed import PreparedMixed
from ._prepared import Prepared
from ._values import is_plain
from .emitters import gpu

if TYPE_CHECKING:
    from torch import Tensor
    from xdsl.ir import Attribute, TypeAttribute

    from ...dialects.instances import Instance

Kernel = Prepared | PreparedMixed | gpu.PreparedOnGPU
"""What rounds tensors of one shape and dtype, on the processor or on a GPU."""

_local = threading.local()


@contextmanager
def reference_only() -> Iterator[None]:
    """Within this block, and in this thread, every tensor is rounded by the definitions in `dialects/formats`."""
    before = getattr(_local, "reference", False)
    _local.reference = True
    try:
        yield
    finally:
        _local.reference = before


def switched_off() -> str | None:
    """Why no tensor at all is rounded by kernels here and now. Raises UsageError for a MXLOOM_KERNELS of no meaning."""
    if getattr(_local, "reference", False):
        return "only the reference is asked for"
    chosen = os.environ.get("MXLOOM_KERNELS")
    if not chosen:
        return None
    if chosen != "eager":
        raise UsageError(f'MXLOOM_KERNELS is {chosen!r:.60}: "eager" leaves kernels out; unset it to use them')
    return "MXLOOM_KERNELS is eager"


def why_not(
    fmt: Attribute, how: Rounding, dtype: Any, shape: tuple[int, ...] = (1, 1), device: str = "cpu"
) -> str | None:
    """Why such tensors are rounded into a format by torch's operations; None where a kernel does it."""
    found = switched_off() or prepare(fmt, how, shape, dtype, device)
    return found if isinstance(found, str) else None


@lru_cache(maxsize=4096)
def prepare(fmt: Attribute, how: Rounding, shape: tuple[int, ...], dtype: Any, device: str = "cpu") -> Kernel | str:
    """What rounds tensors of a shape and dtype on a kind of device (cpu, cuda), or why there is no kernel.

    Raises UsageError as rounding does.
    """
    import torch

    if isinstance(fmt, MixedType):
        return _prepare_mixed(fmt, how, shape, dtype, device)
    layout = layout_of(fmt, how, shape)
    if isinstance(layout, str):
        return layout
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"no kernel for {dtype}"
    if not prod(shape):
        return "there is nothing to round"
    if device == "cuda":
        return gpu.why_not() or gpu.prepare(layout, dtype)
    if device != "cpu":
        return f"no kernel for the device {device}"
    return native.why_not() or Prepared(layout, dtype)


def _prepare_mixed(fmt: MixedType, how: Rounding, shape: tuple[int, ...], dtype: Any, device: str) -> Kernel | str:
    if how.threshold is None:
        return "no threshold of block impact is given"
    if device != "cpu":
        return f"no kernel for mixed blocks on the device {device}"
    (low, low_how), (high, high_how) = fmt.roundings(how)
    parts = prepare(low, low_how, shape, dtype), prepare(high, high_how, shape, dtype)
    if isinstance(parts[0], Prepared) and isinstance(parts[1], Prepared):
        return PreparedMixed(fmt, how, parts[0], parts[1])
    return next(part for part in parts if isinstance(part, str))


@lru_cache(maxsize=4096)
def _prepare_text(
    fmt: str,
    scale_rule: str | None,
    rounding: str,
    clip: float | None,
    seed: int,
    threshold: float | None,
    exact: bool,
    shape: Any,
    dtype: Any,
    device: str,
) -> Kernel | str:
    how = Rounding(scale_rule, rounding, clip, seed, threshold, exact)
    return prepare(parse_type(fmt), how, tuple(shape), dtype, device)


@lru_cache(maxsize=4096, typed=True)
def _prepare_named(
    format: str,
    scale_rule: str | None,
    rounding: str,
    dim: int,
    clip: float | None,
    seed: int,
    shape: Any,
    dtype: Any,
    device: str,
) -> Kernel | str:
    import torch

    if not dtype.is_floating_point:
        return f"{dtype} holds no floats"
    how = Rounding(scale_rule, rounding, clip, seed)
    return prepare(laid_out(format, torch.empty(shape, device="meta"), dim), how, tuple(shape), dtype, device)


def quantize(
    input: Tensor,
    format: str,
    scale_rule: str | None = None,
    rounding: str = "rne",
    clip: float | None = None,
    seed: int = 0,
    threshold: float | None = None,
    exact: bool = False,
    sensitivity: Tensor | None = None,
) -> Tensor:
    """What `mxloom::quantize` does on CPUs and CUDA devices: the bits of `dialects.formats.quantize`, contiguous."""
    if switched_off() is None:
        kind = (input.shape, input.dtype, input.device.type)
        prepared = _prepare_text(format, scale_rule, rounding, clip, seed, threshold, exact, *kind)
        if isinstance(prepared, PreparedMixed):
            return prepared(input, None, sensitivity)
        if isinstance(prepared, Kernel):
            return prepared(input, None)
    return torch_operators.quantize(input, format, scale_rule, rounding, clip, seed, threshold, exact, sensitivity)


def fake_quantize(
    x: Tensor,
    format: str | TypeAttribute | Instance,
    *,
    scale_rule: str | None = None,
    rounding: str = "rne",
    dim: int = -1,
    clip: float | None = None,
    seed: int = 0,
    out: Tensor | None = None,
) -> Tensor:
    """`x` rounded to the values that `format` can hold, in its own dtype and shape, in `out` or in memory of its own.

    x: any float dtype and shape. format: a name (`mxloom.formats()` lists them), a type's text, a type, or one of
    `formats()`. scale_rule: floor, ceil, even or rceil for power-of-two scales (None: the format's default); rounding:
    rne, rna, rtz or stochastic (from `seed`); dim: the dimension along which blocks lie (formats without blocks, and
    those with one scale for the tensor, round alike along any); clip: the part of the largest magnitude that the scale
    is made for. out: a tensor of the shape, dtype and device of `x` that is written and returned; it may be `x`, and
    takes no part in gradients. Raises UsageError for an unknown name, an argument of a wrong kind, or an option without
    meaning for the format.

    Where `x` requires a gradient, so does the result: rounding passes it straight through, saturated values included.
    On a CPU, and on a GPU where Triton is installed, a kernel made for the format does the work (`why_not` says where
    it does not); the bits are the same.
    """
    import torch
    from torch.compiler import is_compiling

    if out is not None:
        _check_out(out, x)
    if is_compiling():  # one operator in the graph, and no look at addresses while it is traced
        rounded = operator("mxloom.quantize.default")(
            x, str(laid_out(format, x, dim)), scale_rule, rounding, clip, seed
        )
        return rounded if out is None else out.copy_(rounded)
    if isinstance(format, str) and is_plain(x, gpu=True) and switched_off() is None:
        prepared = None
        with suppress(TypeError):  # an argument of a wrong kind, for the checks below to name
            prepared = _prepare_named(format, scale_rule, rounding, dim, clip, seed, x.shape, x.dtype, x.device.type)
        if isinstance(prepared, Kernel) and (out is None or _takes(out, x)):
            return prepared(x, out)
    how = Rounding(scale_rule=scale_rule, rounding=rounding, clip=clip, seed=seed)
    fmt = laid_out(format, x, dim)
    if out is None and torch.is_grad_enabled() and x.requires_grad:
        return operator("mxloom.quantize.default")(x, str(fmt), scale_rule, rounding, clip, seed)
    return _round(x, fmt, how, out)


def _round(x: Tensor, fmt: Attribute, how: Rounding, out: Tensor | None) -> Tensor:
    import torch

    with torch.no_grad():
        if is_plain(x.detach(), gpu=True) and switched_off() is None:
            prepared = prepare(fmt, how, tuple(x.shape), x.dtype, x.device.type)
            if isinstance(prepared, Kernel):
                if out is None or _takes(out, x):
                    return prepared(x.detach(), out)
                return out.copy_(prepared(x.detach(), None))
        rounded = formats.quantize(x, fmt, how)
        return rounded if out is None else out.copy_(rounded)


def _check_out(out: Any, x: Tensor) -> None:
    import torch

    if not isinstance(x, torch.Tensor):
        raise UsageError(f"x is a torch tensor, got {came(x)}: make a tensor of it first")
    if not isinstance(out, torch.Tensor):
        raise UsageError(f"out is a torch tensor, got {came(out)}: leave it out for a new one")
    if (out.shape, out.dtype, out.device) != (x.shape, x.dtype, x.device):
        found, asked = (f"{t.dtype} {list(t.shape)} on {t.device}" for t in (out, x))
        raise UsageError(f"out is {found}, but x is {asked}: make it with torch.empty_like(x)")
    if _overlaps_itself(out):
        raise UsageError("elements of out share memory, as in an expanded tensor: make it with torch.empty_like(x)")
    if out.requires_grad:
        raise UsageError("out requires a gradient, which a tensor that is overwritten cannot have: use out.detach()")


def _overlaps_itself(out: Tensor) -> bool:
    """Whether two elements may lie in one place: a step is no longer than all that the shorter ones reach."""
    reach = 0
    for stride, size in sorted(zip(out.stride(), out.shape, strict=True)):
        if size > 1 and stride <= reach:
            return True
        reach += stride * (size - 1)
    return False


def _takes(out: Tensor, x: Tensor) -> bool:
    """Whether a kernel may write into `out`: plain memory, shared with `x` place for place or not at all."""
    if not is_plain(out, gpu=True):
        return False
    if x.untyped_storage().data_ptr() != out.untyped_storage().data_ptr():
        return True
    return x.data_ptr() == out.data_ptr() and x.stride() == out.stride()


@cache
def register() -> object:
    """Give `mxloom::quantize` its kernels on the CPU and on CUDA devices, once; returns what keeps them alive."""
    import torch

    torch_operators.register()
    library = torch.library.Library("mxloom", "IMPL")
    for device in ("CPU", "CUDA"):
        library.impl("quantize", torch_operators.untraced(quantize), device)
    return library
