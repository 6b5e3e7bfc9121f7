"""Where a value of the module is found: a stream, and in which order its numbers come."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod

from ...dialects.integer import Point
from .graph import Graph, Place
from .stages.route import Axis, Reorder


@dataclass(frozen=True)
class Flow:
    """A value of `shape` whose number at an index is beat sum(index x stride) of a stream of `count` beats."""

    place: Place
    point: Point
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    count: int

    @classmethod
    def whole(cls, place: Place, point: Point, shape: Sequence[int]) -> Flow:
        """Numbers that come in the row-major order of their shape."""
        return cls(place, point, tuple(shape), row_major(shape), prod(shape))

    def permuted(self, dims: Sequence[int]) -> Flow:
        return replace(self, shape=tuple(self.shape[d] for d in dims), strides=tuple(self.strides[d] for d in dims))

    def reshaped(self, shape: Sequence[int]) -> Flow | None:
        """The same numbers in another shape; None where they must be moved for it."""
        import torch

        try:
            found = torch.empty_strided(self.shape, self.strides, device="meta").view(*shape)
        except RuntimeError:
            return None
        return replace(self, shape=tuple(found.shape), strides=tuple(found.stride()))


def row_major(shape: Sequence[int]) -> tuple[int, ...]:
    """Strides of numbers that lie one after the other."""
    return tuple(prod(shape[index + 1 :]) for index in range(len(shape)))


def in_order(graph: Graph, flow: Flow, site: str) -> Place:
    """A stream of the flow's numbers in the row-major order of its shape: its own, or that of a stage that reorders."""
    runs, count, axes = order_of(flow)
    if not axes:
        return flow.place
    node = graph.add("reorder", Reorder(flow.point.width, count, axes, runs), site)
    graph.connect(flow.place, Place(node.name, "in"))
    return Place(node.name, "out")


def order_of(flow: Flow) -> tuple[int, int, tuple[Axis, ...]]:
    """(runs, words kept in each, axes in which they are read); no axes where the order is right already."""
    axes = [Axis(size, stride) for size, stride in zip(flow.shape, flow.strides, strict=True) if size > 1]
    merged: list[Axis] = []
    for axis in axes:
        if merged and merged[-1].stride == axis.size * axis.stride:
            merged[-1] = Axis(merged[-1].size * axis.size, axis.stride)
        else:
            merged.append(axis)
    runs, count = 1, flow.count
    while merged and merged[0].size * merged[0].stride == count:
        runs, count = runs * merged[0].size, merged[0].stride
        merged = merged[1:]
    return runs, count, tuple(merged)
