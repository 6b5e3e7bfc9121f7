"""Rounds tensors by the block function in torch operations: no compiler, any device, the bits of the other kernels."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any

from ....dialects.errors import MxloomError
from .._layout import Layout
from ..block_function import block_function, magnitudes
from .tensor_scale import magnitudes_without_nan, tensor_scale_function
from .torch_source import torch_function

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from ..block_function import BlockFunction


class EagerRounding:
    """Rounds tensors of one shape and dtype (f32, bf16, f16) wherever they lie."""

    def __init__(self, layout: Layout, dtype: Any) -> None:
        """Raises MxloomError for a layout that has no form in torch."""
        if layout.kind not in ("elements", "blocks", "rows", "whole"):
            raise MxloomError(f"tensors of the layout {layout.kind} have no kernel in torch")
        self.layout, self.dtype = layout, dtype
        self._round = _rounding(layout.function)

    def __call__(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """`x` rounded, into `out` where it is given; `out` may be `x`."""
        import torch

        layout, values = self.layout, x.float()
        values = values if layout.tiling is None else layout.tiling.stream(values)
        values = values if layout.kind == "elements" else values.reshape(-1, layout.size)
        largest, over = self._scales(values)
        rounded = self._round(values, largest, over)
        rounded = rounded.reshape(x.shape) if layout.tiling is None else layout.tiling.unstream(rounded.reshape(-1))
        if self.dtype != torch.float32:
            top = torch.finfo(self.dtype).max
            rounded = rounded.clamp(-top, top).to(self.dtype)
        return rounded.contiguous() if out is None else out.copy_(rounded)

    def _scales(self, values: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """The bits of the blocks' largest magnitudes, and the scale of the tensor."""
        numbers = self.layout.function
        if numbers.scale is None:
            return None, None
        over = None
        if numbers.tensor_scale:
            over = _tensor_scale(numbers)(_magnitudes_without_nan()(values).max())
        return _magnitudes()(values).amax(-1, keepdim=True), over


@lru_cache(maxsize=1024)
def _rounding(numbers: BlockFunction) -> Callable[..., Tensor]:
    return torch_function(block_function(numbers), ["values", "largest", "over"])


@lru_cache(maxsize=1024)
def _tensor_scale(numbers: BlockFunction) -> Callable[..., Tensor]:
    return torch_function(tensor_scale_function(numbers), ["largest"])


@lru_cache(maxsize=1)
def _magnitudes() -> Callable[..., Tensor]:
    return torch_function(magnitudes(1), ["values"])


@lru_cache(maxsize=1)
def _magnitudes_without_nan() -> Callable[..., Tensor]:
    return torch_function(magnitudes_without_nan(1), ["values"])
