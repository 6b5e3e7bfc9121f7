"""Cycles of a design before it is made: every stage as a process that knows when it takes and gives each beat.

A timed process network (G. Kahn, The semantics of a simple language for parallel programming, 1974; F. Baccelli et al.,
Synchronization and Linearity, 1992, chapter 2): a process waits for a beat that comes or for one that is taken, so that
all times follow from the order of the beats alone, in whatever order the processes run.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import cycle
from math import ceil

from ...dialects.errors import MxloomError
from .folding import interval, slowest
from .graph import Graph, Place
from .stages._schedule import Schedule, Turn
from .stages._stream import Stage
from .stages.route import Fifo, Fork


class Times:
    """The cycles of events of one kind, in order; processes may wait for the next."""

    def __init__(self, name: str, awake: deque[Process]) -> None:
        self.name, self.cycles, self._awake = name, list[int](), awake
        self.waiting: list[Process] = []

    def add(self, time: int) -> None:
        """The next event."""
        self.cycles.append(time)
        if self.waiting:
            self._awake.extend(self.waiting)
            self.waiting.clear()

    def at(self, index: int) -> Generator[Times, None, int]:
        """The cycle of an event, once it is known."""
        while len(self.cycles) <= index:
            yield self
        return self.cycles[index]


Process = Generator[Times, None, None]


class Link:
    """A stream: when each beat is there first, and when it is taken."""

    def __init__(self, name: str, awake: deque[Process]) -> None:
        self.awake = awake
        self.given, self.taken = Times(name, awake), Times(name, awake)


class Clock:
    """A pipeline's time: it stands still while a beat at its end is not taken."""

    def __init__(self, out: Link) -> None:
        self.time = 0
        self._out = out
        self._ends = Times(out.given.name, out.awake)
        """When each beat would be at the end if none of those that are still under way had to stand there."""
        self._left = self._stood = 0

    def give(self, delay: int) -> None:
        """Let a beat come to the end so many steps from now."""
        self._ends.add(self.time + delay - self._stood)

    def deliver(self, count: int) -> Process:
        """Show each beat at the end once those before it are taken."""
        stood = 0
        for index in range(count):
            there = (yield from self._ends.at(index)) + stood
            self._out.given.add(there)
            stood += (yield from self._out.taken.at(index)) - there

    def reach(self, time: int) -> Process:
        """Wait, doing nothing, for the first cycle from `time` on in which the pipeline moves."""
        self.time = max(self.time, time)
        while (there := self._next()) is not None and there <= self.time:
            self.time = max(self.time, (yield from self._leave(there)))

    def step(self, count: int) -> Process:
        """Make so many steps; the pipeline moves in the first cycle of each."""
        yield from self.reach(self.time)
        end = self.time + count
        while (there := self._next()) is not None and there < end:
            end += (yield from self._leave(there)) - there
        self.time = end

    def _next(self) -> int | None:
        """When the next beat that has not left is at the end."""
        ends = self._ends.cycles
        return ends[self._left] + self._stood if self._left < len(ends) else None

    def _leave(self, there: int) -> Generator[Times, None, int]:
        """The cycle in which the beat at the end is taken; all behind it come later by as much as it stood there."""
        taken = yield from self._out.taken.at(self._left)
        self._left += 1
        self._stood += taken - there
        return taken


@dataclass(frozen=True)
class Timing:
    """What a design's processes say, in cycles from its first beat in.

    `latency`: to the first beat out. `interval`: between the last beats of two inputs, once all is in step. `slowest`:
    the stage that the others wait for. `queued`: the most beats that each queue held. `beats`: the cycle in which each
    beat of the design's streams is taken.
    """

    latency: int
    interval: float
    slowest: str
    queued: dict[str, int]
    beats: dict[str, list[int]]


class StandstillError(MxloomError):
    """A design comes to a stop: some of its stages wait for one another for good."""


def stops(graph: Graph) -> bool:
    """Whether a design comes to a stop however deep its queues are.

    One input says it: what it leaves is a design at rest, and those that come behind it cannot hold it up.
    """
    try:
        _Network(graph, 1, endless=True).run()
    except StandstillError:
        return True
    return False


def predicted(graph: Graph, runs: int | None = None, *, endless: bool = False, pace: int = 0) -> Timing:
    """The timing of a design that is given `runs` inputs in a row, and whose outputs are always taken.

    Without `runs` so many are taken that the first is long out as the last comes. `endless`: its queues are as deep as
    they need. `pace`: an input begins no sooner than so many cycles behind the one before. Raises StandstillError,
    naming the streams, for a design that comes to a stop.
    """
    if runs is None:
        first = _Network(graph, 1, endless, pace)
        first.run()
        runs = 4 + max(link.taken.cycles[-1] for link in first.outputs.values()) // interval(graph)
    network = _Network(graph, runs, endless, pace)
    network.run()
    beats = {name: link.taken.cycles for name, link in (network.inputs | network.outputs).items()}
    starts = min((link.taken.cycles[0] for link in network.inputs.values()), default=0)
    beats = {name: [cycle - starts for cycle in cycles] for name, cycles in beats.items()}
    out = [beats[name] for name in network.outputs]
    ends = [max(cycles[len(cycles) * (run + 1) // runs - 1] for cycles in out) for run in range(runs)]
    half = (runs - 1) // 2
    steady = (ends[-1] - ends[half]) / (runs - 1 - half) if runs > 1 else float(ends[0] + 1)
    latency = min(cycles[0] for cycles in out)
    return Timing(latency, steady, slowest(graph).name, network.queued(), beats)


def size_queues(graph: Graph) -> Timing:
    """Make every queue as deep as it has to be for nothing to wait for it; returns the timing with such queues.

    Where every way has a queue, endless ones would let a stream run ahead of the others without end. Inputs as far
    apart as the design then takes them fill them as far as is needed, and with so many places it is no slower.
    """
    timing = predicted(graph, endless=True)
    if graph.is_queued_everywhere:
        timing = predicted(graph, endless=True, pace=ceil(timing.interval))
    for name, most in timing.queued.items():
        node = graph.nodes[name]
        assert isinstance(node.stage, Fifo)
        node.stage = replace(node.stage, depth=max(1, most))
    return predicted(graph) if graph.is_queued_everywhere else timing


class _Network:
    """The links of a design by who reads them, and the processes of its stages."""

    def __init__(self, graph: Graph, runs: int, endless: bool, pace: int = 0) -> None:
        self.graph, self.runs, self.endless = graph, runs, endless
        self.awake: deque[Process] = deque()
        self.links = {
            target: Link(f"{target.node or 'output'}.{target.stream}", self.awake) for target in graph.sources
        }
        self.inputs: dict[str, Link] = {}
        self.outputs: dict[str, Link] = {}
        self.fifos: dict[str, _Queue] = {}
        readers = {source: self.links[target] for target, source in graph.sources.items()}
        for boundary in graph.inputs:
            link = readers.get(Place("", boundary.name))
            if link is not None:
                self.inputs[boundary.name] = link
                self.awake.append(_source(link, runs, graph.beats(Place("", boundary.name)), pace))
        for weight in graph.streamed:
            self.awake.append(_source(readers[Place("", weight.name)], runs, len(weight.words), pace))
        for boundary in graph.outputs:
            target = Place("", boundary.name)
            self.outputs[boundary.name] = self.links[target]
            self.awake.append(_sink(self.links[target], runs * graph.beats(graph.sources[target])))
        for name, node in graph.nodes.items():
            ins = {stream: self.links[Place(name, stream)] for stream in node.stage.inputs}
            outs = {stream: readers[Place(name, stream)] for stream in node.stage.outputs}
            self.awake.extend(self._processes(name, node.stage, ins, outs))

    def _processes(self, name: str, stage: Stage, ins: dict[str, Link], outs: dict[str, Link]) -> Iterator[Process]:
        beats = {stream: self.runs * count for stream, count in stage.beats.items()}
        if isinstance(stage, Fork):
            yield _fork(ins["in"], list(outs.values()), beats["in"])
        elif isinstance(stage, Fifo):
            depth = beats["in"] if self.endless else stage.depth
            self.fifos[name] = queue = _Queue(depth, ins["in"], outs["out"], beats["in"], self.awake)
            yield from queue.processes()
        else:
            yield from _stage(stage.schedule, ins, outs["out"], beats, self.awake)

    def run(self) -> None:
        """Let every process go on until all have ended."""
        running = len(self.awake)
        while self.awake:
            process = self.awake.popleft()
            times = next(process, None)
            if times is None:
                running -= 1
            else:
                times.waiting.append(process)
        if running:
            stopped = [link.given.name for link in self.links.values() if link.given.waiting or link.taken.waiting]
            raise StandstillError(f"the design comes to a stop: {', '.join(sorted(stopped))} wait for good")

    def queued(self) -> dict[str, int]:
        return {name: queue.most() for name, queue in self.fifos.items()}


def _source(link: Link, runs: int, count: int, pace: int) -> Process:
    """A beat in every cycle in which one is taken, but no run's first before its time."""
    time = 0
    for index in range(runs * count):
        time = max(time, index // count * pace)
        link.given.add(time)
        time = (yield from link.taken.at(index)) + 1


def _sink(link: Link, count: int) -> Process:
    for index in range(count):
        link.taken.add((yield from link.given.at(index)))


def _fork(given: Link, ways: Sequence[Link], count: int) -> Process:
    for index in range(count):
        time = yield from given.given.at(index)
        for way in ways:
            way.given.add(time)
        last = time
        for way in ways:
            last = max(last, (yield from way.taken.at(index)))
        given.taken.add(last)


class _Queue:
    """`stages.route.Fifo`: a word can leave four cycles after it came; its place is free once it stands at the end."""

    def __init__(self, depth: int, given: Link, out: Link, count: int, awake: deque[Process]) -> None:
        self.depth, self.given, self.out, self.count = depth, given, out, count
        self.stored, self.freed = Times("a queue", awake), Times("a queue", awake)

    def processes(self) -> Iterator[Process]:
        clock = Clock(self.out)
        yield from (self.write(), self.read(clock), clock.deliver(self.count))

    def write(self) -> Process:
        time = 0
        for index in range(self.count):
            time = max(time, (yield from self.given.given.at(index)))
            if index >= self.depth:
                time = max(time, (yield from self.freed.at(index - self.depth)))
            self.given.taken.add(time)
            self.stored.add(time + 2)
            time += 1

    def read(self, clock: Clock) -> Process:
        for index in range(self.count):
            yield from clock.reach((yield from self.stored.at(index)))
            clock.give(2)
            clock.time += 1
            yield from clock.reach(clock.time)
            self.freed.add(clock.time + 1)

    def most(self) -> int:
        """The most beats that it held."""
        left, most = 0, 0
        for index, time in enumerate(self.given.taken.cycles):
            while left < len(self.freed.cycles) and self.freed.cycles[left] <= time:
                left += 1
            most = max(most, index + 1 - left)
        return most


def _stage(
    schedule: Schedule, ins: dict[str, Link], out: Link, beats: dict[str, int], awake: deque[Process]
) -> Iterator[Process]:
    clock, count = Clock(out), beats["out"]
    yield clock.deliver(count)
    if not schedule.turns:
        if schedule.passes is None:
            yield _pipe(schedule.delay, list(ins.values()), clock, count)
        else:
            yield _selection(schedule.delay, schedule.passes, ins["in"], clock, beats["in"])
        return
    banks = {stream: _Bank(link, awake) for stream, link in ins.items()}
    for stream, bank in banks.items():
        sizes = [turn.takes[stream] for turn in schedule.turns if stream in turn.takes
                 for _ in range(turn.repeat * turn.banks)]  # fmt: skip
        yield bank.write(sizes, beats[stream], schedule.kept)
    if schedule.shared is None:
        yield _turns(schedule, banks, clock, count)
        return
    units, columns = schedule.shared
    group = Link(out.given.name, awake)
    sizes = [min(units, columns - start) for start in range(0, columns, units)]
    rows, together = count // columns, Clock(group)
    yield together.deliver(rows * len(sizes))
    yield _turns(schedule, banks, together, rows * len(sizes))
    yield _one_by_one(group, clock, sizes, rows)


def _pipe(delay: int, ins: Sequence[Link], clock: Clock, count: int) -> Process:
    """A beat of every stream together, and one out."""
    for index in range(count):
        time = 0
        for link in ins:
            time = max(time, (yield from link.given.at(index)))
        yield from clock.reach(time)
        for link in ins:
            link.taken.add(clock.time)
        clock.give(delay)
        clock.time += 1


def _selection(delay: int, passes: tuple[int, range], given: Link, clock: Clock, count: int) -> Process:
    """Every beat takes its cycle; some are given."""
    size, chosen = passes
    for index in range(count):
        yield from clock.reach((yield from given.given.at(index)))
        given.taken.add(clock.time)
        if index % size in chosen:
            clock.give(delay)
        clock.time += 1


class _Bank:
    """Banks of a stream: one is written while others are read (`stages._stream.Banks`, and lines of a ring)."""

    def __init__(self, given: Link, awake: deque[Process]) -> None:
        self.given = given
        self.full, self.free = Times(given.given.name, awake), Times(given.given.name, awake)

    def write(self, sizes: Sequence[int], count: int, kept: int) -> Process:
        time = index = row = 0
        for size in cycle(sizes):
            if index >= count:
                return
            if row >= kept:
                time = max(time, (yield from self.free.at(row - kept)))
            for place in range(index, index + size):
                time = max(time, (yield from self.given.given.at(place)))
                self.given.taken.add(time)
                time += 1
            index, row = index + size, row + 1
            self.full.add(time)


def _turns(schedule: Schedule, banks: dict[str, _Bank], clock: Clock, count: int) -> Process:
    """The turns of a stage until it has given all its beats."""
    given = 0
    taken = dict.fromkeys(banks, 0)
    for turn in _repeated(schedule.turns):
        if given >= count:
            break
        for stream in [*turn.takes] * turn.banks:
            yield from clock.reach((yield from banks[stream].full.at(taken[stream])))
            taken[stream] += 1
        yield from clock.reach(clock.time)
        if schedule.lead:
            yield from clock.reach(clock.time + schedule.lead)
        for _ in range(turn.steps // turn.every):
            yield from clock.step(turn.every)
            clock.give(schedule.delay - 1)
            given += 1
        yield from clock.step(turn.steps % turn.every)
        yield from clock.reach(clock.time)
        for stream in turn.frees * turn.returned:
            banks[stream].free.add(clock.time + schedule.held)
        clock.time += schedule.rests


def _repeated(turns: Sequence[Turn]) -> Iterator[Turn]:
    for turn in cycle(turns):
        for _ in range(turn.repeat):
            yield turn


def _one_by_one(group: Link, clock: Clock, sizes: Sequence[int], rows: int) -> Process:
    """Beats that come together leave one after the other; the next ones are taken as the last leaves."""
    index = 0
    for _ in range(rows):
        for size in sizes:
            clock.time = max(clock.time, (yield from group.given.at(index)))
            group.taken.add(clock.time)
            clock.time += 1
            yield from clock.reach(clock.time)
            for _ in range(size):
                yield from clock.step(1)
                clock.give(0)
            clock.time -= 1
            index += 1
