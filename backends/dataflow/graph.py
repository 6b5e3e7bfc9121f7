"""A design: stages and the streams between them, and the hardware module that holds them all."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import ceil
from typing import TYPE_CHECKING, Any

from ...dialects.integer import Point
from ...dialects.names import identifier
from .images import widened
from .packages import needed
from .rtl import Module, Signal, Wire
from .stages._stream import Stage, StreamModule
from .stages.route import Fifo, Fork
from .stages.select import Select

if TYPE_CHECKING:
    import networkx as nx
    from numpy import ndarray

Fill = Callable[[Any], "list[ndarray]"]

CONFIG = "load"
"""The stream that fills every memory: a word below, the number of the stage on top."""


@dataclass(frozen=True)
class Place:
    """A stream of a stage; of the design itself where `node` is empty."""

    node: str
    stream: str


@dataclass
class Node:
    """A stage of a design, where it comes from in the model, and what makes the words of its memories (uint8)."""

    name: str
    stage: Stage
    site: str
    fill: Fill | None = None

    @property
    def fills(self) -> list[ndarray]:
        """The words of each memory, as the stage is folded now."""
        return self.fill(self.stage) if self.fill is not None else []


@dataclass(frozen=True)
class Boundary:
    """A stream of the design: numbers of a format, one a beat, in the row-major order of a shape."""

    name: str
    point: Point
    shape: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class WeightStream:
    """A weight that comes from outside, whole for each input: `words` (uint8 [beats, bytes]) of `width` bits.

    `site` is its operation's place in the model; `codes` says what a beat holds: lanes, bits of each, bits beside them.
    """

    name: str
    width: int
    words: ndarray
    site: str
    codes: tuple[int, int, int]

    @property
    def bits(self) -> int:
        """Bits that pass for one input."""
        return len(self.words) * self.width


class Graph:
    """Stages by name, and edges from one stream to another."""

    def __init__(self) -> None:
        self.nodes: dict[str, Node] = {}
        self.sources: dict[Place, Place] = {}
        """For each stream that a stage reads (or the design gives), the stream that it comes from."""
        self.inputs: list[Boundary] = []
        self.streamed: list[WeightStream] = []
        self.outputs: list[Boundary] = []
        self.is_queued_everywhere = False
        """Whether `add_every_queue` was needed: inputs may then run ahead of one another."""

    def add(self, kind: str, stage: Stage, site: str, fill: Fill | None = None) -> Node:
        """Place a stage; its name is made from where it comes from and what it is."""
        base = identifier(f"{site}_{kind}" if site else kind)
        name, count = base, 1
        while name in self.nodes:
            count += 1
            name = f"{base}_{count}"
        self.nodes[name] = Node(name, stage, site, fill)
        return self.nodes[name]

    def connect(self, source: Place, target: Place) -> None:
        """Let `target` read `source`."""
        assert target not in self.sources, target
        self.sources[target] = source

    def readers(self) -> dict[Place, list[Place]]:
        """Who reads each stream."""
        found: dict[Place, list[Place]] = {}
        for target, source in self.sources.items():
            found.setdefault(source, []).append(target)
        return found

    def width(self, source: Place) -> int:
        """Bits of a beat of a stream that something reads."""
        if not source.node:
            return self.input_streams[source.stream]
        return self.nodes[source.node].stage.outputs[source.stream]

    def beats(self, source: Place) -> int:
        """Beats of a stream for one input of the design."""
        if not source.node:
            weight = next((each for each in self.streamed if each.name == source.stream), None)
            if weight is not None:
                return len(weight.words)
            boundary = next(each for each in self.inputs if each.name == source.stream)
            count = 1
            for size in boundary.shape:
                count *= size
            return count
        return self.nodes[source.node].stage.beats[source.stream]

    def add_forks(self) -> None:
        """A stream that several read goes through a fork."""
        for source, targets in self.readers().items():
            if len(targets) > 1:
                site = self.nodes[source.node].site if source.node else source.stream
                node = self.add("fork", Fork(self.width(source), len(targets), self.beats(source)), site)
                for target, way in zip(targets, node.stage.outputs, strict=True):
                    self.sources[target] = Place(node.name, way)
                self.connect(source, Place(node.name, "in"))

    def network(self) -> nx.DiGraph[str]:
        """The stages as a directed graph; an edge for each pair of which one reads the other."""
        found = _networks().DiGraph()
        found.add_nodes_from(self.nodes)
        for target, source in self.sources.items():
            if target.node and source.node:
                found.add_edge(source.node, target.node)
        return found

    def add_queues(self) -> list[str]:
        """Queues where paths that part at a fork meet again; returns their names.

        Every input of a stage that meets another from the same fork gets one, but for the longest way, which needs one
        too where only a part of a stream is on some way: what is dropped there holds up the fork. A queue holds a whole
        run's beats. Where ways cross through several forks, or the longest is not the slowest, a design may still come
        to a stop: see `sizing.place_queues`.
        """
        nx, network = _networks(), self.network()
        order = list(nx.topological_sort(network))
        depth = dict.fromkeys(order, 0)
        for name in order:
            for after in network.successors(name):
                depth[after] = max(depth[after], depth[name] + 1)
        before = {name: nx.ancestors(network, name) | {name} for name in order}
        names: list[str] = []
        for name in order:
            targets = [Place(name, stream) for stream in self.nodes[name].stage.inputs]
            sources = {target: self.sources[target] for target in targets if self.sources[target].node}
            if len(sources) < 2:
                continue
            longest = max(sources, key=lambda target: depth[sources[target].node])
            ways = [before[source.node] for source in sources.values()]
            common = set.intersection(*ways)
            parts = common and any(isinstance(self.nodes[n].stage, Select) for n in set.union(*ways) - common)
            for target, source in sources.items():
                if (target != longest or parts) and before[source.node] & before[sources[longest].node]:
                    names.append(self._queue(source, target))
        return names

    def add_every_queue(self) -> list[str]:
        """Queues beside those that are there, on every stream of a joining stage that is on a ring of streams.

        No design comes to a stop then. Stages that wait for one another do so around a ring, for a stream that is
        empty or for a place in one that is full. Every ring passes joining stages, and their queues hold a whole run:
        one is full only where the fork before it is a run ahead of the stage behind it. What a way is given of whole
        runs comes out of it, so that an empty one is less than a run behind. Around the ring each would be ahead of
        itself. A stream on no ring, a bridge of the graph, needs no queue.
        """
        nx = _networks()
        streams = nx.MultiGraph((s.node, t.node) for t, s in self.sources.items() if s.node and t.node)
        bridges = {frozenset(pair) for pair in nx.bridges(streams)}
        needed = [
            (source, target)
            for target, source in self.sources.items()
            if target.node and source.node and len(self.nodes[target.node].stage.inputs) > 1
            if not isinstance(self.nodes[source.node].stage, Fifo)
            if frozenset((source.node, target.node)) not in bridges
        ]
        self.is_queued_everywhere = True
        return [self._queue(source, target) for source, target in needed]

    def _queue(self, source: Place, target: Place) -> str:
        count = self.beats(source)
        name = f"{self.nodes[target.node].site}_{target.stream}"
        node = self.add("queue", Fifo(self.width(source), count, count), name)
        self.sources[target] = Place(node.name, "out")
        self.connect(source, Place(node.name, "in"))
        return node.name

    @property
    def loaded(self) -> list[Node]:
        """The stages whose memories are filled, in the order of their numbers."""
        return [node for node in self.nodes.values() if node.stage.memories]

    @property
    def word_width(self) -> int:
        """Bits of a word of the configuration stream, without the stage's number: whole bytes."""
        widths = [memory.width for node in self.loaded for memory in node.stage.memories]
        return 8 * ceil(max(widths) / 8) if widths else 0

    @property
    def number_width(self) -> int:
        return 8 * ceil(max(1, (len(self.loaded) - 1).bit_length()) / 8)

    def configuration(self) -> ndarray:
        """The beats that fill every memory."""
        import numpy as np

        size = self.number_width // 8
        found: list[ndarray] = []
        for index, node in enumerate(self.loaded):
            words = widened(node.fills, self.word_width)
            number = np.frombuffer(index.to_bytes(size, "little"), np.uint8)
            found.append(np.concatenate([words, np.tile(number, (len(words), 1))], 1))
        return np.concatenate(found) if found else np.zeros((0, 1), np.uint8)

    @property
    def input_streams(self) -> dict[str, int]:
        """Widths of the design's input streams: the configuration's first, weights last."""
        own = {CONFIG: self.word_width + self.number_width} if self.loaded else {}
        own |= {each.name: each.point.width for each in self.inputs}
        return own | {each.name: each.width for each in self.streamed}

    @property
    def output_streams(self) -> dict[str, int]:
        return {each.name: each.point.width for each in self.outputs}

    def module(self, name: str) -> Module:
        """The whole design as one module; stages that are alike are one module placed several times."""
        return _Assembly(self, name).build()


def _networks() -> Any:
    return needed("networkx", "the order of stages is found by")


class _Assembly:
    def __init__(self, graph: Graph, name: str) -> None:
        self.graph = graph
        self.top = StreamModule(name, graph.input_streams, graph.output_streams)
        self.modules: dict[Stage, Module] = {}
        self.wires: dict[tuple[str, str], Wire] = {}
        self.signals: dict[str, dict[str, Signal]] = {}

    def build(self) -> Module:
        for node in self.graph.nodes.values():
            self._place(node)
        outside = [each.name for each in (*self.graph.inputs, *self.graph.streamed)]
        ready = {name: self._join_input(name) for name in outside}
        out: dict[str, tuple[Signal, Signal]] = {}
        for target, source in self.graph.sources.items():
            if target.node:
                self._set(target.node, f"{target.stream}_valid", self._valid(source))
                self._set(target.node, target.stream, self._data(source))
                if source.node:
                    self._set(
                        source.node, f"{source.stream}_ready", self.signals[target.node][f"{target.stream}_ready"]
                    )
            else:
                out[target.stream] = (self._valid(source), self._data(source))
                if source.node:
                    self._set(source.node, f"{source.stream}_ready", self.top.ready(target.stream))
        if self.graph.loaded:
            ready[CONFIG] = self._configure()
        return self.top.close(ready, out)

    def _place(self, node: Node) -> None:
        if node.stage not in self.modules:
            kind = type(node.stage).__name__.lower()
            self.modules[node.stage] = node.stage.module(f"{self.top.name}_{kind}_{len(self.modules)}")
        module = self.modules[node.stage]
        inputs: dict[str, Signal] = {}
        for port in module.inputs:
            self.wires[node.name, port.name] = wire = self.top.wire(port.width)
            inputs[port.name] = wire.q
        self.signals[node.name] = self.top.instance(module, node.name, inputs)

    def _set(self, node: str, port: str, signal: Signal) -> None:
        self.wires[node, port].set(signal)

    def _valid(self, source: Place) -> Signal:
        return self.signals[source.node][f"{source.stream}_valid"] if source.node else self.top.valid(source.stream)

    def _data(self, source: Place) -> Signal:
        return self.signals[source.node][source.stream] if source.node else self.top[source.stream]

    def _join_input(self, name: str) -> Signal:
        readers = [t for t, s in self.graph.sources.items() if s == Place("", name)]
        if not readers:
            return self.top.constant(1, 1)
        (reader,) = readers
        if not reader.node:
            return self.top.ready(reader.stream)
        return self.signals[reader.node][f"{reader.stream}_ready"]

    def _configure(self) -> Signal:
        """Every word goes to the stage whose number stands on top of it."""
        graph, top = self.graph, self.top
        number = top[CONFIG].bits(graph.word_width, graph.number_width)
        for index, node in enumerate(graph.loaded):
            width = max(memory.width for memory in node.stage.memories)
            self._set(node.name, "load_valid", top.valid(CONFIG) & number.equals(index))
            self._set(node.name, "load", top[CONFIG].low(width))
        return top.constant(1, 1)
