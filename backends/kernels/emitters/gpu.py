"""Rounds tensors on a GPU by Triton kernels, without waiting for the device."""

from __future__ import annotations

import hashlib
import linecache
from functools import cache, lru_cache
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from xdsl.dialects.builtin import f8E8M0FNU

from ....dialects.errors import MxloomError
from .._layout import Layout
from .triton_source import LARGEST_TILE, triton_source

if TYPE_CHECKING:
    from torch import Tensor

TILE = 4096
"""Values that a program takes: of 1024 to 8192 the fastest for most formats (H200)."""


@cache
def why_not() -> str | None:
    """Why no kernels can be made for GPUs here; None where they can."""
    return None if find_spec("triton") is not None else "triton is not installed"


def prepare(layout: Layout, dtype: Any) -> PreparedOnGPU | str:
    """What rounds tensors of a layout, or which part of it has no form in Triton."""
    try:
        return PreparedOnGPU(layout, dtype)
    except MxloomError as error:
        return str(error)


class PreparedOnGPU:
    """Rounds tensors of one shape and dtype (f32, bf16, f16) that lie on a GPU."""

    def __init__(self, layout: Layout, dtype: Any) -> None:
        """Raises MxloomError for a layout that has no form in Triton."""
        import torch

        self.layout = layout
        self._module = kernels(triton_source(layout))
        quotients = layout.function.scale not in (None, f8E8M0FNU)
        self._warps = 8 if quotients else 4  # division takes registers
        self._top = 0.0 if dtype == torch.float32 else torch.finfo(dtype).max

    def __call__(self, x: Tensor, out: Tensor | None) -> Tensor:
        """`x` rounded, into `out` where it is given; `out` may be `x`."""
        import torch

        tiling = self.layout.tiling
        source = (x if tiling is None else tiling.stream(x)).contiguous()
        at_hand = tiling is None and out is not None and out.is_contiguous()
        target = out if at_hand else torch.empty_like(source)
        assert target is not None
        if x.is_cuda and x.get_device() != torch.cuda.current_device():
            with torch.cuda.device(x.device):
                self._round(source, target)
        else:
            self._round(source, target)
        if at_hand:
            return target
        rounded = target if tiling is None else tiling.unstream(target).contiguous()
        return rounded if out is None else out.copy_(rounded)

    def _round(self, source: Tensor, target: Tensor) -> None:
        import torch

        layout, count, launch = self.layout, source.numel(), {"enable_fp_fusion": False, "num_warps": self._warps}
        seen = source
        if layout.kind == "whole" or layout.function.tensor_scale:
            seen = torch.zeros(2, dtype=torch.int32, device=source.device)
            self._module["measuring"][(-(-count // TILE),)](source, seen, count, TILE=TILE, **launch)
        kernel, launch = self._module["rounding"], {"TOP": self._top, **launch}
        if layout.kind in ("elements", "whole"):
            kernel[(-(-count // TILE),)](source, target, seen, count, TILE=TILE, **launch)
        elif layout.size > LARGEST_TILE:
            kernel[(count // layout.size,)](source, target, seen, layout.size, TILE=TILE, **launch)
        else:
            width = 1 << (layout.size - 1).bit_length()
            each, blocks = max(1, TILE // width), count // layout.size
            grid = (-(-blocks // each),)
            kernel[grid](source, target, seen, blocks, SIZE=layout.size, WIDTH=width, BLOCKS=each, **launch)


@lru_cache(maxsize=1024)
def kernels(source: str) -> dict[str, Any]:
    """The kernels of a module of Triton source, by name."""
    name = f"<mxloom kernel {hashlib.sha256(source.encode()).hexdigest()[:16]}>"
    linecache.cache[name] = (len(source), None, source.splitlines(keepends=True), name)  # where Triton reads it
    space: dict[str, Any] = {"__name__": "mxloom.backends.kernels.emitters.written"}
    exec(compile(source, name, "exec"), space)
    return space
