"""Rounds tensors by the block function in torch operations: no compiler, any device, the bits of the other kernels."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any

from .._layout import Layout
from .parts import parts, refuse
from .torch_source import torch_function

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from ..block_function import BlockFunction


class EagerRounding:
    """Rounds tensors of one shape and dtype (f32, bf16, f16) wherever they lie."""

    def __init__(self, layout: Layout, dtype: Any) -> None:
        """Raises MxloomError for a layout that has no form in torch."""
        refuse(layout, "torch")
        self.layout, self.dtype = layout, dtype

    def __call__(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """`x` rounded, into `out` where it is given; `out` may be `x`."""
        import torch

        layout, values = self.layout, x.float()
        values = values if layout.tiling is None else layout.tiling.stream(values)
        if layout.kind == "elements":
            rounded = _function(layout.function, "q")(values, None, None)
        else:
            rounded = self._blocks(values.reshape(-1, layout.size))
        rounded = rounded.reshape(x.shape) if layout.tiling is None else layout.tiling.unstream(rounded.reshape(-1))
        if self.dtype != torch.float32:
            top = torch.finfo(self.dtype).max
            rounded = rounded.clamp(-top, top).to(self.dtype)
        return rounded.contiguous() if out is None else out.copy_(rounded)

    def _blocks(self, values: Tensor) -> Tensor:
        """A block in each row, rounded."""
        numbers = self.layout.function
        over = None
        if numbers.tensor_scale:
            over = _function(numbers, "tensor_scale")(_function(numbers, "magnitudes_without_nan")(values).max())
        measured = _function(numbers, "measure")(values)
        measured = measured if isinstance(measured, tuple) else (measured,)
        reduced = [
            keys.amin(-1, keepdim=True) if reduction == "smin" else keys.amax(-1, keepdim=True)
            for keys, reduction in zip(measured, numbers.reductions, strict=True)
        ]
        return _function(numbers, "elements")(values, *_function(numbers, "scale")(*reduced, over))


@lru_cache(maxsize=4096)
def _function(numbers: BlockFunction, name: str) -> Callable[..., Any]:
    return torch_function(*parts(numbers)[name])
