"""Rows cut into blocks: what quantizers have in common, and the banks in which a block waits for its scale."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from math import ceil

from ....dialects.integer import Point
from ..arithmetic import leading_zeros
from ..codes import ElementCode, OperandCode
from ..rtl import Signal, address_bits, join
from ._rounding import raised
from ._schedule import Schedule, bank, in_turns
from ._stream import Banks, Stage, StreamModule, banked_cycles


@dataclass(frozen=True)
class BlockStage(Stage):
    """Rows of `size` numbers, one a beat, into blocks of an operand's format: `lanes` elements a beat.

    A row's last beat that is not full is filled up with zeros.
    """

    given: Point
    code: OperandCode
    lanes: int
    rows: int
    size: int

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
    @abstractmethod
    def delay(self) -> int:
        """Cycles from the step in which a beat's last element is read to the beat."""

    @property
    def schedule(self) -> Schedule:
        written = self.size - (self.blocks - 1) * self.block
        last = bank("in", written, self.last_block, every=self.lanes)
        whole = bank("in", self.block, self.block, every=self.lanes, repeat=self.blocks - 1)
        return in_turns(self.delay, *((whole, last) if self.blocks > 1 else (last,)))


class Blocks(Banks):
    """Blocks of a row in two banks, the last of which may be shorter; knows where the largest magnitude stands."""

    def __init__(self, module: StreamModule, stage: BlockStage) -> None:
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

    def elements(self, go: Signal) -> tuple[Signal, Signal]:
        """(the element that is read, one more where `go` is 1; whether it is its block's last)."""
        stage, module = self._stage, self.module
        if stage.last_block == stage.block:
            return module.counter(stage.block, go, "element")
        index = module.register(address_bits(stage.block), "element")
        last = module.wire(1)
        _, in_last = module.counter(stage.blocks, go & last.q, "block")
        last.set(index.q.equals(stage.block - 1) | (in_last & index.q.equals(stage.last_block - 1)))
        index.set(last.q.then(0, index.q + 1), go)
        return index.q, last.q

    def _measure(self) -> None:
        """Find where the highest bit of the largest magnitude stands, and whether all numbers are zero."""
        module = self.module
        number = module[self.stream]
        magnitude = number.sign.then(-number, number)
        largest = module.register(magnitude.width, "largest")
        seen = largest.q
        now = seen.less(magnitude).then(magnitude, seen)
        largest.set(self.last_place.then(0, now), self.writing)
        self._now = now
        self._normal, zeros = leading_zeros(now)
        width = address_bits(magnitude.width + 1)
        self._highest = module.constant(magnitude.width - 1, width) - zeros.unsigned(width).low(width)
        self._zero = now.equals(0)
        self.empty = self.kept(self._zero)

    def largest(self) -> Signal:
        """The largest magnitude, unsigned."""
        return self.kept(self._now)

    def highest(self) -> Signal:
        """Where the highest bit of the largest magnitude stands; 0 for a block of zeros."""
        return self.kept(self._zero.then(0, self._highest))

    def raised(self, rule: str, element: ElementCode) -> Signal:
        """Whether the rule takes the next power of two for the scale."""
        return self.kept(raised(rule, element, self._normal))

    def position(self, rule: str, element: ElementCode) -> Signal:
        """What the scale is made of: where the highest bit stands, as the rule moves it; 0 for a block of zeros."""
        position = self._highest + raised(rule, element, self._normal).unsigned(self._highest.width)
        return self.kept(self._zero.then(0, position))


def gathered(module: StreamModule, code: Signal, lanes: int, enable: Signal) -> Signal:
    """The last `lanes` codes, the first lowest: this one, and those that stood here where `enable` was 1."""
    if lanes == 1:
        return code
    held = module.register((lanes - 1) * code.width, "gathered", initial=None)
    data = join(code, held.q)
    held.set(data.bits(code.width, held.q.width), enable)
    return data
