"""The code of a linear layer on packed codes: `y[m, n] = sum over segments of dot * scale`, in the llvm dialect.

Lanes are columns of the result and activations are spread over them, so that nothing is summed across lanes. Rows of
activations stay in registers as a tile; the weights of a panel are unpacked once for all rows of the tile.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from xdsl.dialects import llvm
from xdsl.dialects.builtin import (
    DenseIntOrFPElementsAttr,
    ModuleOp,
    VectorType,
    f32,
    i8,
    i32,
    i64,
)
from xdsl.ir import Attribute, Block, Region

from ..lowering import POINTER, Writer
from .datapath import CODE_BYTES, PANEL, Datapath

if TYPE_CHECKING:
    from xdsl.ir import SSAValue

ScaleForm = Literal["exponent", "e4m3", "f32"]
"""How the factors of weights lie in memory: as biased exponents of one byte, as E4M3 numbers of one byte (times the
element's step, a power of two), or as f32."""

SCALE_BYTES: dict[ScaleForm, int] = {"exponent": 1, "e4m3": 1, "f32": 4}

POINTERS = ("weights", "weight_scales", "codes", "code_scales", "code_sums", "output", "bias", "over")
COUNTS = ("segments", "steps", "rows", "leading")
FIELDS = (*POINTERS, *COUNTS)
"""What the kernel reads, 8 bytes each: addresses, then the segments of K, the steps in one, the rows, and the length of
a row of the result."""

UNROLLED = 8
"""Partial sums up to which each has a loop of its own; for more of them the code would only grow."""


@dataclass(frozen=True)
class LinearNumbers:
    """What the code is written from.

    bits: of a packed weight; table: the code that each packed weight stands for, or None where it is the code itself,
    with `offset` added; scales: form of the weights' factors, `scale_step` what E4M3 ones are multiplied with; rows,
    panels: the tile; mantissa, rounding, partials: the accumulator; over: whether a factor of the whole result is
    multiplied at the end; bias: whether one is added then; ahead: bytes of weights fetched before they are read, where
    they come from memory; chains: sums of dot products side by side, added behind a segment, where one would wait for
    itself.
    """

    datapath: Datapath
    bits: int
    table: tuple[int, ...] | None
    offset: int
    scales: ScaleForm
    rows: int
    panels: int
    mantissa: int = 23
    rounding: str = "rne"
    partials: int = 1
    over: bool = False
    bias: bool = False
    scale_step: float = 1.0
    ahead: int = 0
    chains: int = 1

    @property
    def planes(self) -> int:
        """Dot products for one load of weights."""
        return 8 // self.bits if self.datapath.codes == "i8" else 1

    @property
    def depth(self) -> int:
        """Products along K for one load of weights."""
        return self.planes * self.datapath.depth

    @property
    def load_bytes(self) -> int:
        """Bytes of one load of a panel's weights."""
        return PANEL * self.depth * self.bits // 8


def linear_code(numbers: LinearNumbers) -> ModuleOp:
    """`i32 kernel(arguments, first, end)`: the panels' tiles from `first` to `end`, for all rows; 0."""
    return _Linear(numbers).module()


class _Linear:
    def __init__(self, numbers: LinearNumbers) -> None:
        self.n, self.path = numbers, numbers.datapath
        entry = Block(arg_types=(POINTER, i64, i64))
        self.w = Writer(Region(entry), entry)
        arguments, self.first, self.end = entry.args
        self.given: dict[str, SSAValue] = {}
        for place, name in enumerate(FIELDS):
            kind = i64 if name in COUNTS else POINTER
            address = self.w.at(arguments, self.w.constant(place), i64)
            self.given[name] = self.w.load(address, kind)
        self.code_bytes = CODE_BYTES[self.path.codes]
        self.floats = VectorType(f32, [self.path.lanes])
        self.integers = VectorType(i32, [self.path.lanes])
        self.tile = [(r, p) for p in range(numbers.panels * self.path.parts) for r in range(numbers.rows)]

    def module(self) -> ModuleOp:
        w, n = self.w, self.n
        segment_bytes = w.add(llvm.MulOp(self.given["steps"], w.constant(n.load_bytes)))
        self.panel_bytes = w.add(llvm.MulOp(self.given["segments"], segment_bytes))
        segment_codes = w.add(llvm.MulOp(self.given["steps"], w.constant(n.depth * self.code_bytes)))
        self.row_bytes = w.add(llvm.MulOp(self.given["segments"], segment_codes))
        self.segment_bytes, self.segment_codes = segment_bytes, segment_codes
        self.scale_bytes = w.constant(SCALE_BYTES[n.scales] * PANEL)
        self.panel_scales = w.add(llvm.MulOp(self.given["segments"], self.scale_bytes))
        w.loop(self.first, self.end, 1, [], self._columns)
        w.block.add_op(llvm.ReturnOp(w.constant(0, i32)))
        kind = llvm.LLVMFunctionType((POINTER, i64, i64), i32)
        return ModuleOp([llvm.FuncOp("kernel", kind, linkage=llvm.LinkageAttr("external"), body=w.region)])

    def _offset(self, pointer: SSAValue, offset: SSAValue | int) -> SSAValue:
        """An address so many bytes behind another."""
        if isinstance(offset, int):
            return pointer if offset == 0 else self.w.add(llvm.GEPOp.from_mixed_indices(pointer, [offset], i8))
        return self.w.at(pointer, offset, i8)

    def _columns(self, tile: SSAValue, nothing: Sequence[SSAValue]) -> Sequence[SSAValue]:
        w, n = self.w, self.n
        panel = w.add(llvm.MulOp(tile, w.constant(n.panels)))
        self.weights, self.weight_scales = [], []
        for place in range(n.panels):
            own = w.add(llvm.AddOp(panel, w.constant(place)))
            offset = w.add(llvm.MulOp(own, self.panel_bytes))
            self.weights.append(self._offset(self.given["weights"], offset))
            offset = w.add(llvm.MulOp(own, self.panel_scales))
            self.weight_scales.append(self._offset(self.given["weight_scales"], offset))
        self.column = w.add(llvm.MulOp(panel, w.constant(PANEL)))
        w.loop(w.constant(0), self.given["rows"], n.rows, [], self._rows)
        return []

    def _rows(self, row: SSAValue, nothing: Sequence[SSAValue]) -> Sequence[SSAValue]:
        w, n = self.w, self.n
        rows = [row if r == 0 else w.add(llvm.AddOp(row, w.constant(r))) for r in range(n.rows)]
        codes = [self._offset(self.given["codes"], w.add(llvm.MulOp(r, self.row_bytes))) for r in rows]
        firsts = [w.add(llvm.MulOp(r, self.given["segments"])) for r in rows]
        scales = [w.at(self.given["code_scales"], f, f32) for f in firsts]
        sums = [w.at(self.given["code_sums"], f, i32) for f in firsts]
        zero = self._zeros(self.floats)

        def segment(index: SSAValue, accumulators: Sequence[SSAValue]) -> Sequence[SSAValue]:
            dots = self._dots(index, codes, sums)
            return self._accumulated(index, accumulators, dots, scales)

        def partial(first: SSAValue, total: Sequence[SSAValue]) -> Sequence[SSAValue]:
            own = w.loop(first, self.given["segments"], n.partials, [zero] * len(self.tile), segment)
            if not total:
                return own
            return [self._narrowed(w.add(llvm.FAddOp(a, b))) for a, b in zip(total, own, strict=True)]

        total = partial(w.constant(0), [])
        if n.partials <= UNROLLED:
            for first in range(1, n.partials):
                total = partial(w.constant(first), total)
        else:
            total = w.loop(w.constant(1), w.constant(n.partials), 1, total, partial)
        self._store(rows, total)
        return []

    def _dots(self, index: SSAValue, codes: Sequence[SSAValue], sums: Sequence[SSAValue]) -> Sequence[SSAValue]:
        """The exact dot products of a segment, for every row and part of a panel."""
        w, n = self.w, self.n
        weight_start = w.add(llvm.MulOp(index, self.segment_bytes))
        code_start = w.add(llvm.MulOp(index, self.segment_codes))
        weights = [self._offset(pointer, weight_start) for pointer in self.weights]
        rows = [self._offset(pointer, code_start) for pointer in codes]
        if n.offset and self.path.unsigned:
            back = w.constant(-n.offset, i32)
            first = [
                w.spread(w.add(llvm.MulOp(w.load(w.at(pointer, index, i32), i32), back)), self.path.lanes)
                for pointer in sums
            ]
        else:
            first = [self._zeros(self.path.sums)] * n.rows
        initial = [first[r] for r, _ in self.tile]
        count = len(initial)
        initial += [self._zeros(self.path.sums)] * (count * (n.chains - 1))

        def step(place: SSAValue, dots: Sequence[SSAValue]) -> Sequence[SSAValue]:
            dots = list(dots)
            weight_at = w.add(llvm.MulOp(place, w.constant(n.load_bytes)))
            code_at = w.add(llvm.MulOp(place, w.constant(n.depth * self.code_bytes)))
            own_weights = [self._offset(pointer, weight_at) for pointer in weights]
            own_rows = [self._offset(pointer, code_at) for pointer in rows]
            if n.ahead:
                for pointer in own_weights:
                    self._fetch(pointer)
            loaded = [self._loaded(pointer) for pointer in own_weights]
            for plane in range(n.planes):
                factors = [part for words in loaded for part in self._unpacked(words, plane)]
                at = plane * self.path.depth * self.code_bytes
                spread = [self.path.spread(w, self._offset(pointer, at)) for pointer in own_rows]
                first = plane % n.chains * count
                for own, (r, p) in enumerate(self.tile, first):
                    dots[own] = self.path.dot(w, dots[own], factors[p], spread[r])
            return dots

        dots = w.loop(w.constant(0), self.given["steps"], 1, initial, step)
        for first in range(count, len(dots), count):
            sums_ = zip(dots[:count], dots[first : first + count], strict=True)
            dots = [*(w.add(llvm.AddOp(a, b)) for a, b in sums_), *dots[count:]]
        return dots[:count]

    def _fetch(self, pointer: SSAValue) -> None:
        """Asks for the weights so far ahead; an address behind their end does no harm."""
        w, n = self.w, self.n
        hints = [w.constant(value, i32) for value in (0, 3, 1)]  # to read, into every cache, as data
        for start in range(0, n.load_bytes, 64):
            w.block.add_op(
                llvm.CallIntrinsicOp("llvm.prefetch.p0", [self._offset(pointer, n.ahead + start), *hints], [])
            )

    def _loaded(self, pointer: SSAValue) -> Sequence[SSAValue]:
        """One load of a panel's packed weights, in registers."""
        size = self.n.load_bytes // self.path.parts
        kind = self.path.packed(self.n.bits)
        return [self.w.load(self._offset(pointer, part * size), kind) for part in range(self.path.parts)]

    def _unpacked(self, words: Sequence[SSAValue], plane: int) -> Sequence[SSAValue]:
        """The codes of one plane as factors of the dot product."""
        w, n, path = self.w, self.n, self.path
        if path.codes == "f64":
            return [w.add(llvm.FPExtOp(part, path.factors)) for part in words]
        if path.codes == "i16":
            return [w.add(llvm.SExtOp(part, path.factors)) if n.bits == 8 else part for part in words]
        if n.bits == 8:
            return [w.add(llvm.BitcastOp(part, path.factors)) for part in words]
        found: list[SSAValue] = []
        for part in words:
            if plane:
                places = self._splat(n.bits * plane, i32)
                part = w.add(llvm.LShrOp(part, places))
            mask = ((1 << n.bits) - 1) * 0x01010101
            codes = w.add(llvm.BitcastOp(w.add(llvm.AndOp(part, self._splat(mask, i32))), path.factors))
            found.append(codes if n.table is None else self._looked_up(codes))
        return found

    def _looked_up(self, codes: SSAValue) -> SSAValue:
        """Bytes from a table of 16, by their lowest four bits."""
        assert self.n.table is not None
        lanes = self.path.lanes * 4
        values = (list(self.n.table) * 16)[:16] * (lanes // 16)
        table = self.w.add(llvm.ConstantOp(_dense(values, VectorType(i8, [lanes])), VectorType(i8, [lanes])))
        name = {64: "llvm.x86.avx512.pshuf.b.512", 32: "llvm.x86.avx2.pshuf.b", 16: "llvm.aarch64.neon.tbl1.v16i8"}
        return self.w.add(llvm.CallIntrinsicOp(name[lanes], [table, codes], [self.path.factors]))

    def _accumulated(
        self,
        index: SSAValue,
        accumulators: Sequence[SSAValue],
        dots: Sequence[SSAValue],
        scales: Sequence[SSAValue],
    ) -> Sequence[SSAValue]:
        """The accumulators after a segment: dot times scale added in one rounding, then in the accumulator's format."""
        w = self.w
        columns = self._weight_scales(index)
        rows = [w.spread(w.load(w.at(pointer, index, f32), f32), self.path.lanes) for pointer in scales]
        after: list[SSAValue] = []
        for (r, p), dot, before in zip(self.tile, dots, accumulators, strict=True):
            exact = self.path.to_f32(w, dot)
            scale = w.add(llvm.FMulOp(columns[p], rows[r]))
            total = w.intrinsic("llvm.fma", [exact, scale, before], self.floats)
            after.append(self._narrowed(total))
        return after

    def _weight_scales(self, index: SSAValue) -> Sequence[SSAValue]:
        w, lanes = self.w, self.path.lanes
        start = w.add(llvm.MulOp(index, self.scale_bytes))
        found: list[SSAValue] = []
        for pointer in self.weight_scales:
            own = self._offset(pointer, start)
            for part in range(self.path.parts):
                if self.n.scales == "f32":
                    found.append(w.load(self._offset(own, part * lanes * 4), self.floats))
                    continue
                bytes_ = w.load(self._offset(own, part * lanes), VectorType(i8, [lanes]))
                wide = w.add(llvm.ZExtOp(bytes_, self.integers))
                places = 23 if self.n.scales == "exponent" else 20
                value = w.add(llvm.BitcastOp(w.add(llvm.ShlOp(wide, self._splat(places, i32))), self.floats))
                if self.n.scales == "e4m3":  # the exponent's bias is 7, that of f32 127; subnormals come out right
                    value = w.add(llvm.FMulOp(value, self._splat(2.0**120 * self.n.scale_step, f32)))
                found.append(value)
        return found

    def _narrowed(self, value: SSAValue) -> SSAValue:
        """An f32 rounded to the accumulator's significand. Infinity and NaN stay."""
        dropped = 23 - self.n.mantissa
        if not dropped:
            return value
        w = self.w
        bits = w.add(llvm.BitcastOp(value, self.integers))
        if self.n.rounding == "rne":
            odd = w.add(llvm.AndOp(w.add(llvm.LShrOp(bits, self._splat(dropped, i32))), self._splat(1, i32)))
            carry = w.add(llvm.AddOp(odd, self._splat((1 << (dropped - 1)) - 1, i32)))
            bits = w.add(llvm.AddOp(bits, carry))
        kept = w.add(llvm.AndOp(bits, self._splat(-(1 << dropped), i32)))
        return w.add(llvm.BitcastOp(kept, self.floats))

    def _store(self, rows: Sequence[SSAValue], accumulators: Sequence[SSAValue]) -> None:
        w, path = self.w, self.path
        starts = [w.add(llvm.AddOp(w.add(llvm.MulOp(r, self.given["leading"])), self.column)) for r in rows]
        outputs = [w.at(self.given["output"], start, f32) for start in starts]
        over = w.spread(w.load(self.given["over"], f32), path.lanes) if self.n.over else None
        bias = w.at(self.given["bias"], self.column, f32)
        for (r, p), value in zip(self.tile, accumulators, strict=True):
            place = p * path.lanes * 4
            if over is not None:
                value = w.add(llvm.FMulOp(value, over))
            if self.n.bias:
                value = w.add(llvm.FAddOp(value, w.load(self._offset(bias, place), self.floats)))
            w.store(value, self._offset(outputs[r], place))

    def _zeros(self, kind: VectorType) -> SSAValue:
        zero: Attribute = _dense([0 if kind.element_type == i32 else 0.0] * kind.get_shape()[0], kind)
        return self.w.add(llvm.ConstantOp(zero, kind))

    def _splat(self, value: float, element: Attribute) -> SSAValue:
        kind = VectorType(element, [self.path.lanes])
        return self.w.add(llvm.ConstantOp(_dense([value] * self.path.lanes, kind), kind))


def _dense(values: Sequence[int] | Sequence[float], kind: VectorType) -> DenseIntOrFPElementsAttr:
    return DenseIntOrFPElementsAttr.from_list(kind, values)  # pyright: ignore[reportArgumentType, reportCallIssue]
