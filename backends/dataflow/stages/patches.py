"""A line buffer: the numbers under a sliding window, from a picture that comes pixel by pixel."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from math import ceil

from ..rtl import Module, Signal, address_bits
from ._schedule import Schedule, Turn
from ._stream import Pipe, Stage, StreamModule


@dataclass(frozen=True)
class Sliding:
    """A window of `kernel` taps, `dilation` apart, along `size` places with `padding` more on both sides."""

    size: int
    kernel: int
    stride: int = 1
    padding: int = 0
    dilation: int = 1

    @property
    def span(self) -> int:
        """Places from the first tap to the last."""
        return self.dilation * (self.kernel - 1) + 1

    @property
    def positions(self) -> int:
        return (self.size + 2 * self.padding - self.span) // self.stride + 1

    def first(self, position: int) -> int:
        """How many places lie before the window."""
        return min(max(position * self.stride - self.padding, 0), self.size)

    def end(self, position: int) -> int:
        """How many places lie before the window's end, and before the next window.

        The last window waits for all there are, and the first, even where it sees none, for one: what follows a picture
        is another only when that comes.
        """
        if position == self.positions - 1:
            return self.size
        reach = position * self.stride - self.padding + max(self.span, self.stride)
        return min(max(reach, 1), self.size)


@dataclass(frozen=True)
class Patches(Stage):
    """Windows over `runs` pictures whose numbers come in the order (line, column, channel).

    For every position come `lines.kernel` x `columns.kernel` x `channels` numbers: tap by tap, the channels of each
    side by side, or channel by channel (`by_channel`). Beside the picture stands `fill`. Lines are kept in a ring, and
    given back as soon as no later window sees them.
    """

    width: int
    channels: int
    lines: Sliding
    columns: Sliding
    runs: int = 1
    by_channel: bool = False
    fill: int = 0

    @property
    def inputs(self) -> dict[str, int]:
        return {"in": self.width}

    @property
    def outputs(self) -> dict[str, int]:
        return {"out": self.width}

    @property
    def line(self) -> int:
        """Words of a line."""
        return self.columns.size * self.channels

    @property
    def steps(self) -> int:
        """Numbers of all windows along a line."""
        return self.columns.positions * self.lines.kernel * self.columns.kernel * self.channels

    @property
    def beats(self) -> dict[str, int]:
        positions = self.runs * self.lines.positions
        return {"in": self.runs * self.lines.size * self.line, "out": positions * self.steps}

    @cached_property
    def kept(self) -> int:
        """Lines of the ring: those that a row of windows sees, and those that come meanwhile for the next row."""
        lines, last = self.lines, self.lines.positions - 1
        ahead = [lines.end(row + 1) - lines.first(row) for row in range(last)]
        return max(lines.span, lines.size + lines.end(0) - lines.first(last), *ahead)

    @property
    def needs(self) -> list[int]:
        """For each row of windows how many lines it needs behind those that were given back before it."""
        return [self.lines.end(row) - self.lines.first(row) for row in range(self.lines.positions)]

    @property
    def frees(self) -> list[int]:
        """How many lines each row of windows gives back."""
        starts = [self.lines.first(row) for row in range(self.lines.positions)]
        return [after - start for start, after in zip(starts, [*starts[1:], self.lines.size], strict=True)]

    @property
    def schedule(self) -> Schedule:
        ends = [0, *(self.lines.end(row) for row in range(self.lines.positions))]
        turns = [
            Turn({"in": self.line}, ("in",), self.steps, banks=ends[row + 1] - ends[row], returned=free)
            for row, free in enumerate(self.frees)
        ]
        return Schedule(3, tuple(turns), kept=self.kept, held=_HELD)

    @property
    def cycles(self) -> int:
        return ceil(self.runs * self.period)

    @cached_property
    def period(self) -> float:
        """Cycles of a picture: a row of windows begins once its lines are there, a line comes once it has room."""
        full, free = list[int](), list[int]()
        time, base, ends = 0, 0, list[int]()
        for _ in range(2 * _REPEATS):
            for row, (need, amount) in enumerate(zip(self.needs, self.frees, strict=True)):
                while len(full) < base + self.lines.first(row) + need:
                    room = free[len(full) - self.kept] if len(full) >= self.kept else 0
                    full.append(max(room, full[-1] if full else 0) + self.line)
                time = max([time, *full[base + self.lines.first(row) + need - 1 :][:1]]) + self.steps
                free += [time + _HELD] * amount
            base += self.lines.size
            ends.append(time)
        return (ends[-1] - ends[_REPEATS - 1]) / _REPEATS

    def module(self, name: str) -> Module:
        return _Builder(self, self.start(name)).build()


_HELD = 2
"""Cycles from a row's last step until its lines can be written over."""
_REPEATS = 8


class _Builder:
    def __init__(self, stage: Patches, module: StreamModule) -> None:
        self.stage, self.module = stage, module
        self.pipe = Pipe(module, "out")
        self.words = stage.kept * stage.line
        self.bits = address_bits(self.words)

    def build(self) -> Module:
        stage, module, pipe = self.stage, self.module, self.pipe
        count = stage.kept.bit_length()
        # Lines that are kept, and those of them that rows still to come may see.
        held, present = module.register(count, "held"), module.register(count, "present")
        ready = held.q.differs(stage.kept)
        writing = ready & module.valid("in")
        _, line_ends = module.counter(stage.line, writing, "write_place")
        write, _ = module.counter(self.words, writing, "write")
        go = module.wire(1)
        address, inside, row, issued = self._walk(go.q)
        runs = present.q.at_least(module.table(row, stage.needs, count))
        go.set(runs & pipe.enable)
        amount = issued.then(module.table(row, stage.frees, count), 0)
        come = (writing & line_ends).unsigned(count)
        present.set(present.q + come - amount)
        returned = pipe.flag(pipe.flag(amount))
        held.set(held.q + come - pipe.enable.then(returned, 0))
        word = module.held_read(self.words, address, pipe.enable, write=write, data=module["in"], enable=writing)
        valid = pipe.flag(pipe.flag(runs))
        data = pipe.step(inside).then(word, stage.fill)
        return module.close({"in": ready}, {"out": pipe.end(valid, data)})

    def _walk(self, go: Signal) -> tuple[Signal, Signal, Signal, Signal]:
        """A number for each step: (its address, whether it lies in the picture, its row of windows, whether that ends).

        The first two come a step later.
        """
        stage, module, step = self.stage, self.module, self.pipe.step
        taps = {"line_tap": stage.lines.kernel, "column_tap": stage.columns.kernel, "channel": stage.channels}
        order = ["channel", "line_tap", "column_tap"] if stage.by_channel else list(taps)
        sizes = taps | {"column": stage.columns.positions}
        moves, ends, places = go, dict[str, tuple[Signal, Signal]](), dict[str, Signal]()
        for name in reversed(["column", *order]):
            places[name], last = module.counter(sizes[name], moves, name)
            ends[name] = moves, last
            moves = moves & last
        row, last_row = module.counter(stage.lines.positions, moves, "row")
        line, in_lines = self._line(ends["line_tap"], (moves, last_row))
        column, in_columns = self._column(ends["column_tap"], ends["column"])
        inside = step(in_lines & in_columns)
        column = column + self._fitted(places["channel"])
        return inside.repeated(self.bits) & (step(line) + step(column)), inside, row, moves

    def _line(self, tap: tuple[Signal, Signal], row: tuple[Signal, Signal]) -> tuple[Signal, Signal]:
        """(where the line of a tap begins in the ring, whether it is one of the picture)."""
        stage, module, lines = self.stage, self.module, self.stage.lines
        at = self._sum(lines, 1, tap, row)
        # The ring goes on from picture to picture: the step to the next one is what is left of this one.
        onward, over = (
            module.constant(places % stage.kept * stage.line, self.bits)
            for places in (lines.stride, lines.size - (lines.positions - 1) * lines.stride)
        )
        begin = -lines.padding % stage.kept * stage.line
        base = module.register(self.bits, "ring_row", initial=begin)
        base.set(self._around(base.q, row[1].then(over, onward)), row[0])
        return self._around(base.q, self._offset(lines.dilation * stage.line, self.bits, *tap)), self._inside(
            lines, 1, at
        )

    def _column(self, tap: tuple[Signal, Signal], column: tuple[Signal, Signal]) -> tuple[Signal, Signal]:
        """(where the column of a tap begins in its line, whether it is one of the picture)."""
        columns, channels = self.stage.columns, self.stage.channels
        at = self._sum(columns, channels, tap, column)
        return self._fitted(at) - columns.padding * channels, self._inside(columns, channels, at)

    def _sum(self, along: Sliding, unit: int, tap: tuple[Signal, Signal], position: tuple[Signal, Signal]) -> Signal:
        """Words from the first place of the padding to a tap, `unit` for each place."""
        width = ((along.size + 2 * along.padding) * unit).bit_length()
        start = self._offset(along.stride * unit, width, *position)
        return start + self._offset(along.dilation * unit, width, *tap)

    def _inside(self, along: Sliding, unit: int, at: Signal) -> Signal:
        """Whether a place is one of the picture, and not of what stands beside it."""
        if not along.padding:
            return self.module.constant(1, 1)
        return at.at_least(along.padding * unit) & at.less((along.padding + along.size) * unit)

    def _offset(self, step: int, width: int, moves: Signal, last: Signal) -> Signal:
        """`step` times the place of a counter that moves with `moves` and is at its `last` place."""
        register = self.module.register(width)
        return register.set(last.then(0, register.q + step % (1 << width)), moves)

    def _around(self, place: Signal, step: Signal) -> Signal:
        """A place of the ring so many words on, both less than the ring is long."""
        total = place.unsigned(self.bits + 1) + step.unsigned(self.bits + 1)
        beyond = total.at_least(self.words)
        return beyond.then(total - self.words, total).low(self.bits)

    def _fitted(self, number: Signal) -> Signal:
        """A number in as many bits as an address, which hold it wherever it counts."""
        return number.low(self.bits) if number.width > self.bits else number.unsigned(self.bits)
