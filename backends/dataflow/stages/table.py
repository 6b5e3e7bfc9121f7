"""Functions of one number by tables of straight segments: `dialects.integer.Table`, bit for bit."""

from __future__ import annotations

from dataclasses import dataclass

from ....dialects.integer import CURVES, Point, Table
from ..arithmetic import product, requantized
from ..rtl import Module, Signal, join
from ._schedule import Schedule
from ._stream import Pipe, Stage


@dataclass(frozen=True)
class Activation(Stage):
    """A curve of each of `count` numbers."""

    table: Table
    count: int

    @property
    def inputs(self) -> dict[str, int]:
        return {"in": self.table.given.width}

    @property
    def outputs(self) -> dict[str, int]:
        return {"out": self.table.result.width}

    @property
    def beats(self) -> dict[str, int]:
        return {"in": self.count, "out": self.count}

    @property
    def cycles(self) -> int:
        return self.count

    @property
    def schedule(self) -> Schedule:
        return Schedule(2)

    def module(self, name: str) -> Module:
        table, module = self.table, self.start(name)
        pipe = Pipe(module, "out")
        number, end = module["in"], 1 << (table.reach + table.given.fraction)
        width = max(number.width, end.bit_length() + 1) + 1
        wide = number.signed(width)
        below, above = wide.less_signed(-end), ~wide.less_signed(end)
        place = (wide + end).low(table.index_bits + table.low_bits)
        index = place.top(table.index_bits)
        base_bits = max(max(table.bases).bit_length(), (-min(table.bases)).bit_length()) + 1
        slope_bits = max(max(table.slopes).bit_length(), (-min(table.slopes)).bit_length()) + 1
        base = pipe.step(module.table(index, table.bases, base_bits))
        slope = pipe.step(module.table(index, table.slopes, slope_bits))
        rest = pipe.step(join(module.constant(0, 1), place.low(table.low_bits))) if table.low_bits else None
        below, above, number = pipe.step(below), pipe.step(above), pipe.step(number)
        inside = self._inside(base, slope, rest)
        found = requantized(inside, table.fraction, table.result)
        found = below.then(self._constant(module, CURVES[table.curve].below), found)
        highest = CURVES[table.curve].above
        if highest is None:
            beyond = requantized(number, table.given.fraction, table.result)
        else:
            beyond = self._constant(module, highest)
        out = pipe.end(pipe.flag(module.valid("in")), above.then(beyond, found))
        return module.close({"in": pipe.enable}, {"out": out})

    def _inside(self, base: Signal, slope: Signal, rest: Signal | None) -> Signal:
        table = self.table
        lift = table.fraction - table.base_fraction
        lifted = join(base, base.module.constant(0, lift)) if lift else base
        if rest is None:
            return lifted
        rise = product(slope, rest)
        width = max(lifted.width, rise.width) + 1
        return lifted.signed(width) + rise.signed(width)

    def _constant(self, module: Module, number: int) -> Signal:
        point: Point = self.table.result
        top = (1 << (point.width - 1)) - 1
        return module.constant(max(-top - 1, min(top, number << point.fraction)), point.width)
