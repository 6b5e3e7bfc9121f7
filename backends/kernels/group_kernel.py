"""From the functions of a block to a native function on many: the scales of eight blocks at a time."""

from __future__ import annotations

from collections.abc import Sequence

from xdsl.dialects import llvm
from xdsl.dialects.builtin import IntegerAttr, ModuleOp, VectorType, f32, i32, i64
from xdsl.dialects.func import FuncOp
from xdsl.ir import SSAValue

from .lowering import GROUP, Bound, apply, finish, measured_row, start, vector_of, zeros


def groups_kernel(
    measure: FuncOp,
    reductions: Sequence[str],
    scale: FuncOp,
    elements: FuncOp,
    bound: Bound | None = None,
    *,
    together: int = 1,
    rows: bool = False,
    streamed: bool = False,
) -> ModuleOp:
    """The arguments of all kernels, for blocks: the scales of eight at a time, then their elements.

    It yields the bits of the largest scale. `together` blocks (1, 4 or 8) are measured at once: the more, the faster
    where blocks are short, and the longer it takes to compile. `rows`: blocks have `length` values, a
    multiple of what the functions take.
    """
    values = vector_of(elements)
    lanes = values.get_shape()[0]
    writer, (source, target, first, end, _, over, length) = start(streamed=streamed)
    size = length if rows else writer.constant(lanes)

    # Loops over the blocks of a group, not eight copies of their code: that would take ten times as long to compile.
    tops = [writer.array(i32, GROUP) for _ in reductions]
    factors = [writer.array(f32, GROUP) for _ in scale.function_type.outputs]

    def reduced_of(offset: SSAValue, behind: SSAValue) -> Sequence[SSAValue]:
        if rows:
            return measured_row(writer, measure, reductions, source, offset, behind)
        own = writer.inline(measure, [writer.load(writer.at(source, offset), values)])
        pairs = zip(reductions, own, strict=True)
        return [writer.intrinsic(f"llvm.vector.reduce.{name}", [part], i32) for name, part in pairs]

    def measure_group(index: SSAValue) -> SSAValue:
        """Measure the blocks from `index` on, where there are any; how many."""
        begin = writer.add(llvm.MulOp(index, size))
        left = writer.add(llvm.SubOp(end, index))
        count = writer.intrinsic("llvm.smin", [left, writer.constant(GROUP)], i64)

        def measured(place: SSAValue, nothing: Sequence[SSAValue]) -> Sequence[SSAValue]:
            offset = writer.add(llvm.AddOp(begin, writer.add(llvm.MulOp(place, size))))
            behind = writer.add(llvm.AddOp(offset, size))
            for reduced, top in zip(reduced_of(offset, behind), tops, strict=True):
                writer.store(reduced, writer.at(top, place, i32))
            return []

        def measured_at_once(place: SSAValue, nothing: Sequence[SSAValue]) -> Sequence[SSAValue]:
            offset = writer.add(llvm.AddOp(begin, writer.add(llvm.MulOp(place, size))))
            places = [writer.add(llvm.AddOp(offset, writer.constant(block * lanes))) for block in range(together)]
            loaded = [writer.load(writer.at(source, place), values) for place in places]
            own = zip(*(writer.inline(measure, [one]) for one in loaded), strict=True)
            for parts, reduction, top in zip(own, reductions, tops, strict=True):
                writer.store(writer.reduced_blocks(parts, reduction), writer.at(top, place, i32))
            return []

        if together == 1:
            writer.loop(writer.constant(0), count, 1, [], measured)
            return count
        full = writer.add(llvm.ICmpOp(count, writer.constant(GROUP), IntegerAttr(0, 64)))
        nothing = writer.constant(0)
        writer.loop(nothing, writer.add(llvm.SelectOp(full, count, nothing)), together, [], measured_at_once)
        writer.loop(nothing, writer.add(llvm.SelectOp(full, nothing, count)), 1, [], measured)
        return count

    def group(index: SSAValue, carried: Sequence[SSAValue]) -> Sequence[SSAValue]:
        count, following, seen = carried
        begin = writer.add(llvm.MulOp(index, size))
        # While one group is rounded, the scales of the next are computed and the one behind it is measured: scales take
        # long, and a vector read right behind the writes of its lanes waits until they have reached the cache.
        found = [writer.load(top, VectorType(i32, [GROUP])) for top in tops]
        computed = writer.inline(scale, [*found, over])
        last = measure_group(writer.add(llvm.AddOp(index, writer.constant(2 * GROUP))))

        def rounded(place: SSAValue, nothing: Sequence[SSAValue]) -> Sequence[SSAValue]:
            offset = writer.add(llvm.AddOp(begin, writer.add(llvm.MulOp(place, size))))
            own = [writer.spread(writer.load(writer.at(factor, place), f32), lanes) for factor in factors]

            def several(at: SSAValue, nothing: Sequence[SSAValue]) -> Sequence[SSAValue]:
                apply(writer, elements, source, target, at, own)
                return []

            if rows:
                writer.loop(offset, writer.add(llvm.AddOp(offset, size)), lanes, [], several)
            else:
                several(offset, [])
            return []

        writer.loop(writer.constant(0), count, 1, [], rounded)
        for one, place in zip(computed, factors, strict=True):
            writer.store(one, place)
        own = writer.add(llvm.BitcastOp(computed[0], seen.type))
        return [following, last, writer.intrinsic("llvm.umax", [seen, own], seen.type)]

    none = writer.add(llvm.ConstantOp(zeros(GROUP), VectorType(i32, [GROUP])))
    for top in tops:  # a last group may be short: what it leaves as it was has been counted already
        writer.store(none, top)
    before = writer.add(llvm.SubOp(first, writer.constant(GROUP)))  # where nothing is rounded
    carried = [writer.constant(0), measure_group(first), none]
    _, _, seen = writer.loop(before, end, GROUP, carried, group)
    largest = writer.intrinsic("llvm.vector.reduce.umax", [seen], i32)
    if bound is not None:
        begin, behind = (writer.add(llvm.MulOp(index, size)) for index in (first, end))
        bound.apply(writer, target, begin, behind, largest)
    return finish(writer, largest)
