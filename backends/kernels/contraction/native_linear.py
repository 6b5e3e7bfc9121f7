"""Linear layers on packed codes by native kernels: which datapath, which tile, and the call."""

from __future__ import annotations

import ctypes
from dataclasses import replace
from functools import cache, lru_cache
from typing import TYPE_CHECKING

from ....dialects.contractions import Bounds, Coded, fits_f64, segment_length
from .. import native
from .datapath import PANEL, Codes, Datapath, available
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
            partials=accumulator.partials.data,
            bias=bias is not None,
            scale_step=self.packed.scale_step,
        )

    def __call__(self, codes: Tensor, factors: Tensor, sums: Tensor | None, over: float | None) -> Tensor:
        """codes [M, S x length] in the datapath's type, factors [M, S] f32, sums [M, S] i32 -> [M, N] f32.

        `sums` are those of the codes in each segment, needed where weights carry an offset. `over` is the factor of
        the input as a whole, None where neither operand has one.
        """
        import torch

        n = self.numbers
        if n.offset:
            assert sums is not None
            sums = sums * -n.offset
        rows, width = codes.shape[0], self.panels * PANEL
        output = torch.empty((rows, width), dtype=torch.float32, device="cpu")
        scale = None if over is None else torch.tensor([over], dtype=torch.float32) * self.over
        held = {
            "weights": self.packed.codes,
            "weight_scales": self.packed.factors,
            "codes": codes,
            "code_scales": factors,
            "code_sums": sums,
            "output": output,
            "bias": self.bias,
            "over": scale,
        }
        given = {name: 0 if tensor is None else tensor.data_ptr() for name, tensor in held.items()}
        given["segments"] = self.packed.segments
        given["steps"] = self.packed.length // n.depth
        given["leading"] = width
        self._run(replace(n, over=scale is not None), given, rows, codes)
        return output if width == self.columns else output[:, : self.columns].contiguous()

    def _run(self, numbers: LinearNumbers, given: dict[str, int], rows: int, codes: Tensor) -> None:
        tall, wide = _tile(numbers, rows, given["segments"])
        threads = _threads(rows * self.size * self.columns)
        strides = {
            "weights": self.packed.codes.stride(0),
            "weight_scales": self.packed.factors.stride(0) * self.packed.factors.element_size(),
            "output": PANEL * 4,
            "bias": PANEL * 4,
        }
        steps = {
            "codes": codes.stride(0) * codes.element_size(),
            "code_scales": given["segments"] * 4,
            "code_sums": given["segments"] * 4,
            "output": given["leading"] * 4,
        }
        for row, count in _cut(rows, tall):
            for panel, panels in _cut(self.panels, wide):
                part = {
                    name: address + panel * strides.get(name, 0) + row * steps.get(name, 0)
                    for name, address in given.items()
                }
                own = replace(numbers, rows=min(count, tall), panels=min(panels, wide))
                _kernel(own)(dict(part, rows=count), panels // own.panels, threads)


class Kernel:
    """A native function `i32 (arguments, first, end)` on tiles of panels, shared among threads."""

    def __init__(self, numbers: LinearNumbers) -> None:
        identity = f"linear {numbers}"
        self._engine, self.from_cache = native.compiled(identity, lambda: linear_code(numbers), _task())
        self._function = _PROTOTYPE(self._engine.get_function_address("kernel"))
        self._task = self._engine.get_function_address("task") if _task() else 0

    def __call__(self, given: dict[str, int], tiles: int, threads: int) -> None:
        """Run on all tiles; `given` are the arguments by name."""
        arguments = (ctypes.c_int64 * len(FIELDS))(*[given[name] for name in FIELDS])
        address = ctypes.addressof(arguments)
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


def _tile(numbers: LinearNumbers, rows: int, segments: int) -> tuple[int, int]:
    """Rows and panels of a tile. One row alone reads weights from memory: few streams, or wide where scales are few."""
    if rows == 1 and numbers.datapath.lanes == PANEL:
        return 1, 8 if segments == 1 else 1
    tall, wide = numbers.datapath.tile
    return (tall + 1, wide) if segments == 1 and numbers.datapath.lanes == PANEL else (tall, wide)


def _threads(products: int) -> int:
    import torch

    return 1 if products < SERIAL_BELOW else torch.get_num_threads()


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
