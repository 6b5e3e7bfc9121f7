"""Linear layers on packed codes by native kernels: which datapath, which tile, and the call."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from typing import TYPE_CHECKING

from ....dialects.contractions import Bounds, Coded, fits_f64, segment_length
from .. import native
from .datapath import CODE_BYTES, PANEL, Codes, Datapath, available
from .linear_code import FIELDS, LinearNumbers, linear_code
from .packing import Packed, code_form, pack

if TYPE_CHECKING:
    from torch import Tensor

    from ....dialects.accumulator import AccumulatorAttr

SERIAL_BELOW = 1 << 20
"""Multiply-accumulates below which one thread does the work."""


class PackedLinear:
    """input [..., K] as codes times packed weights [N, K], as `dialects.contractions.linear` defines it."""

    def __init__(
        self,
        weight: Coded,
        bias: Tensor | None,
        accumulator: AccumulatorAttr,
        path: Datapath,
        input_length: int | None,
    ) -> None:
        """`input_length` is that of the segments in which the input keeps one factor; None is all of K."""
        import torch

        self.path, self.size = path, weight.size
        self.length = segment_length(input_length, weight.length, weight.size)
        self.packed: Packed = pack(weight, path, code_form(weight, path, self.length), self.length)
        self.over = 1.0 if weight.over is None else float(weight.over)
        self.columns = self.packed.columns
        self.panels = self.packed.codes.shape[0]
        self.bias: Tensor | None = None
        if bias is not None:
            self.bias = torch.nn.functional.pad(bias.detach().float(), (0, self.panels * PANEL - self.columns))
        self._plans: dict[tuple[int, bool, int], list[Part]] = {}
        form = self.packed.form
        self.numbers = LinearNumbers(
            path,
            form.bits,
            form.table,
            form.offset,
            self.packed.scales,
            rows=1,
            panels=1,
            mantissa=accumulator.mantissa.data,
            rounding=accumulator.rounding.data,
            partials=max(1, min(accumulator.partials.data, -(-self.size // self.length))),  # the others stay empty
            bias=bias is not None,
            scale_step=self.packed.scale_step,
        )

    def __call__(self, codes: Tensor, factors: Tensor, sums: Tensor | None, over: float | None) -> Tensor:
        """codes [M, S x length] in the datapath's type, factors [M, S] f32, sums [M, S] i32 -> [M, N] f32.

        All contiguous. `sums` are those of the codes in each segment, read where weights carry an offset. `over` is
        the factor of the input as a whole, None where neither operand has one.
        """
        import torch

        rows, width = codes.shape[0], self.panels * PANEL
        output = torch.empty((rows, width), dtype=torch.float32, device="cpu")
        product, scale = None, 0
        if over is not None:
            product = ctypes.c_float(ctypes.c_float(over).value * self.over)  # exact in f64, then rounded to f32
            scale = ctypes.addressof(product)
        sums_at = 0 if sums is None else sums.data_ptr()
        codes_at, factors_at, output_at = codes.data_ptr(), factors.data_ptr(), output.data_ptr()
        key = rows, over is not None, torch.get_num_threads()
        for part in self._plans.get(key) or self._planned(*key):
            part(codes_at, factors_at, sums_at, output_at, scale)
        return output if width == self.columns else output[:, : self.columns].contiguous()

    def _planned(self, rows: int, over: bool, threads: int) -> list[Part]:
        """The kernel calls for so many rows, kept for the next time."""
        numbers, packed = replace(self.numbers, over=over), self.packed
        tall, wide = _tile(self.path, rows, packed.segments)
        depth, width = self.numbers.depth, self.panels * PANEL
        row_codes = packed.segments * packed.length * CODE_BYTES[self.path.codes]
        share = threads if rows * self.size * self.columns >= SERIAL_BELOW else 1
        parts: list[Part] = []
        for row, count, height in _rows(rows, tall):
            for panel, panels in _cut(self.panels, wide):
                own = replace(numbers, rows=height, panels=min(panels, wide))
                own = replace(own, ahead=AHEAD if rows <= FEW_ROWS else 0, chains=_chains(own))
                bias = 0 if self.bias is None else self.bias.data_ptr() + panel * PANEL * 4
                parts.append(
                    Part(
                        _kernel(own),
                        panels // own.panels,
                        share,
                        packed.codes.data_ptr() + panel * packed.codes.stride(0),
                        packed.factors.data_ptr() + panel * packed.factors.stride(0) * packed.factors.element_size(),
                        bias,
                        (packed.segments, packed.length // depth, count, width),
                        (row * row_codes, row * packed.segments * 4, (row * width + panel * PANEL) * 4),
                    )
                )
        if len(self._plans) >= _MOST_PLANS:
            self._plans.clear()
        self._plans[rows, over, threads] = parts
        return parts


@dataclass(frozen=True)
class Part:
    """One kernel call: a share of rows and panels. Addresses of weights, counts, and where the rest begins in bytes."""

    kernel: Kernel
    tiles: int
    threads: int
    weights: int
    weight_scales: int
    bias: int
    counts: tuple[int, int, int, int]
    starts: tuple[int, int, int]

    def __call__(self, codes: int, factors: int, sums: int, output: int, over: int) -> None:
        """Run on these addresses."""
        codes_start, row_start, output_start = self.starts
        given = _Arguments(
            self.weights,
            self.weight_scales,
            codes + codes_start,
            factors + row_start,
            sums + row_start,
            output + output_start,
            self.bias,
            over,
            *self.counts,
        )
        self.kernel(ctypes.addressof(given), self.tiles, self.threads)


_Arguments = ctypes.c_int64 * len(FIELDS)
_MOST_PLANS = 256


class Kernel:
    """A native function `i32 (arguments, first, end)` on tiles of panels, shared among threads."""

    def __init__(self, numbers: LinearNumbers) -> None:
        identity = f"linear {numbers}"
        self._engine, self.from_cache = native.compiled(identity, lambda: linear_code(numbers), _task())
        self._function = _PROTOTYPE(self._engine.get_function_address("kernel"))
        self._task = self._engine.get_function_address("task") if _task() else 0

    def __call__(self, address: int, tiles: int, threads: int) -> None:
        """Run on all tiles; the arguments lie at `address`."""
        threads = min(threads, tiles)
        if threads <= 1 or not self._task:
            self._function(address, 0, tiles)
            return
        shared = (ctypes.c_int64 * 2)(address, tiles)
        native.team()(self._task, ctypes.addressof(shared), threads, 0)


_PROTOTYPE = ctypes.CFUNCTYPE(ctypes.c_int32, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64)

TASK = """
declare i32 @omp_get_thread_num()
declare i32 @omp_get_num_threads()

define void @task(ptr %shared) {
  %arguments = load ptr, ptr %shared
  %second = getelementptr i64, ptr %shared, i64 1
  %tiles = load i64, ptr %second
  %thread = call i32 @omp_get_thread_num()
  %threads = call i32 @omp_get_num_threads()
  %own = zext i32 %thread to i64
  %count = zext i32 %threads to i64
  %next = add i64 %own, 1
  %before = mul i64 %tiles, %own
  %behind = mul i64 %tiles, %next
  %first = udiv i64 %before, %count
  %end = udiv i64 %behind, %count
  %done = call i32 @kernel(ptr %arguments, i64 %first, i64 %end)
  ret void
}
"""
"""What a thread of torch's OpenMP team runs: the kernel on its share of the tiles."""


def _task() -> str:
    return TASK if native.team() else ""


@lru_cache(maxsize=4096)
def _kernel(numbers: LinearNumbers) -> Kernel:
    return Kernel(numbers)


def _cut(count: int, step: int) -> list[tuple[int, int]]:
    """Whole tiles of `step`, then what is left: (first, how many)."""
    whole = count - count % step
    return [(first, size) for first, size in ((0, whole), (whole, count - whole)) if size]


def _rows(count: int, tall: int) -> list[tuple[int, int, int]]:
    """Rows in the fewest tiles, as even as can be: (first, how many, rows of a tile)."""
    tiles = -(-count // tall)
    low, higher = divmod(count, tiles)
    parts = ((0, higher * (low + 1), low + 1), (higher * (low + 1), (tiles - higher) * low, low))
    return [part for part in parts if part[1]]


AHEAD = 8192
"""Bytes of weights fetched before they are read, as measured."""

FEW_ROWS = 32
"""Rows up to which a layer waits for its weights from memory more than it computes."""


def _tile(path: Datapath, rows: int, segments: int) -> tuple[int, int]:
    """Rows and panels of a tile: few rows read one stream of weights, one segment has nothing to scale in between."""
    if path.bits < 512:
        return path.tile
    if rows <= 16:
        return min(rows, 8), 1
    return (6, 3) if segments == 1 and path.is_integer else path.tile


def _chains(numbers: LinearNumbers) -> int:
    """Sums side by side in few rows, so that a dot product does not wait for the one before."""
    sums = numbers.rows * numbers.panels * numbers.datapath.parts * numbers.planes
    return numbers.planes if sums <= numbers.datapath.bits // 32 else 1


@cache
def datapath(codes: Codes) -> Datapath | None:
    """The datapath of the processor at hand for codes of a type."""
    return None if native.why_not() else available(native.features(), codes)


def codes_for(input: Bounds, weight: Bounds, length: int, *, whole: bool) -> Codes | None:
    """The narrowest type of codes in which segments of products are summed exactly; None where none does.

    `whole` says that a segment is all of K, and may be filled up.
    """
    if input.step >= 1 and weight.step >= 1 and input.largest * weight.largest * length < 1 << 31:
        if max(input.largest, weight.largest) <= 128 and (whole or length % 4 == 0):
            return "i8"
        if max(input.largest, weight.largest) < 1 << 15 and (whole or length % 2 == 0):
            return "i16"
    return "f64" if fits_f64(input, weight, length) else None
