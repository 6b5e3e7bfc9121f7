"""From `@q` to a native function: the loop over blocks, and arith, math and vector in the llvm dialect."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from struct import pack

from xdsl.dialects import arith, llvm, math, vector
from xdsl.dialects.builtin import (
    DenseArrayBase,
    DenseIntOrFPElementsAttr,
    IntegerAttr,
    ModuleOp,
    VectorType,
    f32,
    i32,
    i64,
)
from xdsl.dialects.func import FuncOp, ReturnOp
from xdsl.ir import Attribute, Block, Operation, Region, SSAValue

from ...dialects.errors import MxloomError
from ._builder import PREDICATES, made, vector_of_type
from .native import STREAMED

_SAME: dict[type[Operation], type[Operation]] = {
    arith.AddiOp: llvm.AddOp,
    arith.SubiOp: llvm.SubOp,
    arith.MuliOp: llvm.MulOp,
    arith.AndIOp: llvm.AndOp,
    arith.OrIOp: llvm.OrOp,
    arith.ShRUIOp: llvm.LShrOp,
    arith.ShRSIOp: llvm.AShrOp,
    arith.XOrIOp: llvm.XOrOp,
    arith.AddfOp: llvm.FAddOp,
    arith.SubfOp: llvm.FSubOp,
    arith.MulfOp: llvm.FMulOp,
    arith.DivfOp: llvm.FDivOp,
}

_INTRINSICS: dict[type[Operation], str] = {
    arith.MaxSIOp: "llvm.smax",
    arith.MinSIOp: "llvm.smin",
    math.RoundEvenOp: "llvm.roundeven",
    math.TruncOp: "llvm.trunc",
    math.FloorOp: "llvm.floor",
}

POINTER = llvm.LLVMPointerType()

GROUP = 8
"""Blocks whose scales are computed at once."""


class Writer:
    """Appends llvm operations to the end of the block it stands in."""

    def __init__(self, region: Region, block: Block, *, streamed: bool = False) -> None:
        self.region, self.block, self.streamed = region, block, streamed

    def add(self, operation: Operation) -> SSAValue:
        self.block.add_op(operation)
        return operation.results[0]

    def constant(self, value: int, kind: Attribute = i64) -> SSAValue:
        return self.add(llvm.ConstantOp.create(result_types=[kind], properties={"value": IntegerAttr(value, kind)}))  # pyright: ignore[reportArgumentType, reportCallIssue]

    def at(self, pointer: SSAValue, index: SSAValue, kind: Attribute = f32) -> SSAValue:
        """The address of an element."""
        return self.add(
            made(
                (llvm.GEPOp, kind),
                lambda: llvm.GEPOp.from_mixed_indices(pointer, [index], kind),
                [pointer, index],
                [POINTER],
            )
        )

    def load(self, pointer: SSAValue, kind: Attribute) -> SSAValue:
        load = made(llvm.LoadOp, lambda: llvm.LoadOp(pointer, kind), [pointer], [kind])
        load.properties["alignment"] = IntegerAttr(4, 64)
        return self.add(load)

    def store(self, value: SSAValue, pointer: SSAValue, alignment: int = 4) -> None:
        store = made(llvm.StoreOp, lambda: llvm.StoreOp(value, pointer), [value, pointer], [])
        store.properties["alignment"] = IntegerAttr(alignment, 64)
        self.block.add_op(store)

    def intrinsic(self, name: str, arguments: Sequence[SSAValue], result: Attribute) -> SSAValue:
        return self.add(llvm.CallIntrinsicOp(f"{name}.{_suffix(arguments[0].type)}", list(arguments), [result]))

    def loop(
        self,
        first: SSAValue,
        end: SSAValue,
        step: int,
        carried: Sequence[SSAValue],
        body: Callable[[SSAValue, Sequence[SSAValue]], Sequence[SSAValue]],
    ) -> Sequence[SSAValue]:
        """`for (i = first; i < end; i += step) carried = body(i, carried)`; the values at its end. Goes on there."""
        kinds = [value.type for value in carried]
        head, inside, behind = Block(arg_types=[i64, *kinds]), Block(), Block()
        self._jump(head, [first, *carried])
        self.region.add_block([head, inside, behind])
        self.block = head
        index, *values = head.args
        more = self.add(llvm.ICmpOp(index, end, IntegerAttr(2, 64)))
        self.block.add_op(llvm.CondBrOp(more, inside, [], behind, []))
        self.block = inside
        after = body(index, values)
        advanced = self.add(llvm.AddOp(index, self.constant(step)))
        self._jump(head, [advanced, *after])
        self.block = behind
        return values

    def inline(self, function: FuncOp, arguments: Sequence[SSAValue]) -> Sequence[SSAValue]:
        """The body of an arith function with these arguments, in llvm; what it returns."""
        known: dict[SSAValue, SSAValue] = dict(zip(function.body.block.args, arguments, strict=True))
        for op in function.body.block.ops:
            operands = [known[operand] for operand in op.operands]
            if isinstance(op, ReturnOp):
                return operands
            known[op.results[0]] = self._lowered(op, operands)
        raise MxloomError("the block function returns nothing; this is a fault of mxloom")

    def _lowered(self, op: Operation, operands: Sequence[SSAValue]) -> SSAValue:
        kind = op.results[0].type
        same = _SAME.get(type(op))
        if same is not None:
            return self.add(made(same, lambda: same(*operands), operands, [kind]))
        if type(op) in _INTRINSICS:
            return self.intrinsic(_INTRINSICS[type(op)], operands, kind)
        match op:
            case arith.ConstantOp():
                return self.add(llvm.ConstantOp.create(result_types=[kind], properties={"value": _listed(op.value)}))
            case arith.BitcastOp():
                return self.bitcast(operands[0], kind)
            case arith.ExtFOp():
                return self.add(llvm.FPExtOp(operands[0], kind))
            case arith.TruncFOp():
                return self.add(llvm.FPTruncOp(operands[0], kind))
            case vector.BroadcastOp():
                assert isinstance(kind, VectorType)
                return self.spread(operands[0], kind.get_shape()[0])
            case arith.CmpfOp():
                predicate = PREDICATES[op.predicate.value.data]
                return self.add(
                    made(
                        (llvm.FCmpOp, predicate),
                        lambda: llvm.FCmpOp(operands[0], operands[1], predicate),
                        operands,
                        [kind],
                    )
                )
            case arith.SelectOp():
                return self.add(made(llvm.SelectOp, lambda: llvm.SelectOp(*operands), operands, [kind]))
        raise MxloomError(f"{op.name} has no form in the llvm dialect; this is a fault of mxloom")

    def bitcast(self, value: SSAValue, kind: Attribute) -> SSAValue:
        return self.add(made(llvm.BitcastOp, lambda: llvm.BitcastOp(value, kind), [value], [kind]))

    def array(self, kind: Attribute, length: int) -> SSAValue:
        """The address of an array on the stack."""
        place = self.add(llvm.AllocaOp(self.constant(length, i32), kind, alignment=64))
        return self.add(llvm.BitcastOp(place, POINTER))  # llvmlite gives the address the type of what lies there

    def spread(self, value: SSAValue, lanes: int) -> SSAValue:
        """A scalar in every lane."""
        kind = vector_of_type(value.type, lanes)
        undefined = self.add(llvm.UndefOp(kind))
        first = self.add(llvm.InsertElementOp(undefined, value, self.constant(0, i32)))
        mask = DenseArrayBase.from_list(i32, [0] * lanes)
        return self.add(
            llvm.ShuffleVectorOp.create(operands=[first, undefined], result_types=[kind], properties={"mask": mask})
        )

    def lanes(self, a: SSAValue, b: SSAValue, which: Sequence[int]) -> SSAValue:
        """Some lanes of two vectors, those of the second counted on from the first."""
        assert isinstance(a.type, VectorType)
        kind = vector_of_type(a.type.element_type, len(which))
        mask = DenseArrayBase.from_list(i32, [*which])
        return self.add(llvm.ShuffleVectorOp.create(operands=[a, b], result_types=[kind], properties={"mask": mask}))

    def reduced_blocks(self, vectors: Sequence[SSAValue], reduction: str) -> SSAValue:
        """One number for each of several blocks, a power of two of them, which are given as a vector each.

        Two vectors become one with half as many lanes for each block, until all stand in one.
        """
        assert isinstance(vectors[0].type, VectorType)
        width = lanes = vectors[0].type.get_shape()[0]
        vectors, blocks = [*vectors], len(vectors)
        while width > 1:
            half = width // 2
            if len(vectors) == 1:
                pairs, count = [(vectors[0], vectors[0])], blocks
            else:
                pairs, count = list(zip(vectors[::2], vectors[1::2], strict=True)), 2 * lanes // width
            vectors = []
            for a, b in pairs:
                parts = [
                    self.lanes(a, b, [block * width + begin + lane for block in range(count) for lane in range(half)])
                    for begin in (0, half)
                ]
                vectors.append(self.intrinsic(f"llvm.{reduction}", parts, parts[0].type))
            width = half
        return vectors[0]

    def _jump(self, target: Block, arguments: Sequence[SSAValue]) -> None:
        self.block.add_op(llvm.BrOp.create(operands=list(arguments), successors=[target]))


_ARGUMENTS = (POINTER, POINTER, i64, i64, i32, f32, i64)
"""source, target, first and end of the blocks, bits of the largest magnitude, scale of the tensor, length of a row."""


def pieces_kernel(function: FuncOp, *, streamed: bool = False) -> ModuleOp:
    """`i32 kernel(source, target, first, end, given, over, length)`: `@q` on pieces of as many f32 as it takes.

    The pieces are those from `first` to `end`. Every kernel has the same arguments, read or not; it yields the bits of
    the largest magnitude where it looks for one, else 0. Where a function takes noise, it lies in the target, which
    then takes the result. `streamed`, here and elsewhere: results go past the caches, which x86 can, to a target at a
    multiple of 64 bytes; a register's worth of values is as long.
    """
    values = vector_of(function)
    writer, (source, target, first, end, given, over, _) = start(streamed=streamed)
    lanes = values.get_shape()[0]

    def body(index: SSAValue, nothing: Sequence[SSAValue]) -> Sequence[SSAValue]:
        offset = writer.add(llvm.MulOp(index, writer.constant(lanes)))
        apply(writer, function, source, target, offset, [given, over])
        return []

    writer.loop(first, end, 1, [], body)
    return finish(writer, writer.constant(0, i32))


@dataclass(frozen=True)
class Bound:
    """`@bounded`, and the largest scale under which results need it not."""

    function: FuncOp
    scale: float

    def apply(self, writer: Writer, target: SSAValue, first: SSAValue, end: SSAValue, largest: SSAValue) -> None:
        """Bring the results [first, end) within f32 where the largest scale (its bits) asks for it: hardly ever."""
        values = vector_of(self.function)
        limit = writer.constant(int.from_bytes(pack("<f", self.scale), "little"), i32)
        beyond = writer.add(llvm.ICmpOp(largest, limit, IntegerAttr(8, 64)))  # ugt: NaN of either sign lies above

        def bounded(at: SSAValue, nothing: Sequence[SSAValue]) -> Sequence[SSAValue]:
            place = writer.at(target, at)
            (result,) = writer.inline(self.function, [writer.load(place, values)])
            writer.store(result, place)
            return []

        writer.loop(first, writer.add(llvm.SelectOp(beyond, end, first)), values.get_shape()[0], [], bounded)


def rows_kernel(
    measure: FuncOp,
    reductions: Sequence[str],
    scale: FuncOp,
    elements: FuncOp,
    bound: Bound | None = None,
    *,
    streamed: bool = False,
) -> ModuleOp:
    """The arguments of all kernels: each row of `length` values is one block, read to be measured, then rounded.

    `length` is a multiple of the lanes of all functions. It yields the bits of the largest scale.
    """
    lanes = vector_of(elements).get_shape()[0]
    writer, (source, target, first, end, _, over, length) = start(streamed=streamed)

    def row(index: SSAValue, carried: Sequence[SSAValue]) -> Sequence[SSAValue]:
        begin = writer.add(llvm.MulOp(index, length))
        behind = writer.add(llvm.AddOp(begin, length))
        measured = measured_row(writer, measure, reductions, source, begin, behind)
        computed = writer.inline(scale, [*measured, over])
        factors = [writer.spread(one, lanes) for one in computed]

        def rounded(at: SSAValue, nothing: Sequence[SSAValue]) -> Sequence[SSAValue]:
            apply(writer, elements, source, target, at, factors)
            return []

        writer.loop(begin, behind, lanes, [], rounded)
        return [writer.intrinsic("llvm.umax", [carried[0], writer.add(llvm.BitcastOp(computed[0], i32))], i32)]

    (largest,) = writer.loop(first, end, 1, [writer.constant(0, i32)], row)
    if bound is not None:
        begin, behind = (writer.add(llvm.MulOp(index, length)) for index in (first, end))
        bound.apply(writer, target, begin, behind, largest)
    return finish(writer, largest)


def given_rows_kernel(function: FuncOp) -> ModuleOp:
    """The same arguments: `@q` on rows of `length` values whose scales stand already.

    The target is the address of two addresses: of the rounded values, and of one f32 for each row, the scale.
    """
    lanes = vector_of(function).get_shape()[0]
    writer, (source, places, first, end, given, _, length) = start()
    target, scales = (writer.load(writer.at(places, writer.constant(i), POINTER), POINTER) for i in range(2))

    def row(index: SSAValue, nothing: Sequence[SSAValue]) -> Sequence[SSAValue]:
        begin = writer.add(llvm.MulOp(index, length))
        scale = writer.load(writer.at(scales, index), f32)

        def rounded(at: SSAValue, nothing: Sequence[SSAValue]) -> Sequence[SSAValue]:
            apply(writer, function, source, target, at, [given, scale])
            return []

        writer.loop(begin, writer.add(llvm.AddOp(begin, length)), lanes, [], rounded)
        return []

    writer.loop(first, end, 1, [], row)
    return finish(writer, writer.constant(0, i32))


def apply(
    writer: Writer,
    function: FuncOp,
    source: SSAValue,
    target: SSAValue,
    offset: SSAValue,
    factors: Sequence[SSAValue],
) -> None:
    """A function on the values from `offset` on, these arguments, and noise from the target if it takes it.

    Stores of a `streamed` writer go past the caches.
    """
    values = vector_of(function)
    place = writer.at(target, offset)
    arguments = [writer.load(writer.at(source, offset), values), *factors]
    if len(arguments) < len(function.function_type.inputs):
        arguments.append(writer.load(place, values))
    (result,) = writer.inline(function, arguments)
    writer.store(result, place, STREAMED if writer.streamed else 4)


def largest_kernel(magnitudes: FuncOp) -> ModuleOp:
    """The same arguments: the bits of the largest magnitude in the blocks [first, end); nothing is written."""
    writer, (source, _, first, end, *_) = start()
    lanes = writer.constant(vector_of(magnitudes).get_shape()[0])
    begin, behind = (writer.add(llvm.MulOp(bound, lanes)) for bound in (first, end))
    return finish(writer, largest_of(writer, magnitudes, source, begin, behind))


def largest_of(writer: Writer, magnitudes: FuncOp, source: SSAValue, begin: SSAValue, end: SSAValue) -> SSAValue:
    """The bits of the largest magnitude among the values [begin, end)."""
    (largest,) = measured_row(writer, magnitudes, ["umax"], source, begin, end)
    return largest


def measured_row(
    writer: Writer, measure: FuncOp, reductions: Sequence[str], source: SSAValue, begin: SSAValue, end: SSAValue
) -> Sequence[SSAValue]:
    """What `@measure` gives for the values [begin, end) and a zero, reduced to one i32 each."""
    values = vector_of(measure)
    lanes = values.get_shape()[0]

    def measured(at: SSAValue, seen: Sequence[SSAValue]) -> Sequence[SSAValue]:
        own = writer.inline(measure, [writer.load(writer.at(source, at), values)])
        pairs = zip(reductions, seen, own, strict=True)
        return [writer.intrinsic(f"llvm.{name}", [before, part], part.type) for name, before, part in pairs]

    none = writer.add(llvm.ConstantOp(zeros(lanes), VectorType(i32, [lanes])))
    found = writer.loop(begin, end, lanes, [none] * len(reductions), measured)
    pairs = zip(reductions, found, strict=True)
    return [writer.intrinsic(f"llvm.vector.reduce.{name}", [part], i32) for name, part in pairs]


def start(*, streamed: bool = False) -> tuple[Writer, Sequence[SSAValue]]:
    entry = Block(arg_types=_ARGUMENTS)
    return Writer(Region(entry), entry, streamed=streamed), entry.args


def finish(writer: Writer, result: SSAValue) -> ModuleOp:
    if writer.streamed:  # what went past the caches is there before anybody is told so
        writer.block.add_op(llvm.CallIntrinsicOp("llvm.x86.sse.sfence", [], []))
    writer.block.add_op(llvm.ReturnOp(result))
    kind = llvm.LLVMFunctionType(_ARGUMENTS, result.type)
    return ModuleOp([llvm.FuncOp("kernel", kind, linkage=llvm.LinkageAttr("external"), body=writer.region)])


def vector_of(function: FuncOp) -> VectorType:
    values = function.function_type.inputs.data[0]
    assert isinstance(values, VectorType)
    return values


def zeros(lanes: int) -> DenseIntOrFPElementsAttr:
    return DenseIntOrFPElementsAttr.from_list(VectorType(i32, [lanes]), [0] * lanes)


def _listed(value: Attribute) -> Attribute:
    """A splat with every lane written out, as xDSL's converter wants it."""
    if isinstance(value, DenseIntOrFPElementsAttr):
        lanes = value.type.get_shape()[0]
        values = list(value.get_values())
        return DenseIntOrFPElementsAttr.from_list(value.type, values * (lanes // len(values)))  # pyright: ignore[reportArgumentType, reportCallIssue]
    return value


def _suffix(kind: Attribute) -> str:
    """A type as the name of an intrinsic spells it."""
    if isinstance(kind, VectorType):
        return f"v{kind.get_shape()[0]}{_suffix(kind.element_type)}"
    return str(kind)
