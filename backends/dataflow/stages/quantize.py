"""Fixed-point numbers into blocks: the largest magnitude gives the scale, then every element is rounded."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

from ....dialects.integer import Point
from ..arithmetic import leading_zeros, requantized, saturated, shifted_by
from ..codes import E8M0, ElementCode, OperandCode
from ..rtl import Module, Signal, address_bits, join
from ._schedule import Schedule, bank, in_turns
from ._stream import Banks, Pipe, Stage, StreamModule, banked_cycles

SCALE_RULES = ("floor", "even", "ceil", "rceil")


@dataclass(frozen=True)
class Quantize(Stage):
    """Rows of `size` numbers, one a beat, into blocks of an operand's format: `lanes` elements a beat.

    A row's last beat that is not full is filled up with zeros. `rule` chooses the power of two, as in
    `dialects/formats/_scale`.
    """

    given: Point
    code: OperandCode
    lanes: int
    rows: int
    size: int
    rule: str = "floor"
    rounding: str = "rne"

    @property
    def block(self) -> int:
        """Elements under one scale, at most a whole row; a format without scales takes beats as they come."""
        if self.code.block is not None:
            return self.code.block
        return -(-self.size // self.lanes) * self.lanes if self.code.scale else self.lanes

    @property
    def blocks(self) -> int:
        return -(-self.size // self.block)

    @property
    def last_block(self) -> int:
        """Elements of a row's last block, zeros that fill its last beat included."""
        rest = self.size - (self.blocks - 1) * self.block
        return -(-rest // self.lanes) * self.lanes

    @property
    def inputs(self) -> dict[str, int]:
        return {"in": self.given.width}

    @property
    def outputs(self) -> dict[str, int]:
        return {"out": self.lanes * self.code.code_bits + self.code.side_bits}

    @property
    def beats(self) -> dict[str, int]:
        return {"in": self.rows * self.size, "out": self.rows * -(-self.size // self.lanes)}

    @property
    def cycles(self) -> int:
        written = self.size - (self.blocks - 1) * self.block
        row = [(self.block, self.block)] * (self.blocks - 1) + [(written, self.last_block)]
        return ceil(self.rows * banked_cycles(row))

    @property
    def schedule(self) -> Schedule:
        lanes, last = (
            self.lanes,
            bank("in", self.size - (self.blocks - 1) * self.block, self.last_block, every=self.lanes),
        )
        whole = bank("in", self.block, self.block, every=lanes, repeat=self.blocks - 1)
        return in_turns(3, *((whole, last) if self.blocks > 1 else (last,)))

    def module(self, name: str) -> Module:
        return _Builder(self, self.start(name)).build()


class _Builder:
    def __init__(self, stage: Quantize, module: StreamModule) -> None:
        self.stage, self.module = stage, module
        self.element = stage.code.elements[0]

    def build(self) -> Module:
        stage, module = self.stage, self.module
        pipe = Pipe(module, "out")
        rows = _Blocks(module, stage)
        go = rows.available & pipe.enable
        index, last = self._elements(go)
        valid = pipe.flag(rows.available)
        word = rows.read(index, pipe.enable)
        present = pipe.step(rows.holds(index))
        number = present.repeated(word.width) & word
        position = pipe.step(rows.position) if stage.code.scale else None
        rows.release(go & last, pipe.enable, valid)
        code = pipe.step(self._rounded(number, position))
        valid = pipe.flag(valid)
        side = None
        if position is not None:
            side = pipe.step(self._scale(position, pipe.step(rows.empty)))
        return self._packed(pipe, rows.ready, valid, code, side)

    def _elements(self, go: Signal) -> tuple[Signal, Signal]:
        """(the element that is read; whether it is its block's last)."""
        stage, module = self.stage, self.module
        if stage.last_block == stage.block:
            return module.counter(stage.block, go, "element")
        index = module.register(address_bits(stage.block), "element")
        last = module.wire(1)
        _, in_last = module.counter(stage.blocks, go & last.q, "block")
        last.set(index.q.equals(stage.block - 1) | (in_last & index.q.equals(stage.last_block - 1)))
        index.set(last.q.then(0, index.q + 1), go)
        return index.q, last.q

    def _rounded(self, number: Signal, position: Signal | None) -> Signal:
        """An element's code."""
        stage, element = self.stage, self.element
        if position is None:
            return requantized(number, stage.given.fraction, Point(element.bits, -element.unit), stage.rounding)
        if element.is_fixed:
            largest = (1 << (element.bits - 1)) - 1
            lift = -element.unit + _largest_exponent(element)
            width = position.width + 2 + lift.bit_length()
            places = position.unsigned(width) - lift
            found = saturated(shifted_by(number, places, -lift, stage.given.width, stage.rounding), element.bits)
            return found.equals(-largest - 1).then(-largest, found)
        return self._minifloat(number, position)

    def _minifloat(self, number: Signal, position: Signal) -> Signal:
        """Sign, exponent and mantissa: the highest bit finds the exponent; below the lowest, digits are shifted out."""
        stage, element = self.stage, self.element
        module, given = self.module, stage.given
        magnitude = number.sign.then(-number, number)
        normal, zeros = leading_zeros(magnitude)
        bias = 1 - element.mantissa_bits - element.unit
        width = max(zeros.width, position.width, (bias + _largest_exponent(element)).bit_length()) + 3
        own = module.constant(given.width - 1, width) - zeros.unsigned(width)
        field = own - position.unsigned(width) + (_largest_exponent(element) + bias)
        deep = field.less_signed(1)
        most = element.mantissa_bits + 2
        under = module.constant(1, width) - field
        down = deep.then(under.more_signed(most).then(most, under), 0).low(most.bit_length())
        digits = normal.unsigned(given.width + 1)
        places = given.width - 1 - element.mantissa_bits
        if places < 0:
            digits = join(digits, module.constant(0, -places))
            places = 0
        amount = down.unsigned(most.bit_length() + places.bit_length() + 1) + places
        kept = shifted_by(digits, join(module.constant(0, 1), amount), places, places + most, stage.rounding)
        held = deep.then(1, field) - 1
        total = join(held.low(element.exponent_bits + 1), module.constant(0, element.mantissa_bits))
        room = max(total.width, kept.width) + 1
        total = total.unsigned(room) + kept.unsigned(room).low(room)
        top = element.largest_code
        code = magnitude.equals(0).then(0, module.constant(top, room).less(total).then(top, total))
        return join(number.sign, code.low(element.bits - 1))

    def _scale(self, position: Signal, empty: Signal) -> Signal:
        """The scale's byte: the exponent of the highest bit, less the element's own."""
        offset = 127 - self.stage.given.fraction - _largest_exponent(self.element)
        return empty.then(0, position.unsigned(E8M0.bits) + offset)

    def _packed(self, pipe: Pipe, ready: Signal, valid: Signal, code: Signal, side: Signal | None) -> Module:
        """Codes gathered into beats."""
        stage, module = self.stage, self.module
        bits = stage.code.code_bits
        _, full = module.counter(stage.lanes, valid & pipe.enable, "lane")
        if stage.lanes > 1:
            held = module.register((stage.lanes - 1) * bits, "gathered", initial=None)
            data = join(code, held.q)
            held.set(data.bits(bits, held.q.width), valid & pipe.enable)
        else:
            data = code
        if side is not None:
            data = join(side, data)
        return module.close({"in": ready}, {"out": pipe.end(valid & full, data)})


class _Blocks(Banks):
    """Blocks of a row in two banks; the last of a row may be shorter. Keeps where the largest magnitude stands."""

    def __init__(self, module: StreamModule, stage: Quantize) -> None:
        self._stage = stage
        super().__init__(module, "in", stage.block, row=stage.size)
        self._count = self.kept(self.place) if stage.size % stage.block else None
        if stage.code.scale:
            self._measure()

    def holds(self, index: Signal) -> Signal:
        """Whether an element was given: what follows a row's end is zero."""
        if self._count is None:
            return self.module.constant(1, 1)
        return ~self._count.less(index)

    def _measure(self) -> None:
        """Keep the bit position that the scale is made of, and whether all numbers are zero."""
        stage, module = self._stage, self.module
        number = module[self.stream]
        magnitude = number.sign.then(-number, number)
        largest = module.register(magnitude.width, "largest")
        seen = largest.q
        now = seen.less(magnitude).then(magnitude, seen)
        largest.set(self.last_place.then(0, now), self.writing)
        normal, zeros = leading_zeros(now)
        width = address_bits(magnitude.width + 1)
        place = module.constant(magnitude.width - 1, width) - zeros.unsigned(width).low(width)
        element = stage.code.elements[0]
        position = place + _raised(stage.rule, element, normal).unsigned(width)
        self.position = self.kept(now.equals(0).then(0, position))
        self.empty = self.kept(now.equals(0))


def _raised(rule: str, element: ElementCode, normal: Signal) -> Signal:
    """Whether the rule takes the next power of two; `normal` has the largest magnitude's highest bit on top."""
    match rule:
        case "floor":
            return normal.module.constant(0, 1)
        case "ceil":
            return normal.low(normal.width - 1).any()
        case "even":
            digits = (element.bits - 2 if element.is_fixed else element.mantissa_bits) + 2
            return normal.top(digits).equals(-1) if digits <= normal.width else normal.module.constant(0, 1)
        case "rceil":
            top = _largest_mantissa(element, normal.width)
            return normal.module.constant(top, normal.width).less(normal)
    raise ValueError(f"no circuit for the scale rule {rule}")


def _largest_mantissa(element: ElementCode, width: int) -> int:
    """The largest value's digits, its highest bit on top of `width`, what does not fit left out."""
    largest = (1 << (element.bits - 1)) - 1 if element.is_fixed else element.largest
    return (largest << width) >> largest.bit_length()


def _largest_exponent(element: ElementCode) -> int:
    """emax: floor(log2) of the largest value; fixed-point blocks leave the most negative code out."""
    largest = (1 << (element.bits - 1)) - 1 if element.is_fixed else element.largest
    return largest.bit_length() - 1 + element.unit
