"""Softmax of rows, masked where positions may not be seen: `dialects.integer.softmax`, bit for bit."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from ....dialects.integer import Exponential, Point, PowerOfTwo, bits_above
from ..arithmetic import product, requantized
from ..rtl import Module, Signal, join
from ._schedule import Schedule, bank, in_turns
from ._serial import quotient
from ._stream import Banks, Pipe, StreamModule, Through


@dataclass(frozen=True)
class Softmax(Through):
    """Rows of `size` scores into probabilities.

    `causal`: row r of every `positions` rows sees columns up to r; `window` of them at most, where it is given.
    """

    given: Point
    result: Point
    rows: int
    size: int
    bits: int
    scale: float = 1.0
    causal: bool = False
    positions: int = 1
    window: int | None = None

    @cached_property
    def exponential(self) -> Exponential:
        return Exponential(self.given.fraction, self.scale, self.bits)

    @property
    def numbers(self) -> int:
        return self.rows * self.size

    @property
    def reciprocal_bits(self) -> int:
        """Bits behind the point of the reciprocal of the sum, and of the quotient's numerator less one."""
        return 2 * PowerOfTwo.FRACTION + bits_above(self.size)

    @property
    def row_overhead(self) -> int:
        """Cycles of a row beside reading it twice."""
        return self.reciprocal_bits + 1 + 8

    @property
    def cycles(self) -> int:
        return self.rows * (2 * self.size + self.row_overhead)

    @property
    def schedule(self) -> Schedule:
        lead = self.size + self.row_overhead - 1
        return in_turns(3, bank("in", self.size, self.size), lead=lead, rests=True)

    def module(self, name: str) -> Module:
        return _Builder(self, self.start(name)).build()


class _Builder:
    def __init__(self, stage: Softmax, module: StreamModule) -> None:
        self.stage, self.module = stage, module
        self.rows = Banks(module, "in", stage.size)

    def build(self) -> Module:
        stage, module, rows = self.stage, self.module, self.rows
        largest = self._largest()
        busy, reads, drains = (module.register(1, name) for name in ("busy", "reads", "drains"))
        start = rows.available & ~busy.q
        place, last = module.counter(stage.size, reads.q, "place")
        reads.set(start | (reads.q & ~last))
        always = module.constant(1, 1)
        score = rows.read(place, always)
        ends = module.delayed(reads.q & last, initial=0)
        row = self._row(busy.q & ends)
        kept = module.delayed(self._keeps(place, row))
        valid = module.delayed(reads.q, initial=0)
        weight, valid, ends, kept, target = self._weights(score, largest, valid, ends, kept, module.delayed(place))
        weight = kept.repeated(weight.width) & weight
        total = module.register(weight.width + bits_above(stage.size), "total")
        now = total.q + weight.unsigned(total.q.width)
        total.set(ends.then(0, now), valid)
        summed = module.delayed(now, valid & ends)
        done, reciprocal = quotient(
            module,
            module.delayed(valid & ends, initial=0),
            module.constant(1 << stage.reciprocal_bits, stage.reciprocal_bits + 1),
            summed,
        )
        pipe = Pipe(module, "out")
        go = drains.q & pipe.enable
        out_place, out_last = module.counter(stage.size, go, "out_place")
        out_valid = pipe.flag(drains.q)
        free = rows.release(go & out_last, pipe.enable, out_valid)
        busy.set(start | (busy.q & ~free))
        drains.set(done | (drains.q & ~(go & out_last)))
        found = module.held_read(stage.size, out_place, pipe.enable, write=target, data=weight, enable=valid)
        more = bits_above(stage.size)
        factor = reciprocal.low(PowerOfTwo.FRACTION + more + 1)
        unsigned = module.constant(0, 1)
        scaled = pipe.step(product(join(unsigned, found), join(unsigned, factor)))
        out = requantized(scaled, stage.reciprocal_bits, stage.result)
        return module.close({"in": rows.ready}, {"out": pipe.end(pipe.flag(out_valid), out)})

    def _row(self, ends: Signal) -> Signal | None:
        """The row's number among `positions`, as it is read."""
        return self.module.counter(self.stage.positions, ends, "row")[0] if self.stage.causal else None

    def _keeps(self, column: Signal, row: Signal | None) -> Signal:
        """Whether a row sees a column."""
        stage, module = self.stage, self.module
        if row is None:
            return module.constant(1, 1)
        seen = None if stage.window is None or stage.window >= stage.size else stage.window
        width = max(column.width, row.width, (seen or 0).bit_length()) + 1
        column, row = column.unsigned(width), row.unsigned(width)
        found = ~row.less(column)
        return found if seen is None else found & row.less(column + seen)

    def _largest(self) -> Signal:
        """The largest score that a row sees, kept with it."""
        stage, module, rows = self.stage, self.module, self.rows
        lowest = -(1 << (stage.given.width - 1))
        seen = module.register(stage.given.width, "largest", initial=lowest)
        number = module["in"]
        keeps = self._keeps(rows.place, self._written_row())
        now = (seen.q.less_signed(number) & keeps).then(number, seen.q)
        seen.set(rows.last_place.then(lowest, now), rows.writing)
        return rows.kept(now)

    def _written_row(self) -> Signal | None:
        if not self.stage.causal:
            return None
        return self.module.counter(self.stage.positions, self.rows.written, "written_row")[0]

    def _weights(
        self, score: Signal, largest: Signal, valid: Signal, ends: Signal, kept: Signal, place: Signal
    ) -> tuple[Signal, Signal, Signal, Signal, Signal]:
        """e to the difference from the largest, three stages later, with what travels beside."""
        stage, module = self.stage, self.module
        exponential, table = stage.exponential, PowerOfTwo(stage.bits)
        points, low = PowerOfTwo.FRACTION, PowerOfTwo.FRACTION - stage.bits

        def step() -> None:
            nonlocal valid, ends, kept, place
            valid, ends = module.delayed(valid, initial=0), module.delayed(ends, initial=0)
            kept, place = module.delayed(kept), module.delayed(place)

        width = score.width + 1
        difference = score.signed(width) - largest.signed(width)
        factor = module.constant(exponential.factor, exponential.factor.bit_length() + 1)
        scaled = product(difference, factor)
        places = exponential.places
        power = scaled.bits(places, scaled.width - places) if places > 0 else scaled
        if places < 0:
            power = join(scaled, module.constant(0, -places))
        power = module.delayed(power.resized(max(power.width, points + 2)))
        step()
        index, rest = power.bits(low, stage.bits), power.low(low)
        base = module.delayed(module.table(index, table.bases, points + 1))
        slope = max(table.steps).bit_length()
        rise = module.delayed(module.table(index, table.steps, slope))
        rest, down = module.delayed(rest), module.delayed(-power.bits(points, power.width - points))
        step()
        grown = rise.unsigned(slope + low) * rest.unsigned(slope + low)
        value = base + grown.bits(low, slope).unsigned(base.width)
        far = down.more_signed(points + 1) if down.width > (points + 1).bit_length() else module.constant(0, 1)
        amount = down.low(min(down.width, (points + 1).bit_length()))
        weight = module.delayed(far.then(0, value.shifted_right(amount)))
        step()
        return weight, valid, ends, kept, place
