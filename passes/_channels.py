"""Which channel each place of a tensor belongs to, followed through operations that move elements.

Labels are an array of whole numbers of the tensor's rank: of the tensor's size along a dimension in which the channel
changes, of size 1 along the others. Channels are numbered from 0; `Channels.fixed` stands for places of no channel.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import prod
from typing import TypeAlias

import numpy as np

from ..dialects.operations._shapes import UNKNOWN, Shape, text

Labels: TypeAlias = "np.ndarray"


class UnfollowedError(Exception):
    """Why channels cannot be followed any further."""


class Channels:
    """`count` channels, some of which must be scaled alike; what is one with `fixed` cannot be scaled at all."""

    def __init__(self, count: int) -> None:
        self.count = self.fixed = count
        self._parent = np.arange(count + 1)

    def first(self, labels: Labels) -> Labels:
        """Each label as the one that stands for all that are scaled as it is."""
        found = self._parent[labels]
        while not np.array_equal(found, again := self._parent[found]):
            found = again
        return found

    def unite(self, one: Labels, other: Labels) -> None:
        """Scale alike what lies at the same places."""
        one, other = np.broadcast_arrays(self.first(one), self.first(other))
        different = one != other
        for pair in np.unique(np.stack([one[different], other[different]]), axis=1).T:
            a, b = (int(first) for first in self.first(pair))
            kept, lost = (a, b) if a == self.fixed or (b != self.fixed and a < b) else (b, a)
            self._parent[lost] = kept

    def tied(self, labels: Labels, dims: Iterable[int]) -> Labels:
        """Labels that are the same all along `dims`, which they keep as dimensions of size 1."""
        for dim in dims:
            if labels.shape[dim] != 1:
                begin = labels.take([0], dim)
                self.unite(labels, begin)
                labels = begin
        return labels

    def only(self, labels: Labels, dims: Iterable[int]) -> Labels:
        """Labels that change along `dims` alone."""
        kept = {dim % labels.ndim for dim in dims}
        return self.tied(labels, [dim for dim in range(labels.ndim) if dim not in kept])

    def unbroadcast(self, labels: Labels, shape: Shape) -> Labels:
        """The labels of an operand of `shape` that broadcasts to the tensor which `labels` belong to."""
        extra = labels.ndim - len(shape)
        labels = self.tied(labels, range(extra)).reshape(labels.shape[extra:])
        return self.tied(labels, [dim for dim, size in enumerate(shape) if size == 1])

    def is_fixed(self, labels: Labels) -> bool:
        """Whether nothing there is scaled."""
        return bool(np.all(self.first(labels) == self.fixed))

    def gathered(self, parts: Iterable[tuple[Labels, np.ndarray]], how: np.ufunc, start: float = 0.0) -> np.ndarray:
        """One number for each channel, [count]: all numbers of its places joined by `how`, and of those tied to it.

        Each part is labels and numbers that broadcast against each other.
        """
        found = np.full(self.count + 1, start)
        for labels, numbers in parts:
            places, numbers = np.broadcast_arrays(self.first(labels), np.asarray(numbers, np.float64))
            how.at(found, places.ravel(), numbers.ravel())
        return found[self.first(np.arange(self.count))]

    def spread(self, numbers: np.ndarray, labels: Labels) -> np.ndarray:
        """The numbers of channels, [count], at the places of a tensor; 1 where there is no channel."""
        return np.append(numbers, 1.0)[self.first(labels)]


def along(count: int, dim: int, rank: int) -> Labels:
    """Labels of a tensor of `rank` dimensions with a channel for each index along `dim`."""
    shape = [1] * rank
    shape[dim] = count
    return np.arange(count).reshape(shape)


def collapsed(labels: Labels) -> Labels:
    """The same labels, of size 1 along dimensions in which they do not change."""
    for dim in range(labels.ndim):
        begin = labels.take([0], dim)
        if labels.shape[dim] != 1 and np.array_equal(np.broadcast_to(begin, labels.shape), labels):
            labels = begin
    return labels


def widened(labels: Labels, dim: int, size: int) -> Labels:
    """The labels with all `size` places along `dim` written out; UnfollowedError where their number is not known."""
    if size == UNKNOWN:
        raise UnfollowedError("it is cut along a dimension whose size is not known")
    shape = list(labels.shape)
    shape[dim] = size
    return np.broadcast_to(labels, shape)


def reshaped(labels: Labels, old: Shape, new: Shape) -> Labels:
    """Labels of a tensor of shape `new` whose elements, in order, are those of a tensor of shape `old`.

    UnfollowedError where they change along a dimension of which no one knows what becomes of it.
    """
    written, target = list[int](), list[int]()
    for before, after in _segments(old, new):
        sizes = labels.shape[before]
        if prod(sizes) == 1:
            written += sizes
            target += [1] * len(range(*after.indices(len(new))))
        elif UNKNOWN in old[before] or UNKNOWN in new[after]:
            raise UnfollowedError(f"{text(old)} becomes {text(new)}, and where its channels come to lie is not known")
        else:
            written += old[before]
            target += new[after]
    return collapsed(np.broadcast_to(labels, written).reshape(target))


def _segments(old: Shape, new: Shape) -> list[tuple[slice, slice]]:
    """Dimensions of both shapes, in order, that hold the same elements of a tensor: as few as can be seen."""
    back, i, j = _matching(old[::-1], new[::-1])
    front, a, b = _matching(old[: len(old) - i], new[: len(new) - j])
    middle = (slice(a, len(old) - i), slice(b, len(new) - j))
    mirrored = [
        (slice(len(old) - before.stop, len(old) - before.start), slice(len(new) - after.stop, len(new) - after.start))
        for before, after in reversed(back)
    ]
    return [*front, middle, *mirrored]


def _matching(old: Sequence[int], new: Sequence[int]) -> tuple[list[tuple[slice, slice]], int, int]:
    """Segments from the first dimension on, while all sizes are known, and how many dimensions they take."""
    found, begun, i, j = list[tuple[slice, slice]](), (0, 0), 0, 0
    one = other = 1
    while i < len(old) or j < len(new):
        takes_old = i < len(old) and (one <= other or j == len(new))
        size = old[i] if takes_old else new[j]
        if size == UNKNOWN:
            break
        if takes_old:
            one, i = one * size, i + 1
        else:
            other, j = other * size, j + 1
        if one == other:
            found.append((slice(begun[0], i), slice(begun[1], j)))
            begun, one, other = (i, j), 1, 1
    return found, *begun
