"""From `@code_scale` and `@codes` to native functions: f32 to codes, one factor and one sum for every block.

Both kernels have the arguments of all kernels. Their target is the address of six addresses: of the codes, of the
factors (f32) and of the sums (i32), and of what the values are multiplied with before they are rounded. They yield 1
where `@code_scale` says of a block that it may not be exact, else 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from xdsl.dialects import llvm
from xdsl.dialects.builtin import Float64Type, IntegerType, ModuleOp, VectorType, f32, f64, i32
from xdsl.dialects.func import FuncOp
from xdsl.ir import SSAValue

from .lowering import GROUP, POINTER, Writer, finish, largest_of, start, vector_of, zeros

Factors = tuple[Literal["row", "column", "value"], ...]
"""What values are multiplied with, each product rounded to f32: a number for each row, for each column, for each
value."""


def code_groups_kernel(magnitudes: FuncOp, scale: FuncOp, codes: FuncOp, bits: int, factors: Factors = ()) -> ModuleOp:
    """Blocks that registers hold, the scales of eight at a time; codes have `bits` bits.

    `length` is how many blocks a row has, read where `factors` ask for rows and columns.
    """
    values = vector_of(codes)
    lanes = values.get_shape()[0]
    writer, (source, target, first, end, _, over, length) = start()
    out = _Outputs(writer, target, f64 if bits == 64 else IntegerType(bits))
    given = _Inputs(writer, source, target, factors)
    tops, scales, divisors = (writer.array(kind, GROUP) for kind in (i32, f32, f32))

    def values_of(block: SSAValue) -> SSAValue:
        offset = writer.add(llvm.MulOp(block, writer.constant(lanes)))
        if not given.by_place:
            return given.load(offset, values)
        row = writer.add(llvm.UDivOp(block, length))
        begin = writer.add(llvm.MulOp(writer.add(llvm.MulOp(row, length)), writer.constant(lanes)))
        return given.load(offset, values, row, writer.add(llvm.SubOp(offset, begin)))

    def measure_group(index: SSAValue) -> SSAValue:
        """Measure the blocks from `index` on, where there are any; how many."""
        left = writer.add(llvm.SubOp(end, index))
        count = writer.intrinsic("llvm.smin", [left, writer.constant(GROUP)], left.type)

        def measure(place: SSAValue, nothing: Sequence[SSAValue]) -> Sequence[SSAValue]:
            (own,) = writer.inline(magnitudes, [values_of(writer.add(llvm.AddOp(index, place)))])
            writer.store(writer.intrinsic("llvm.vector.reduce.umax", [own], i32), writer.at(tops, place, i32))
            return []

        writer.loop(writer.constant(0), count, 1, [], measure)
        return count

    def group(index: SSAValue, carried: Sequence[SSAValue]) -> Sequence[SSAValue]:
        count, following, seen = carried  # three groups are under way, as in `group_kernel`
        factor, divisor, inexact = writer.inline(scale, [writer.load(tops, VectorType(i32, [GROUP])), over])
        last = measure_group(writer.add(llvm.AddOp(index, writer.constant(2 * GROUP))))

        def coded(place: SSAValue, nothing: Sequence[SSAValue]) -> Sequence[SSAValue]:
            block = writer.add(llvm.AddOp(index, place))
            divisor = writer.spread(writer.load(writer.at(divisors, place), f32), lanes)
            (found,) = writer.inline(codes, [values_of(block), divisor])
            out.codes(found, writer.add(llvm.MulOp(block, writer.constant(lanes))))
            out.block(block, writer.load(writer.at(scales, place), f32), _sum(writer, found))
            return []

        writer.loop(writer.constant(0), count, 1, [], coded)
        writer.store(factor, scales)
        writer.store(divisor, divisors)
        return [following, last, writer.add(llvm.OrOp(seen, inexact))]

    none = writer.add(llvm.ConstantOp(zeros(GROUP), VectorType(i32, [GROUP])))
    writer.store(none, tops)  # a last group may be short: what it leaves as it was has been counted already
    before = writer.add(llvm.SubOp(first, writer.constant(GROUP)))  # where nothing is coded
    carried = [writer.constant(0), measure_group(first), none]
    _, _, inexact = writer.loop(before, end, GROUP, carried, group)
    return finish(writer, writer.intrinsic("llvm.vector.reduce.umax", [inexact], i32))


def code_rows_kernel(
    magnitudes: FuncOp, scale: FuncOp, codes: FuncOp, bits: int, *, given: bool, factors: Factors = ()
) -> ModuleOp:
    """Rows of `length` values, a multiple of the lanes, with one factor and one sum each.

    `given`: the scale is made from the bits of a largest magnitude that the caller has, not from the row's own.
    """
    values = vector_of(codes)
    lanes = values.get_shape()[0]
    writer, (source, target, first, end, known, over, length) = start()
    out = _Outputs(writer, target, f64 if bits == 64 else IntegerType(bits))
    inputs = _Inputs(writer, source, target, factors)
    none = writer.add(llvm.ConstantOp(zeros(lanes), VectorType(i32, [lanes])))

    def row(index: SSAValue, carried: Sequence[SSAValue]) -> Sequence[SSAValue]:
        begin = writer.add(llvm.MulOp(index, length))
        behind = writer.add(llvm.AddOp(begin, length))

        def values_at(at: SSAValue) -> SSAValue:
            return inputs.load(at, values, index, writer.add(llvm.SubOp(at, begin)))

        def measured(at: SSAValue, seen: Sequence[SSAValue]) -> Sequence[SSAValue]:
            (own,) = writer.inline(magnitudes, [values_at(at)])
            return [writer.intrinsic("llvm.umax", [seen[0], own], own.type)]

        if given:
            largest = known
        elif factors:
            (seen,) = writer.loop(begin, behind, lanes, [none], measured)
            largest = writer.intrinsic("llvm.vector.reduce.umax", [seen], i32)
        else:
            largest = largest_of(writer, magnitudes, source, begin, behind)
        factor, divisor, inexact = writer.inline(scale, [largest, over])
        divisor = writer.spread(divisor, lanes)

        def coded(at: SSAValue, sums: Sequence[SSAValue]) -> Sequence[SSAValue]:
            (found,) = writer.inline(codes, [values_at(at), divisor])
            out.codes(found, at)
            return [sums[0] if bits == 64 else writer.add(llvm.AddOp(sums[0], found))]

        (sums,) = writer.loop(begin, behind, lanes, [none], coded)
        out.block(index, factor, _sum(writer, sums))
        return [writer.add(llvm.OrOp(carried[0], inexact))]

    (inexact,) = writer.loop(first, end, 1, [writer.constant(0, i32)], row)
    return finish(writer, inexact)


class _Inputs:
    """The values to round: those of the source, multiplied with what `factors` say, in their order."""

    def __init__(self, writer: Writer, source: SSAValue, addresses: SSAValue, factors: Factors) -> None:
        self.writer, self.source, self.factors = writer, source, factors
        places = [writer.at(addresses, writer.constant(place), POINTER) for place in range(3, 3 + len(factors))]
        self._pointers = [writer.load(place, POINTER) for place in places]
        self.by_place = bool({"row", "column"} & set(factors))

    def load(
        self, offset: SSAValue, kind: VectorType, row: SSAValue | None = None, column: SSAValue | None = None
    ) -> SSAValue:
        """As many values as `kind` has lanes, from `offset` on; they stand in `row`, from `column` on."""
        w = self.writer
        value = w.load(w.at(self.source, offset), kind)
        for factor, pointer in zip(self.factors, self._pointers, strict=True):
            place = {"row": row, "column": column, "value": offset}[factor]
            assert place is not None
            address = w.at(pointer, place)
            other = w.spread(w.load(address, f32), kind.get_shape()[0]) if factor == "row" else w.load(address, kind)
            value = w.add(llvm.FMulOp(value, other))
        return value


class _Outputs:
    """Where codes, factors and sums go."""

    def __init__(self, writer: Writer, addresses: SSAValue, code: IntegerType | Float64Type) -> None:
        self.writer, self.code = writer, code
        places = [writer.at(addresses, writer.constant(place), POINTER) for place in range(3)]
        self._codes, self._factors, self._sums = (writer.load(place, POINTER) for place in places)

    def codes(self, found: SSAValue, offset: SSAValue) -> None:
        """Codes (a vector of i32, or of f32 elements) for the values from `offset` on."""
        assert isinstance(found.type, VectorType)
        kind = VectorType(self.code, found.type.get_shape())
        held = self.writer.add((llvm.FPExtOp if self.code == f64 else llvm.TruncOp)(found, kind))
        self.writer.store(held, self.writer.at(self._codes, offset, self.code), self.code.size)

    def block(self, index: SSAValue, factor: SSAValue, total: SSAValue) -> None:
        self.writer.store(factor, self.writer.at(self._factors, index))
        self.writer.store(total, self.writer.at(self._sums, index, i32))


def _sum(writer: Writer, codes: SSAValue) -> SSAValue:
    """The sum of whole numbers; 0 for elements as they are, which nobody asks for theirs."""
    if isinstance(codes.type, VectorType) and codes.type.element_type == f32:
        return writer.constant(0, i32)
    return writer.intrinsic("llvm.vector.reduce.add", [codes], i32)
