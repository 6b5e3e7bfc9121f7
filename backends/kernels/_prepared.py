"""A tensor's rounding made ready: the kernel and its numbers, chosen once, then run on tensors of one shape."""

from __future__ import annotations

from ctypes import addressof, c_void_p
from functools import lru_cache
from math import inf
from struct import Struct
from typing import TYPE_CHECKING, Any

from ...dialects.formats._scale import minifloat_of_scale
from . import native
from ._layout import LANES, Layout
from ._team import team_size
from ._whole_scales import mean_scales, range_scale, whole_mean_scale
from .block_function import (
    LARGEST,
    BlockFunction,
    block_function,
    bounds_function,
    element_function,
    largest_safe_scale,
    magnitudes,
    measure_function,
    scale_function,
)
from .group_kernel import groups_kernel
from .lowering import GROUP, Bound, given_rows_kernel, largest_kernel, pieces_kernel, rows_kernel

if TYPE_CHECKING:
    from torch import Tensor
    from xdsl.dialects.builtin import ModuleOp
    from xdsl.dialects.func import FuncOp

INFINITY_BITS = 0x7F800000


STREAMED_FROM = 1 << 23
"""Values from which on results are written past the caches (32 MiB)."""

SHORT_ROW = 512
"""Rows up to so many values have their scales computed eight at a time: what is read twice stays in the first cache."""


class Prepared:
    """Rounds tensors of one shape and dtype (f32, bf16, f16) by a native kernel."""

    def __init__(self, layout: Layout, dtype: Any) -> None:
        import torch

        self.layout, self.dtype = layout, dtype
        self.in_place = layout.tiling is None and dtype == torch.float32
        self._length = layout.size + layout.padding
        self._kind = kernel_kind(layout)
        self._kernel = _kernel(self._kind, layout.function)
        # Rows of several registers' worth, read twice, were slower when written past the caches.
        whole_lines = self._kind in ("blocks", "pieces") and layout.function.lanes % 16 == 0
        self._may_stream = whole_lines and native.can_stream()

    def __call__(self, x: Tensor, out: Tensor | None) -> Tensor:
        """`x` rounded, into `out` where it is given; `out` may be `x`."""
        import torch

        if not (self.in_place and x.is_contiguous()):
            return self._in_order(x, out)
        if self.layout.function.noisy:
            target = self._noise().view(x.shape)
            self._round(x, target)
            return target if out is None else out.copy_(target)
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
        source = self._padded(source)
        target = self._padded(self._noise()) if layout.function.noisy else torch.empty_like(source)
        self._round(source, target)
        if layout.padding:
            target = target[:, : layout.size]
        target = target.reshape(x.shape) if layout.tiling is None else layout.tiling.unstream(target.reshape(-1))
        if self.dtype != torch.float32:
            top = torch.finfo(self.dtype).max
            target = target.clamp_(-top, top).to(self.dtype)
        return target.contiguous() if out is None else out.copy_(target)

    def _padded(self, stream: Tensor) -> Tensor:
        import torch

        layout = self.layout
        if not layout.padding:
            return stream
        return torch.nn.functional.pad(stream.reshape(-1, layout.size), (0, layout.padding))

    def _noise(self) -> Tensor:
        """The noise of the definition, drawn as it draws it, in the order of the blocks."""
        import torch

        layout = self.layout
        generator = torch.Generator().manual_seed(layout.seed)
        noise = torch.rand(layout.split, generator=generator, dtype=torch.float32, device="cpu")
        return noise if layout.tiling is None else layout.tiling.stream_of_split(noise)

    def _round(self, source: Tensor, target: Tensor) -> None:
        count = source.numel()
        threads = team_size(count)
        layout, numbers = self.layout, self.layout.function
        if layout.kind not in ("blocks", "rows", "means"):
            given, over = self._of_whole(source, threads)
            _pieces(self._kernel_for(target), source, target, given, threads, over)
            return
        blocks = count // self._length
        places = None
        over, written = 1.0, target.data_ptr()
        if layout.kind == "means":
            scales = mean_scales(source, layout)
            places = (c_void_p * 2)(written, scales.data_ptr())
            written = addressof(places)
        elif numbers.tensor_scale:
            over = tensor_scale(source, numbers, threads)
        threads = min(threads, blocks)
        self._kernel_for(target)(source.data_ptr(), written, blocks, over=over, length=self._length, threads=threads)

    def _kernel_for(self, target: Tensor) -> native.Kernel:
        """The kernel that writes past the caches where they would not hold the result."""
        count = target.numel()
        streamed = self._may_stream and count >= STREAMED_FROM and not count % LANES and not target.data_ptr() % 64
        return _kernel(self._kind, self.layout.function, streamed=True) if streamed else self._kernel

    def _of_whole(self, source: Tensor, threads: int) -> tuple[int, float]:
        """What `@q` takes beside values: bits of the largest magnitude or of the zero point; a scale."""
        layout, numbers = self.layout, self.layout.function
        if layout.kind == "elements":
            return 0, 1.0
        if numbers.zero_points:
            scale, zero = range_scale(source, numbers)
            return _I32.unpack(_F32.pack(zero))[0], scale
        if numbers.rule == "absmean":
            return 0, whole_mean_scale(source, layout)
        return largest_bits(source, threads), 1.0


def tensor_scale(source: Tensor, numbers: BlockFunction, threads: int) -> float:
    """The scale over the block scales: from the largest magnitude, NaN left out, infinity the largest float.

    What `dialects/formats` computes on tensors of one number, in Python's floats, which take less time:
    product and quotient of two f32 are exact in f64 or far from where rounding twice would matter.
    """
    bits = largest_bits(source, threads)
    if bits > INFINITY_BITS:
        bits = largest_bits(source.nan_to_num(nan=0.0, posinf=inf, neginf=-inf), threads)
    largest = _F32.unpack(_I32.pack(min(bits, INFINITY_BITS - 1)))[0]
    if numbers.clip is not None:
        largest = _f32(largest * _f32(numbers.clip))
    return _f32(min(largest / _reach(numbers), LARGEST)) or 1.0


@lru_cache(maxsize=1024)
def _reach(numbers: BlockFunction) -> float:
    """The largest magnitude under a tensor scale of 1."""
    assert numbers.scale is not None
    return numbers.element.largest * minifloat_of_scale(numbers.scale).largest


_F32, _I32 = Struct("<f"), Struct("<i")


def _f32(value: float) -> float:
    """The nearest f32."""
    return _F32.unpack(_F32.pack(value))[0]


def largest_bits(x: Tensor, threads: int = 1) -> int:
    """The bits of the largest magnitude in a contiguous f32 tensor: those of infinity and then of NaN above all."""
    return _pieces(_largest_kernel(), x, None, 0, threads)


def _pieces(
    kernel: native.Kernel, source: Tensor, target: Tensor | None, given: int, threads: int, over: float = 1.0
) -> int:
    """Run a kernel that takes `LANES` values at once on any number of them: the rest in a piece filled with zeros."""
    import torch

    count = source.numel()
    whole, rest = divmod(count, LANES)
    written = 0 if target is None else target.data_ptr()
    seen = 0
    if whole:
        seen = kernel(source.data_ptr(), written, whole, given=given, over=over, threads=min(threads, whole))
    if rest:
        piece, result = torch.zeros(2, LANES, dtype=torch.float32, device="cpu")
        piece[:rest] = source.view(-1)[count - rest :]
        if target is not None:  # noise may lie there
            result[:rest] = target.view(-1)[count - rest :]
        seen = max(seen, kernel(piece.data_ptr(), result.data_ptr(), 1, given=given, over=over))
        if target is not None:
            target.view(-1)[count - rest :] = result[:rest]
    return seen


@lru_cache(maxsize=1024)
def _kernel(kind: str, numbers: BlockFunction, *, streamed: bool = False) -> native.Kernel:
    return native.Kernel(f"{kind} {streamed} {numbers}", lambda: kernel_module(kind, numbers, streamed=streamed))


def kernel_kind(layout: Layout) -> str:
    """Which of the kernels of `kernel_module` rounds a layout."""
    short = layout.kind == "rows" and layout.size + layout.padding <= SHORT_ROW
    return "short rows" if short else layout.kind if layout.kind in ("blocks", "rows", "means") else "pieces"


def kernel_module(kind: str, numbers: BlockFunction, *, streamed: bool = False) -> ModuleOp:
    """The code of a kernel, in the llvm dialect."""
    match kind:
        case "blocks":
            short = numbers.lanes in (8, 16)
            together = 8 if short and numbers.tensor_scale else 4 if short else 1
            return groups_kernel(*_parts(numbers, GROUP), together=together, streamed=streamed)
        case "short rows":
            return groups_kernel(*_parts(numbers, GROUP), rows=True, streamed=streamed)
        case "rows":
            return rows_kernel(*_parts(numbers, None), streamed=streamed)
        case "means":
            return given_rows_kernel(block_function(numbers))
    return pieces_kernel(block_function(numbers), streamed=streamed)


def _parts(numbers: BlockFunction, blocks: int | None) -> tuple[FuncOp, tuple[str, ...], FuncOp, FuncOp, Bound]:
    """The functions that a kernel for blocks is made of, and how results of the first are brought together."""
    measure, scale = measure_function(numbers), scale_function(numbers, blocks)
    bound = Bound(bounds_function(numbers.lanes), largest_safe_scale(numbers))
    return measure, numbers.reductions, scale, element_function(numbers, bounded=False), bound


@lru_cache(maxsize=1)
def _largest_kernel() -> native.Kernel:
    return native.Kernel(f"largest {LANES}", lambda: largest_kernel(magnitudes(LANES)))
