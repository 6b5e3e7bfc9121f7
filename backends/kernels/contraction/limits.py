"""What a processor can at most: dot products that stay in registers, and bytes read from memory, by our own code."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING

from xdsl.dialects import llvm
from xdsl.dialects.builtin import DenseIntOrFPElementsAttr, ModuleOp, VectorType, i32, i64
from xdsl.ir import Block, Region

from .. import native
from ..lowering import POINTER, Writer

if TYPE_CHECKING:
    from torch import Tensor
    from xdsl.ir import SSAValue

    from .datapath import Datapath

SUMS = 12
"""Dot products in flight: more than latency times throughput of any processor at hand, fewer than its registers."""

STREAM = 8
"""Registers of 64 bytes read in one step."""


class Peak:
    """A loop of nothing but a datapath's dot products, all in registers."""

    def __init__(self, path: Datapath) -> None:
        import torch

        self.path = path
        self._engine, _ = native.compiled(f"peak {path} {SUMS}", lambda: peak_code(path))
        self._function = _PROTOTYPE(self._engine.get_function_address("kernel"))
        self.memory = torch.zeros(SUMS * 64 + 128, dtype=torch.uint8, device="cpu")

    def operations(self, rounds: int) -> int:
        """Multiplications and additions in so many rounds."""
        return 2 * rounds * SUMS * self.path.lanes * self.path.depth

    def __call__(self, rounds: int) -> None:
        """Run the loop so many times."""
        self._function(self.memory.data_ptr(), 0, rounds)


def peak_code(path: Datapath) -> ModuleOp:
    """`i32 kernel(memory, first, end)`: `SUMS` dot products for each index; factors lie before the sums in memory."""
    writer, (memory, first, end) = _start()
    weights, codes = (writer.load(writer.at(memory, writer.constant(place), i64), path.factors) for place in (0, 8))
    places = [writer.at(memory, writer.constant(16 + 8 * place), i64) for place in range(SUMS)]

    def body(index: SSAValue, sums: Sequence[SSAValue]) -> Sequence[SSAValue]:
        if path.accumulates:
            return [path.dot(writer, each, weights, codes) for each in sums]
        # A product of the same factors would move out of the loop: the sums themselves are factors.
        return [path.dot(writer, each, writer.bitcast(each, path.factors), codes) for each in sums]

    sums = writer.loop(first, end, 1, [writer.load(place, path.sums) for place in places], body)
    for place, value in zip(places, sums, strict=True):
        writer.store(value, place)
    return _finish(writer, writer.constant(0, i32))


class Read:
    """Reads memory from its beginning to its end, and keeps nothing of it."""

    def __init__(self) -> None:
        self._engine, _ = native.compiled(f"read {STREAM}", read_code)
        self._function = _PROTOTYPE(self._engine.get_function_address("kernel"))

    def __call__(self, memory: Tensor) -> int:
        """All words of a contiguous tensor, or-ed, so far as they fill steps of `STREAM` x 64 bytes."""
        return self._function(memory.data_ptr(), 0, memory.nbytes // (64 * STREAM))


def read_code() -> ModuleOp:
    """`i32 kernel(memory, first, end)`: all bits of the steps from `first` to `end`, or-ed."""
    writer, (memory, first, end) = _start()
    kind = VectorType(i32, [16])
    zero = writer.add(llvm.ConstantOp(DenseIntOrFPElementsAttr.from_list(kind, [0] * 16), kind))

    def body(index: SSAValue, seen: Sequence[SSAValue]) -> Sequence[SSAValue]:
        own = writer.at(memory, writer.add(llvm.MulOp(index, writer.constant(16 * STREAM))), i32)
        loaded = [writer.load(writer.at(own, writer.constant(16 * place), i32), kind) for place in range(STREAM)]
        return [writer.add(llvm.OrOp(before, value)) for before, value in zip(seen, loaded, strict=True)]

    seen = writer.loop(first, end, 1, [zero] * STREAM, body)
    total = seen[0]
    for other in seen[1:]:
        total = writer.add(llvm.OrOp(total, other))
    return _finish(writer, writer.intrinsic("llvm.vector.reduce.or", [total], i32))


@cache
def peak(path: Datapath) -> Peak:
    """The loop of a datapath, compiled once."""
    return Peak(path)


@cache
def read() -> Read:
    """The reader, compiled once."""
    return Read()


_PROTOTYPE = ctypes.CFUNCTYPE(ctypes.c_int32, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64)


def _start() -> tuple[Writer, Sequence[SSAValue]]:
    entry = Block(arg_types=(POINTER, i64, i64))
    return Writer(Region(entry), entry), entry.args


def _finish(writer: Writer, result: SSAValue) -> ModuleOp:
    writer.block.add_op(llvm.ReturnOp(result))
    kind = llvm.LLVMFunctionType((POINTER, i64, i64), i32)
    return ModuleOp([llvm.FuncOp("kernel", kind, linkage=llvm.LinkageAttr("external"), body=writer.region)])
