"""What stages are made of: modules whose ports are streams, memories that are loaded, rows kept in two banks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ....dialects.integer import Point
from ..rtl import Module, Port, Signal, address_bits, all_of, any_of
from ._schedule import Schedule


@dataclass(frozen=True)
class Memory:
    """A memory of a stage that is filled before it works: `depth` words of `width` bits."""

    depth: int
    width: int


class Stage(ABC):
    """One operation as hardware: streams in, streams out, and what it needs to be filled with."""

    @property
    @abstractmethod
    def inputs(self) -> dict[str, int]:
        """Width in bits of each input stream."""

    @property
    @abstractmethod
    def outputs(self) -> dict[str, int]:
        """Width in bits of each output stream."""

    @property
    def memories(self) -> tuple[Memory, ...]:
        """Memories that are filled through the stream `load`, one after the other, from address 0 on."""
        return ()

    @property
    @abstractmethod
    def beats(self) -> dict[str, int]:
        """Beats of each stream in one run: what the stage takes and gives for one input of the whole design."""

    @property
    @abstractmethod
    def cycles(self) -> int:
        """Cycles between two runs of one input each, when nothing else holds it up."""

    @property
    @abstractmethod
    def schedule(self) -> Schedule:
        """When it takes and gives its beats."""

    @abstractmethod
    def module(self, name: str) -> Module:
        """The stage as a hardware module of that name."""

    @property
    def loaded_bits(self) -> int:
        """Bits of the memories that are filled from outside."""
        return sum(memory.depth * memory.width for memory in self.memories)

    def start(self, name: str) -> StreamModule:
        """An empty module with the stage's ports."""
        loads = {"load": max(memory.width for memory in self.memories)} if self.memories else {}
        return StreamModule(name, {**self.inputs, **loads}, self.outputs)


class Through(Stage):
    """A stage that takes one stream of numbers and gives as many on another."""

    given: Point
    result: Point

    @property
    @abstractmethod
    def numbers(self) -> int:
        """Numbers of one run."""

    @property
    def inputs(self) -> dict[str, int]:
        return {"in": self.given.width}

    @property
    def outputs(self) -> dict[str, int]:
        return {"out": self.result.width}

    @property
    def beats(self) -> dict[str, int]:
        return {"in": self.numbers, "out": self.numbers}


class StreamModule(Module):
    """A module whose ports are streams: `{name}`, `{name}_valid`, `{name}_ready`.

    A beat passes at a clock's edge at which valid and ready are both 1; valid, once 1, stays until then.
    """

    def __init__(self, name: str, inputs: Mapping[str, int], outputs: Mapping[str, int]) -> None:
        self.stream_inputs, self.stream_outputs = dict(inputs), dict(outputs)
        ins, outs = list[Port](), list[Port]()
        for stream, width in inputs.items():
            ins += [Port(f"{stream}_valid", 1), Port(stream, width)]
            outs.append(Port(f"{stream}_ready", 1))
        for stream, width in outputs.items():
            outs += [Port(f"{stream}_valid", 1), Port(stream, width)]
            ins.append(Port(f"{stream}_ready", 1))
        super().__init__(name, ins, outs)

    def valid(self, stream: str) -> Signal:
        """Whether an input stream has a beat."""
        return self[f"{stream}_valid"]

    def ready(self, stream: str) -> Signal:
        """Whether an output stream's beat is taken."""
        return self[f"{stream}_ready"]

    def close(self, ready: Mapping[str, Signal], out: Mapping[str, tuple[Signal, Signal]]) -> Module:
        """The last step: the inputs' readiness, and (valid, data) of each output."""
        ports = {f"{stream}_ready": signal for stream, signal in ready.items()}
        if "load" in self.stream_inputs:
            ports["load_ready"] = self.constant(1, 1)
        for stream, (valid, data) in out.items():
            ports |= {f"{stream}_valid": valid, stream: data}
        return self.finish(**ports)

    def counter(self, count: int, enable: Signal, name: str | None = None) -> tuple[Signal, Signal]:
        """(a number that runs from 0 to count - 1 and again, one step where `enable` is 1; whether it is the last)."""
        if count == 1:
            return self.constant(0, 1), self.constant(1, 1)
        register = self.register(address_bits(count), name)
        last = register.q.equals(count - 1)
        register.set(last.then(0, register.q + 1), enable)
        return register.q, last

    def held_read(
        self, depth: int, address: Signal, advance: Signal, *, write: Signal, data: Signal, enable: Signal
    ) -> Signal:
        """A memory's word one step after its address, `advance` making a step; it stays while there is none."""
        held = self.register(address.width, initial=None)
        chosen = advance.then(address, held.q)
        held.set(chosen)
        return self.memory(depth, read=chosen, write=write, data=data, enable=enable)

    def loaded(self, memories: Sequence[Memory]) -> list[LoadedMemory]:
        """The write sides of the memories that the stream `load` fills in their order."""
        writing = self.valid("load")
        found: list[LoadedMemory] = []
        region = self.register(address_bits(len(memories)), "region") if memories[1:] else None
        ends: list[Signal] = []
        for index, memory in enumerate(memories):
            mine = writing if region is None else writing & region.q.equals(index)
            address, last = self.counter(memory.depth, mine)
            ends.append(mine & last)
            found.append(LoadedMemory(memory, address, self["load"].low(memory.width), mine))
        if region is not None:
            region.set(region.q.equals(len(memories) - 1).then(0, region.q + 1), any_of(ends))
        return found


@dataclass(frozen=True)
class LoadedMemory:
    """The write side of a memory that is filled from outside."""

    memory: Memory
    write: Signal
    data: Signal
    enable: Signal

    def read(self, module: StreamModule, address: Signal, advance: Signal) -> Signal:
        """The word one step after its address."""
        return module.held_read(
            self.memory.depth, address, advance, write=self.write, data=self.data, enable=self.enable
        )


class Banks:
    """Rows of `depth` words in two banks: one is written while the other is read, as often as is needed."""

    def __init__(self, module: StreamModule, stream: str, depth: int, *, row: int | None = None) -> None:
        """`row`: a row of so many words is cut into banks of `depth`, the last of which may be shorter."""
        self.module, self.depth, self.stream = module, depth, stream
        self._full = [module.register(1, f"{stream}_full{i}") for i in range(2)]
        self._writes, self._reads = module.register(1, f"{stream}_bank"), module.register(1, f"{stream}_row")
        self.ready = ~self._writes.q.then(self._full[1].q, self._full[0].q)
        self.writing = module.valid(stream) & self.ready
        if row is None or row % depth == 0:
            self.place, self.last_place = module.counter(depth, self.writing, f"{stream}_place")
        else:
            self.place, self.last_place = self._ragged(row)
        self.written = self.writing & self.last_place
        self._writes.set(~self._writes.q, self.written)
        self.available = self._reads.q.then(self._full[1].q, self._full[0].q)

    def _ragged(self, row: int) -> tuple[Signal, Signal]:
        _, row_ends = self.module.counter(row, self.writing, f"{self.stream}_in_row")
        place = self.module.register(address_bits(self.depth), f"{self.stream}_place")
        last = place.q.equals(self.depth - 1) | row_ends
        place.set(last.then(0, place.q + 1), self.writing)
        return place.q, last

    def kept(self, value: Signal) -> Signal:
        """A number that goes with each row: `value` as the row's last word comes, read while the row is read."""
        banks = [self.module.register(value.width, initial=None) for _ in range(2)]
        for index, bank in enumerate(banks):
            bank.set(value, self.written & self._writes.q.equals(index))
        return self._reads.q.then(banks[1].q, banks[0].q)

    def read(self, address: Signal, advance: Signal) -> Signal:
        """The word at an address of the row being read, one step later. Every call is a memory of its own."""
        return self.read_part(self.depth, address, advance, self.place, self.writing)

    def read_part(self, depth: int, address: Signal, advance: Signal, place: Signal, writing: Signal) -> Signal:
        """The same for a memory of its own that keeps `depth` words of a row, those that come while `writing` is 1."""
        bits = address_bits(2 * depth)
        return self.module.held_read(
            2 * depth,
            _at(self._reads.q, address, bits, depth),
            advance,
            write=_at(self._writes.q, place, bits, depth),
            data=self.module[self.stream],
            enable=writing,
        )

    def release(self, issued: Signal, advance: Signal, valid: Signal) -> Signal:
        """Give the row back once its last word, `issued` now, has left the memory; whether it does so now.

        `advance` makes a step; `valid` says that the memory's word is in use: a bank that were freed earlier could be
        overwritten while a stall makes the memory read the same word again.
        """
        module = self.module
        self._reads.set(~self._reads.q, issued)
        last = module.delayed(issued, advance, initial=0)
        bank = module.delayed(self._reads.q, advance, initial=0)
        free = all_of(valid, last, advance)
        for index, full in enumerate(self._full):
            filled = self.written & self._writes.q.equals(index)
            emptied = free & bank.equals(index)
            full.set(filled | (full.q & ~emptied))
        return free


def _at(bank: Signal, place: Signal, bits: int, depth: int) -> Signal:
    """A place in one of two banks that lie one behind the other."""
    place = place.unsigned(bits)
    return bank.then(place + depth, place)


def banked_cycles(rows: Sequence[tuple[int, int]], repeats: int = 12) -> float:
    """Cycles of a period of rows in steady state: (words written, cycles in which it is read) of each.

    A row is written once the bank of the last but one is free, one cycle after it was read.
    """
    written = read = 0
    free = [0, 0]
    ends: list[int] = []
    for writing, reading in [*rows] * 2 * repeats:
        bank = len(ends) % 2
        written = max(written, free[bank]) + writing
        read = max(read, written) + reading
        free[bank] = read + 1
        ends.append(read)
    half = len(ends) // 2
    return (ends[-1] - ends[half - 1]) / repeats


class Pipe:
    """A pipeline whose every register moves in the cycles in which its output register is free."""

    def __init__(self, module: StreamModule, stream: str) -> None:
        self.module = module
        self._out = module.register(1, f"{stream}_held")
        self.enable = ~self._out.q | module.ready(stream)

    def step(self, value: Signal, name: str | None = None) -> Signal:
        """The value one stage later."""
        return self.module.delayed(value, self.enable, name)

    def flag(self, value: Signal) -> Signal:
        """A bit one stage later, 0 after a reset."""
        return self.module.delayed(value, self.enable, initial=0)

    def end(self, valid: Signal, data: Signal) -> tuple[Signal, Signal]:
        """The output register: (valid, data) of the output stream."""
        return self._out.set(valid, self.enable), self.step(data)
