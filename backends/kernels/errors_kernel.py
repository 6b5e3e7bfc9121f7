"""The errors of candidate scales as a native kernel: a lane for each candidate, a block's values in their order."""

from __future__ import annotations

from collections.abc import Sequence

from xdsl.dialects import llvm
from xdsl.dialects.builtin import DenseIntOrFPElementsAttr, ModuleOp, VectorType, f32, f64, i64
from xdsl.dialects.func import FuncOp
from xdsl.ir import SSAValue

from .lowering import POINTER, finish, measured_row, start


def errors_kernel(
    measure: FuncOp, reductions: Sequence[str], scale: FuncOp, elements: FuncOp, error: FuncOp, lanes: int
) -> ModuleOp:
    """The arguments of all kernels, on rows of `length` values, a multiple of the lanes of `@measure`.

    The target is the address of three addresses: of the candidates (f64), of the weights (f32, one for each value of
    `source`), of the errors (f64, one for each row and candidate); `given` is the number of candidates, a multiple of
    `lanes`.
    """
    writer, (source, places, first, end, given, over, length) = start()
    candidates, weights, errors = (
        writer.load(writer.at(places, writer.constant(i), POINTER), POINTER) for i in range(3)
    )
    count = writer.add(llvm.ZExtOp(given, i64))
    wide = VectorType(f64, [lanes])
    none = writer.add(llvm.ConstantOp(DenseIntOrFPElementsAttr.from_list(wide, [0.0] * lanes), wide))

    def row(index: SSAValue, nothing: Sequence[SSAValue]) -> Sequence[SSAValue]:
        begin = writer.add(llvm.MulOp(index, length))
        behind = writer.add(llvm.AddOp(begin, length))
        measured = measured_row(writer, measure, reductions, source, begin, behind)
        own = writer.add(llvm.MulOp(index, count))

        def several(at: SSAValue, nothing: Sequence[SSAValue]) -> Sequence[SSAValue]:
            numbers = writer.load(writer.at(candidates, at, f64), wide)
            factors = writer.inline(scale, [*measured, over, numbers])

            def value(place: SSAValue, sums: Sequence[SSAValue]) -> Sequence[SSAValue]:
                one = writer.load(writer.at(source, place), f32)
                weight = writer.load(writer.at(weights, place), f32)
                (rounded,) = writer.inline(elements, [writer.spread(one, lanes), *factors])
                return writer.inline(error, [one, rounded, weight, sums[0]])

            (sums,) = writer.loop(begin, behind, 1, [none], value)
            writer.store(sums, writer.at(errors, writer.add(llvm.AddOp(own, at)), f64))
            return []

        writer.loop(writer.constant(0), count, lanes, [], several)
        return []

    writer.loop(first, end, 1, [], row)
    return finish(writer, writer.constant(0, given.type))
