"""Statistics of rows as a native kernel: extremes by integers, sums in f64 in a stated order."""

from __future__ import annotations

from collections.abc import Sequence

from xdsl.dialects import llvm
from xdsl.dialects.builtin import (
    DenseArrayBase,
    DenseIntOrFPElementsAttr,
    FunctionType,
    ModuleOp,
    VectorType,
    f32,
    f64,
    i32,
    i64,
)
from xdsl.dialects.func import FuncOp, ReturnOp
from xdsl.ir import Block, Region, SSAValue

from ._builder import Builder
from .block_function import LARGEST
from .lowering import POINTER, Writer, finish, start

LANES = 16
"""Partial sums: the first takes the values 0, 16, 32 ..., the second 1, 17, 33 ..."""

_FINDS = ("smin", "smax", "umax")


def extremes_function() -> FuncOp:
    """`func @extremes(16 x f32) -> (16 x i32, twice)`: integers that order as values do; the bits of magnitudes."""
    kind, whole = VectorType(f32, [LANES]), VectorType(i32, [LANES])
    block = Block(arg_types=[kind])
    b = Builder(block, LANES)
    block.add_op(ReturnOp(b.ordered(b.bits(block.args[0])), b.magnitude_bits(block.args[0])))
    return FuncOp("extremes", FunctionType.from_lists([kind], [whole, whole]), Region(block))


def terms_function() -> FuncOp:
    """`func @terms(16 x f32) -> (16 x f64, three times)`: values, magnitudes, squares; exact.

    Infinities count as the largest finite f32.
    """
    kind, wide = VectorType(f32, [LANES]), VectorType(f64, [LANES])
    block = Block(arg_types=[kind])
    b = Builder(block, LANES)
    value = b.clamp(block.args[0], b.number(-LARGEST), b.number(LARGEST))
    number = b.wide(value)
    block.add_op(ReturnOp(number, b.wide(b.magnitude(value)), b.multiply(number, number)))
    return FuncOp("terms", FunctionType.from_lists([kind], [wide] * 3), Region(block))


def ordered_function() -> FuncOp:
    """`func @ordered(i32) -> f32`: the number that an ordered integer stands for."""
    block = Block(arg_types=[i32])
    b = Builder(block, 1)
    block.add_op(ReturnOp(b.float(b.ordered(block.args[0]))))
    return FuncOp("ordered", FunctionType.from_lists([i32], [f32]), Region(block))


def statistics_kernel() -> ModuleOp:
    """The arguments of all kernels; the target is the address of six addresses, each of one number for a row.

    They are the smallest value (f32), the largest (f32), the largest magnitude (f32), and in f64 the sums of values, of
    magnitudes and of squares. A row has `length` > 0 values, any number.
    """
    extremes, terms, ordered = extremes_function(), terms_function(), ordered_function()
    writer, (source, places, first, end, _, _, length) = start()
    kinds = (f32, f32, i32, f64, f64, f64)
    outputs = [writer.load(writer.at(places, writer.constant(i), POINTER), POINTER) for i in range(len(kinds))]
    values, sums = VectorType(f32, [LANES]), VectorType(f64, [LANES])
    filled, padded = writer.array(f32, LANES), writer.array(f32, LANES)
    none = writer.add(llvm.ConstantOp(DenseIntOrFPElementsAttr.from_list(sums, [0.0] * LANES), sums))
    empty = writer.add(llvm.ConstantOp(DenseIntOrFPElementsAttr.from_list(values, [0.0] * LANES), values))

    def taken(found: Sequence[SSAValue], of_extremes: SSAValue, of_terms: SSAValue) -> list[SSAValue]:
        key, bits = writer.inline(extremes, [of_extremes])
        pairs = zip(_FINDS, found[:3], (key, key, bits), strict=True)
        kept = [writer.intrinsic(f"llvm.{name}", [before, own], own.type) for name, before, own in pairs]
        own = writer.inline(terms, [of_terms])
        return kept + [writer.add(llvm.FAddOp(before, one)) for before, one in zip(found[3:], own, strict=True)]

    def row(index: SSAValue, nothing: Sequence[SSAValue]) -> Sequence[SSAValue]:
        begin = writer.add(llvm.MulOp(index, length))
        rest = writer.add(llvm.URemOp(length, writer.constant(LANES)))
        whole = writer.add(llvm.AddOp(begin, writer.add(llvm.SubOp(length, rest))))
        of_first = writer.spread(writer.load(writer.at(source, begin), f32), LANES)
        key, bits = writer.inline(extremes, [of_first])

        def piece(at: SSAValue, found: Sequence[SSAValue]) -> Sequence[SSAValue]:
            loaded = writer.load(writer.at(source, at), values)
            return taken(found, loaded, loaded)

        def last(_: SSAValue, found: Sequence[SSAValue]) -> Sequence[SSAValue]:
            writer.store(of_first, filled)
            writer.store(empty, padded)

            def copied(lane: SSAValue, nothing: Sequence[SSAValue]) -> Sequence[SSAValue]:
                value = writer.load(writer.at(source, writer.add(llvm.AddOp(whole, lane))), f32)
                for array in (filled, padded):
                    writer.store(value, writer.at(array, lane))
                return []

            writer.loop(writer.constant(0), rest, 1, [], copied)
            return taken(found, writer.load(filled, values), writer.load(padded, values))

        found = writer.loop(begin, whole, LANES, [key, key, bits, none, none, none], piece)
        found = writer.loop(
            writer.constant(0), writer.intrinsic("llvm.smin", [rest, writer.constant(1)], i64), 1, found, last
        )
        reduced = [
            writer.intrinsic(f"llvm.vector.reduce.{name}", [part], i32)
            for name, part in zip(_FINDS, found[:3], strict=True)
        ]
        results = [writer.inline(ordered, [key])[0] for key in reduced[:2]] + reduced[2:]
        results += [sum_of_halves(writer, part) for part in found[3:]]
        for result, place, kind in zip(results, outputs, kinds, strict=True):
            writer.store(result, writer.at(place, index, kind))
        return []

    writer.loop(first, end, 1, [], row)
    return finish(writer, writer.constant(0, i32))


def sum_of_halves(writer: Writer, vector: SSAValue) -> SSAValue:
    """The sum of the lanes (a power of two of them): the upper half onto the lower, until one is left."""
    assert isinstance(vector.type, VectorType)
    element, lanes = vector.type.element_type, vector.type.get_shape()[0]
    while lanes > 1:
        lanes //= 2
        kind = VectorType(element, [lanes])
        low, high = (_part(writer, vector, kind, begin) for begin in (0, lanes))
        vector = writer.add(llvm.FAddOp(low, high))
    return writer.add(llvm.BitcastOp(vector, element))


def _part(writer: Writer, vector: SSAValue, kind: VectorType, begin: int) -> SSAValue:
    """As many lanes from `begin` on as `kind` has."""
    mask = DenseArrayBase.from_list(i32, [*range(begin, begin + kind.get_shape()[0])])
    return writer.add(
        llvm.ShuffleVectorOp.create(operands=[vector, vector], result_types=[kind], properties={"mask": mask})
    )
