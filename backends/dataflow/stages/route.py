"""Streams that fork, wait, or come in another order."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, prod

from ..rtl import Module, Signal, address_bits, all_of, any_of
from ._schedule import Schedule, bank, in_turns
from ._stream import Banks, Pipe, Stage, banked_cycles


@dataclass(frozen=True)
class Fork(Stage):
    """Every beat goes to `ways` streams, each of which takes it when it can."""

    width: int
    ways: int
    count: int

    @property
    def inputs(self) -> dict[str, int]:
        return {"in": self.width}

    @property
    def outputs(self) -> dict[str, int]:
        return {f"out{index}": self.width for index in range(self.ways)}

    @property
    def beats(self) -> dict[str, int]:
        return dict.fromkeys(("in", *self.outputs), self.count)

    @property
    def cycles(self) -> int:
        return self.count

    @property
    def schedule(self) -> Schedule:
        """A beat is there at once; when it is taken hangs on all ways."""
        return Schedule(0)

    def module(self, name: str) -> Module:
        module = self.start(name)
        valid = module.valid("in")
        taken = [module.register(1, f"taken{index}") for index in range(self.ways)]
        served = [register.q | module.ready(out) for register, out in zip(taken, self.outputs, strict=True)]
        everyone = all_of(*served)
        for register, out in zip(taken, self.outputs, strict=True):
            register.set(~(everyone & valid) & (register.q | (valid & module.ready(out))))
        streams = {out: (valid & ~register.q, module["in"]) for register, out in zip(taken, self.outputs, strict=True)}
        return module.close({"in": everyone}, streams)


@dataclass(frozen=True)
class Fifo(Stage):
    """A queue of `depth` beats."""

    width: int
    depth: int
    count: int

    @property
    def inputs(self) -> dict[str, int]:
        return {"in": self.width}

    @property
    def outputs(self) -> dict[str, int]:
        return {"out": self.width}

    @property
    def beats(self) -> dict[str, int]:
        return {"in": self.count, "out": self.count}

    @property
    def cycles(self) -> int:
        return self.count

    @property
    def schedule(self) -> Schedule:
        """Of a beat that finds the queue empty; one that comes to others waits for them."""
        return Schedule(4)

    def module(self, name: str) -> Module:
        module = self.start(name)
        pipe = Pipe(module, "out")
        size = self.depth.bit_length()
        filled = module.register(size, "filled")
        ready = filled.q.differs(self.depth)
        push = ready & module.valid("in")
        write, _ = module.counter(self.depth, push, "write")
        # A word leaves the memory one step after its address; it is free once its successor's address stands.
        stored = module.register(size, "stored")
        present = stored.q.any()
        pop = present & pipe.enable
        read, _ = module.counter(self.depth, pop, "read")
        moved = module.delayed(push, initial=0)
        stored.set(stored.q + moved.unsigned(size) - pop.unsigned(size))
        valid = pipe.flag(present)
        word = module.held_read(self.depth, read, pipe.enable, write=write, data=module["in"], enable=push)
        leaves = valid & pipe.enable
        filled.set(filled.q + push.unsigned(size) - leaves.unsigned(size))
        return module.close({"in": ready}, {"out": pipe.end(valid, word)})


@dataclass(frozen=True)
class Axis:
    """One dimension of the order in which words are read: `size` steps of `stride` words, the first `present` real."""

    size: int
    stride: int
    present: int | None = None

    @property
    def real(self) -> int:
        return self.size if self.present is None else self.present


@dataclass(frozen=True)
class Reorder(Stage):
    """`count` words, kept, and read in the order of nested `axes` (the first outermost); what is not real is zero."""

    width: int
    count: int
    axes: tuple[Axis, ...]
    runs: int = 1

    @property
    def inputs(self) -> dict[str, int]:
        return {"in": self.width}

    @property
    def outputs(self) -> dict[str, int]:
        return {"out": self.width}

    @property
    def read_words(self) -> int:
        return prod(axis.size for axis in self.axes)

    @property
    def beats(self) -> dict[str, int]:
        return {"in": self.runs * self.count, "out": self.runs * self.read_words}

    @property
    def cycles(self) -> int:
        return ceil(self.runs * banked_cycles([(self.count, self.read_words)]))

    @property
    def schedule(self) -> Schedule:
        return in_turns(2, bank("in", self.count, self.read_words))

    def module(self, name: str) -> Module:
        module = self.start(name)
        pipe, rows = Pipe(module, "out"), Banks(module, "in", self.count)
        go = rows.available & pipe.enable
        bits = address_bits(self.count)
        address: Signal = module.constant(0, bits)
        moves, absent = go, list[Signal]()
        for index, axis in reversed(list(enumerate(self.axes))):
            place, last = module.counter(axis.size, moves, f"axis{index}")
            if axis.real < axis.size:
                absent.append(place.at_least(axis.real))
            if axis.size > 1 and axis.stride % (1 << bits):
                offset = module.register(bits, f"offset{index}")
                offset.set(last.then(0, offset.q + axis.stride % (1 << bits)), moves)
                address = address + offset.q
            moves = moves & last
        valid = pipe.flag(rows.available)
        word = rows.read(address, pipe.enable)
        rows.release(moves, pipe.enable, valid)
        if absent:
            word = pipe.step(~any_of(absent)).repeated(self.width) & word
        return module.close({"in": rows.ready}, {"out": pipe.end(valid, word)})
