"""A part of a stream: some places along one dimension pass, the others are dropped."""

from __future__ import annotations

from dataclasses import dataclass

from ..rtl import Module
from ._schedule import Schedule
from ._stream import Pipe, Stage


@dataclass(frozen=True)
class Select(Stage):
    """Of `runs` x `size` x `inner` beats those of the `kept` indices from `first` on along `size`."""

    width: int
    runs: int
    size: int
    inner: int
    first: int
    kept: int

    @property
    def inputs(self) -> dict[str, int]:
        return {"in": self.width}

    @property
    def outputs(self) -> dict[str, int]:
        return {"out": self.width}

    @property
    def beats(self) -> dict[str, int]:
        return {"in": self.runs * self.size * self.inner, "out": self.runs * self.kept * self.inner}

    @property
    def cycles(self) -> int:
        return self.beats["in"]

    @property
    def schedule(self) -> Schedule:
        chosen = range(self.first * self.inner, (self.first + self.kept) * self.inner)
        return Schedule(1, passes=(self.size * self.inner, chosen))

    def module(self, name: str) -> Module:
        module = self.start(name)
        pipe = Pipe(module, "out")
        taken = pipe.enable & module.valid("in")
        _, last = module.counter(self.inner, taken, "place")
        index, _ = module.counter(self.size, taken & last, "index")
        chosen = index.at_least(self.first)
        if self.first + self.kept < self.size:
            chosen = chosen & index.less(self.first + self.kept)
        return module.close({"in": pipe.enable}, {"out": pipe.end(module.valid("in") & chosen, module["in"])})
