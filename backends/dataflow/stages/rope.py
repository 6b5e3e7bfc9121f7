"""Rotary position embedding of rows: input x cos + rotate_half(input) x sin, exact, then rounded once."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

from ....dialects.integer import Point
from ..arithmetic import product, requantized
from ..rtl import Module
from ._schedule import Schedule, bank, in_turns
from ._stream import Banks, Memory, Pipe, Through, banked_cycles


@dataclass(frozen=True)
class Rope(Through):
    """Rows of `size` numbers; row r turns by the angles of position r mod `positions`.

    The loaded memory holds cos, and sin above it, for every position and place.
    """

    given: Point
    result: Point
    table: Point
    rows: int
    size: int
    positions: int

    @property
    def numbers(self) -> int:
        return self.rows * self.size

    @property
    def memories(self) -> tuple[Memory, ...]:
        return (Memory(self.positions * self.size, 2 * self.table.width),)

    @property
    def cycles(self) -> int:
        return ceil(self.rows * banked_cycles([(self.size, self.size)]))

    @property
    def schedule(self) -> Schedule:
        return in_turns(3, bank("in", self.size, self.size))

    def module(self, name: str) -> Module:
        module = self.start(name)
        pipe, rows = Pipe(module, "out"), Banks(module, "in", self.size)
        go = rows.available & pipe.enable
        place, last = module.counter(self.size, go, "place")
        angle, _ = module.counter(self.positions * self.size, go, "angle")
        valid = pipe.flag(rows.available)
        half = self.size // 2
        wide = place.unsigned(self.size.bit_length() + 1)
        first = wide.less(half)
        partner = first.then(wide + half, wide - half).low(place.width)
        number, other = rows.read(place, pipe.enable), rows.read(partner, pipe.enable)
        rows.release(go & last, pipe.enable, valid)
        (memory,) = module.loaded(self.memories)
        word = memory.read(module, angle, pipe.enable)
        straight = pipe.step(product(number, word.low(self.table.width)))
        turned = pipe.step(product(other, word.top(self.table.width)))
        negative = pipe.step(pipe.step(first))
        width = straight.width + 1
        straight, turned = straight.signed(width), turned.signed(width)
        total = negative.then(straight - turned, straight + turned)
        found = requantized(total, self.given.fraction + self.table.fraction, self.result)
        return module.close({"in": rows.ready}, {"out": pipe.end(pipe.flag(valid), found)})
