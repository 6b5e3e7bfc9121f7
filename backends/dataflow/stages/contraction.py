"""Products of rows with a matrix: weights that are loaded once, or rows of a second stream that change.

Where weights come from outside they are the rows that pass (`a`), and what is computed stands in the banks (`b`): the
weights come once for all rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from math import ceil

from ....dialects.errors import MxloomError
from ....dialects.integer import Point
from ..dot_product import DotProduct
from ..rtl import Module, Register, Signal, Wire, address_bits, join
from ._schedule import Schedule, Turn, bank
from ._stream import Banks, Memory, Pipe, Stage, StreamModule, banked_cycles


@dataclass(frozen=True)
class Contraction(Stage):
    """Rows of a (stream `a`) times rows of b: `rows` x `size` times `columns` x `size` -> `rows` x `columns`.

    A beat of a stream of blocks holds `lanes` elements and what stands beside their block. b is loaded once (weights),
    or comes as the stream `b` (`dynamic`), `columns` rows for every `rows` of a; a bias then belongs to a row of a, and
    is loaded. `copies` units work on as many rows of b at once. One run is `runs` such products.
    """

    unit: DotProduct
    rows: int
    columns: int
    size: int
    result: Point
    copies: int = 1
    dynamic: bool = False
    runs: int = 1

    @property
    def steps(self) -> int:
        """Beats of one row: a last block that is not full ends with the row."""
        return -(-self.size // self.unit.lanes)

    @property
    def groups(self) -> int:
        """How often a row of a is read: each time for `copies` rows of b."""
        return -(-self.columns // self.copies)

    @property
    def per_segment(self) -> int:
        return self.unit.segment // self.unit.lanes

    @property
    def segments(self) -> int:
        """Segments of a row; the last may be shorter than the others."""
        return -(-self.steps // self.per_segment)

    @property
    def pauses(self) -> tuple[int, int]:
        """Cycles without a beat before a segment that follows another, and before the last: an accumulator's pace."""
        pace, last = self.unit.accumulator.segment_cycles, self.steps - (self.segments - 1) * self.per_segment
        return pace(self.per_segment) - self.per_segment, pace(last) - last

    @property
    def row_cycles(self) -> int:
        """Cycles of a row of a with a row of b."""
        between, last = self.pauses
        return self.steps + (0 if self.segments == 1 else (self.segments - 2) * between + last)

    @property
    def inputs(self) -> dict[str, int]:
        found = {"a": self.unit.lanes * self.unit.a.code_bits + self.unit.a.side_bits}
        if self.dynamic:
            found["b"] = self.unit.lanes * self.unit.b.code_bits + self.unit.b.side_bits
        return found

    @property
    def outputs(self) -> dict[str, int]:
        return {"out": self.result.width}

    @property
    def beats(self) -> dict[str, int]:
        found = {"a": self.runs * self.rows * self.steps, "out": self.runs * self.rows * self.columns}
        return {**found, "b": self.runs * self.columns * self.steps} if self.dynamic else found

    @property
    def cycles(self) -> int:
        """N x K / (lanes x copies) for each row, unless the accumulator, the stream of results or a bank is slower."""
        row = max(self.groups * self.row_cycles, self.columns)
        if not self.dynamic:
            return ceil(self.rows * self.runs * banked_cycles([(self.steps, row)]))
        matrix = (self.columns * self.steps, ceil(self.rows * banked_cycles([(self.steps, row)])))
        return ceil(self.runs * banked_cycles([matrix]))

    @property
    def schedule(self) -> Schedule:
        steps, every, read = self.steps, self.row_cycles, self.groups * self.row_cycles
        shared = None if self.copies == 1 else (self.copies, self.columns)
        delay = 2 + self.unit.latency - (self.copies > 1)
        if not self.dynamic:
            return Schedule(delay, (bank("a", steps, read, every=every),), shared=shared)
        both = {"a": steps, "b": self.columns * steps}
        if self.rows == 1:
            return Schedule(delay, (Turn(both, ("a", "b"), read, every),), shared=shared)
        first, last = Turn(both, ("a",), read, every), Turn({"a": steps}, ("a", "b"), read, every)
        between = bank("a", steps, read, every=every, repeat=self.rows - 2)
        return Schedule(delay, (first, between, last) if between.repeat else (first, last), shared=shared)

    @property
    def memories(self) -> tuple[Memory, ...]:
        """Codes, what stands beside them, and biases, of each copy in turn; of a dynamic product the biases alone."""
        if self.dynamic:
            return (Memory(self.rows, self.unit.bias.width),) if self.unit.bias else ()
        words = [Memory(self.groups * self.steps, self.unit.lanes * self.unit.b.code_bits)]
        if self.unit.b.side_bits:
            words.append(Memory(self.groups * self.side_words, self.unit.b.side_bits))
        if self.unit.bias:
            words.append(Memory(self.groups, self.unit.bias.width))
        return tuple(words * self.copies)

    @cached_property
    def side_words(self) -> int:
        """Words of scales of one row of weights: one where a scale holds for all of it."""
        return -(-self.steps // self.side_steps)

    @property
    def side_steps(self) -> int:
        """Beats of a row of weights that have one scale."""
        return self.steps if self.unit.b.block is None else self.unit.b.block // self.unit.lanes

    def module(self, name: str) -> Module:
        return _Builder(self, self.start(name), f"{name}_dot").build()


class _Builder:
    def __init__(self, stage: Contraction, module: StreamModule, unit_name: str) -> None:
        self.stage, self.module = stage, module
        self.unit = stage.unit.module(unit_name)
        self.pipe = Pipe(module, "out")
        self.waits: Register | None = None

    def build(self) -> Module:
        stage, module, pipe = self.stage, self.module, self.pipe
        # Copies give their results together and a serialiser sends them one by one: it may hold the units up.
        moves = module.wire(1)
        self.moves = moves.q
        a = Banks(module, "a", stage.steps)
        b = Banks(module, "b", stage.columns * stage.steps) if stage.dynamic else None
        available = a.available & b.available if b else a.available
        goes = self._goes(available)
        go = self.moves & goes
        step, last_step = module.counter(stage.steps, go, "step")
        row_end = go & last_step
        segment_last = self._ends(stage.per_segment, go, last_step, "in_segment")
        self._pause(go & segment_last & ~last_step, step)
        _, last_group = module.counter(stage.groups, row_end, "group")
        issued = row_end & last_group
        valid = module.delayed(goes, self.moves, initial=0)
        word = a.read(step, self.moves)
        a.release(issued, self.moves, valid)
        if b:
            row, last_row = module.counter(stage.rows, issued, "row")
            operands = self._dynamic(b, go)
            if stage.unit.bias:
                (biases,) = module.loaded(stage.memories)
                bias = biases.read(module, row, self.moves)
                operands = [{**operand, "bias": bias} for operand in operands]
            b.release(issued & last_row, self.moves, valid)
        else:
            operands = self._loaded(go, last_step)
        codes = stage.unit.lanes * stage.unit.a.code_bits
        common = {
            "enable": self.moves,
            "valid": valid,
            "segment_last": module.delayed(segment_last, self.moves),
            "last": module.delayed(last_step, self.moves),
            "a": word.low(codes),
        }
        if stage.unit.a.side_bits:
            common["a_side"] = word.bits(codes, stage.unit.a.side_bits)
        results = [
            module.instance(self.unit, f"unit{index}", {**common, **operand}) for index, operand in enumerate(operands)
        ]
        totals = [stage.unit.accumulator.result(result["total"], stage.result) for result in results]
        done = results[0]["done"]
        if stage.copies == 1:
            moves.set(pipe.enable)
            out = pipe.end(done, totals[0])
        else:
            out = self._serial(done, totals, moves)
        ready = {"a": a.ready, **({"b": b.ready} if b else {})}
        return module.close(ready, {"out": out})

    def _goes(self, available: Signal) -> Signal:
        """Whether a beat goes into the units: there is one, and the accumulator does not pause."""
        longest = max(self.stage.pauses) if self.stage.segments > 1 else 0
        if not longest:
            return available
        self.waits = self.module.register(longest.bit_length(), "waits")
        return available & self.waits.q.equals(0)

    def _pause(self, ends: Signal, step: Signal) -> None:
        """Begin a pause behind a segment; it goes on with the units."""
        stage, waits = self.stage, self.waits
        if waits is None:
            return
        between, last = stage.pauses
        is_last = step.equals((stage.segments - 1) * stage.per_segment - 1)
        pause = is_last.then(last, self.module.constant(between, waits.q.width))
        waits.set(ends.then(pause, waits.q.any().then(waits.q - 1, waits.q)), self.moves)

    def _dynamic(self, b: Banks, go: Signal) -> list[dict[str, Signal]]:
        """The words of b's rows, each copy keeping its own, one after the other for every row of a."""
        stage, module = self.stage, self.module
        depth = stage.groups * stage.steps
        place, _ = module.counter(depth, go, "b_read")
        _, row_ends = module.counter(stage.steps, b.writing, "b_step")
        turn, _ = module.counter(stage.copies, b.writing & row_ends, "b_copy")
        if stage.columns % stage.copies:
            raise MxloomError(f"{stage.copies} units do not share {stage.columns} rows evenly")
        codes = stage.unit.lanes * stage.unit.b.code_bits
        found: list[dict[str, Signal]] = []
        for copy in range(stage.copies):
            mine = b.writing & turn.equals(copy) if stage.copies > 1 else b.writing
            write, _ = module.counter(depth, mine, f"b_write{copy}")
            word = b.read_part(depth, place, self.moves, write, mine)
            operand = {"b": word.low(codes)}
            if stage.unit.b.side_bits:
                operand["b_side"] = word.bits(codes, stage.unit.b.side_bits)
            found.append(operand)
        return found

    def _ends(self, count: int, go: Signal, last_step: Signal, name: str) -> Signal:
        """Whether a step is the last of its `count`, or of its row."""
        module, steps = self.module, self.stage.steps
        if count >= steps:
            return last_step
        if steps % count == 0:
            return module.counter(count, go, name)[1]
        place = module.register(address_bits(count), name)
        last = place.q.equals(count - 1) | last_step
        place.set(last.then(0, place.q + 1), go)
        return last

    def _loaded(self, go: Signal, last_step: Signal) -> list[dict[str, Signal]]:
        """The words of the loaded weights, for each copy."""
        stage, module = self.stage, self.module
        memories = iter(module.loaded(stage.memories))
        place, _ = module.counter(stage.groups * stage.steps, go, "b_read")
        side: Signal | None = None
        if stage.unit.b.side_bits:
            last = self._ends(stage.side_steps, go, last_step, "in_block")
            side, _ = module.counter(stage.groups * stage.side_words, go & last, "side_read")
        group, _ = module.counter(stage.groups, go & last_step, "bias_read")
        found: list[dict[str, Signal]] = []
        for _ in range(stage.copies):
            operand = {"b": next(memories).read(module, place, self.moves)}
            if side is not None:
                operand["b_side"] = next(memories).read(module, side, self.moves)
            if stage.unit.bias:
                operand["bias"] = next(memories).read(module, group, self.moves)
            found.append(operand)
        return found

    def _serial(self, done: Signal, totals: list[Signal], moves: Wire) -> tuple[Signal, Signal]:
        """The copies' results one after the other; the units wait while a group is still being sent."""
        stage, module, pipe = self.stage, self.module, self.pipe
        count = stage.copies
        left = module.register((count).bit_length(), "left")
        held = module.register(count * stage.result.width, "results", initial=None)
        sends = pipe.enable
        empty = left.q.equals(0)
        last_one = left.q.equals(1) & sends
        free = empty | last_one
        moves.set(~done | free)
        take = done & free
        _, last_group = module.counter(stage.groups, take, "sent_group")
        rest = stage.columns - (stage.groups - 1) * count
        amount = last_group.then(module.constant(rest, left.q.width), module.constant(count, left.q.width))
        left.set(take.then(amount, (sends & ~empty).then(left.q - 1, left.q)))
        width = stage.result.width
        rest_of = join(module.constant(0, width), held.q.bits(width, (count - 1) * width))
        held.set(take.then(join(*reversed(totals)), (sends & ~empty).then(rest_of, held.q)))
        return pipe.end(~empty, held.q.low(width))
