"""A tensor's rounding made ready: the kernel and its numbers, chosen once, then run on tensors of one shape."""

from __future__ import annotations

from functools import lru_cache
from math import inf
from struct import Struct
from typing import TYPE_CHECKING, Any

from ...dialects.formats._scale import minifloat_of_scale
from . import native
from ._layout import LANES, Layout
from .block_function import BlockFunction, block_function, element_function, magnitudes, scale_function
from .lowering import GROUP, groups_kernel, largest_kernel, pieces_kernel, rows_kernel

if TYPE_CHECKING:
    from torch import Tensor
    from xdsl.dialects.builtin import ModuleOp

SERIAL_BELOW = 1 << 17
"""Values under which no team of threads is woken: where other processes hold the cores, that can take milliseconds."""

INFINITY_BITS = 0x7F800000


class Prepared:
    """Rounds tensors of one shape and dtype (f32, bf16, f16) by a native kernel."""

    def __init__(self, layout: Layout, dtype: Any) -> None:
        import torch

        self.layout, self.dtype = layout, dtype
        numbers = layout.function
        self.in_place = layout.tiling is None and dtype == torch.float32
        make = {"blocks": _groups_kernel, "rows": _rows_kernel}.get(layout.kind, _pieces_kernel)
        self._kernel = make(numbers)
        self._length = layout.size + layout.padding

    def __call__(self, x: Tensor, out: Tensor | None) -> Tensor:
        """`x` rounded, into `out` where it is given; `out` may be `x`."""
        import torch

        if not (self.in_place and x.is_contiguous()):
            return self._in_order(x, out)
        at_hand = out is not None and out.dtype == torch.float32 and out.is_contiguous()
        target = out if at_hand else torch.empty(x.shape, dtype=torch.float32, device="cpu")
        assert target is not None
        self._round(x, target)
        return target if at_hand or out is None else out.copy_(target)

    def _in_order(self, x: Tensor, out: Tensor | None) -> Tensor:
        """Bring the values into the order of the blocks, in f32; round; bring them back."""
        import torch

        layout = self.layout
        source = x.float()
        source = (source if layout.tiling is None else layout.tiling.stream(source)).contiguous()
        if layout.padding:
            source = torch.nn.functional.pad(source.reshape(-1, layout.size), (0, layout.padding))
        target = torch.empty_like(source)
        self._round(source, target)
        if layout.padding:
            target = target[:, : layout.size]
        if layout.tiling is not None:
            target = layout.tiling.unstream(target.reshape(-1))
        if self.dtype != torch.float32:
            top = torch.finfo(self.dtype).max
            target = target.clamp_(-top, top).to(self.dtype)
        return target.contiguous() if out is None else out.copy_(target)

    def _round(self, source: Tensor, target: Tensor) -> None:
        count = source.numel()
        threads = team_size(count)
        if self.layout.kind not in ("blocks", "rows"):
            given = largest_bits(source, threads) if self.layout.kind == "whole" else 0
            _pieces(self._kernel, source, target, given, threads)
            return
        over = tensor_scale(source, self.layout.function, threads) if self.layout.function.tensor_scale else 1.0
        blocks = count // self._length
        threads = min(threads, blocks)
        self._kernel(source.data_ptr(), target.data_ptr(), blocks, over=over, length=self._length, threads=threads)


def tensor_scale(source: Tensor, numbers: BlockFunction, threads: int) -> float:
    """The scale over the block scales: from the largest magnitude, NaN left out, infinity the largest float.

    What `dialects/formats` computes on tensors of one number, in Python's floats, which take less time:
    product and quotient of two f32 are exact in f64 or far from where rounding twice would matter.
    """
    assert numbers.scale is not None
    bits = largest_bits(source, threads)
    if bits > INFINITY_BITS:
        bits = largest_bits(source.nan_to_num(nan=0.0, posinf=inf, neginf=-inf), threads)
    largest = _F32.unpack(_I32.pack(min(bits, INFINITY_BITS - 1)))[0]
    if numbers.clip is not None:
        largest = _f32(largest * _f32(numbers.clip))
    return _f32(largest / (numbers.element.largest * minifloat_of_scale(numbers.scale).largest)) or 1.0


_F32, _I32 = Struct("<f"), Struct("<i")


def _f32(value: float) -> float:
    """The nearest f32."""
    return _F32.unpack(_F32.pack(value))[0]


def largest_bits(x: Tensor, threads: int = 1) -> int:
    """The bits of the largest magnitude in a contiguous f32 tensor: those of infinity and then of NaN above all."""
    return _pieces(_largest_kernel(), x, None, 0, threads)


def _pieces(kernel: native.Kernel, source: Tensor, target: Tensor | None, given: int, threads: int) -> int:
    """Run a kernel that takes `LANES` values at once on any number of them: the rest in a piece filled with zeros."""
    import torch

    count = source.numel()
    whole, rest = divmod(count, LANES)
    written = 0 if target is None else target.data_ptr()
    seen = kernel(source.data_ptr(), written, whole, given=given, threads=min(threads, whole)) if whole else 0
    if rest:
        piece = torch.zeros(LANES, dtype=torch.float32, device="cpu")
        piece[:rest] = source.view(-1)[count - rest :]
        seen = max(seen, kernel(piece.data_ptr(), piece.data_ptr(), 1, given=given))
        if target is not None:
            target.view(-1)[count - rest :] = piece[:rest]
    return seen


def team_size(count: int) -> int:
    """The threads that work on so many values."""
    import torch

    return 1 if count < SERIAL_BELOW else torch.get_num_threads()


@lru_cache(maxsize=1024)
def _pieces_kernel(numbers: BlockFunction) -> native.Kernel:
    return native.Kernel(f"pieces {numbers}", lambda: pieces_kernel(block_function(numbers)))


@lru_cache(maxsize=1024)
def _groups_kernel(numbers: BlockFunction) -> native.Kernel:
    return native.Kernel(f"groups {numbers}", lambda: _groups(numbers))


def _groups(numbers: BlockFunction) -> ModuleOp:
    return groups_kernel(magnitudes(numbers.lanes), scale_function(numbers, GROUP), element_function(numbers))


@lru_cache(maxsize=1024)
def _rows_kernel(numbers: BlockFunction) -> native.Kernel:
    return native.Kernel(f"rows {numbers}", lambda: rows_kernel(block_function(numbers), magnitudes(numbers.lanes)))


@lru_cache(maxsize=1)
def _largest_kernel() -> native.Kernel:
    return native.Kernel(f"largest {LANES}", lambda: largest_kernel(magnitudes(LANES)))
