"""Layers that share one design: what was seen of the same place in all of them counts as seen in each."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise

from xdsl.ir import SSAValue

from ..backends.reference import Weights
from ..dialects.errors import UsageError
from ..dialects.formats import is_wide
from ..dialects.operations._operation import Operation
from ..dialects.operations._shapes import element_of
from ..dialects.operations.attention import AttentionOp
from ..dialects.operations.cast import CastOp
from ..dialects.operations.parameter import ParameterOp
from ._ranges import Ranges
from ._sites import module_name, root


def share_ranges(chip: Sequence[Operation], ranges: Ranges, lists: Iterable[str], weights: Weights) -> None:
    """Widen the ranges of each list of layers (model.layers) to those of all of them, place by place.

    Operations of two layers that come at the same place stand for each other, and so do their operands and results:
    what goes from one layer into the next has one range, too. Raises UsageError, naming the first operation that is
    not the same, for layers of several kinds, and for a name that is no list of two layers or more.
    """
    found = _Ranges(ranges, weights)
    for name in lists:
        layers = layers_of(chip, name)
        for one, other in pairwise(layers.values()):
            _check_alike(name, one, other)
            for a, b in zip(one, other, strict=True):
                found.join(a, b)
    found.spread()


def layers_of(chip: Iterable[Operation], name: str) -> dict[int, list[Operation]]:
    """The operations of each layer by its number. Raises UsageError where `name` is no list of two layers or more."""
    found: dict[int, list[Operation]] = {}
    for op in chip:
        path = module_name(op)
        number = path.removeprefix(f"{name}.").partition(".")[0]
        if path.startswith(f"{name}.") and number.isdecimal() and not isinstance(op, CastOp):
            found.setdefault(int(number), []).append(op)
    if len(found) < 2:
        raise UsageError(
            f'share: "{name}" is no list of layers: {len(found)} modules named {name}.N compute on data; '
            "name the list itself, as model.layers"
        )
    return dict(sorted(found.items()))


def _check_alike(name: str, one: Sequence[Operation], other: Sequence[Operation]) -> None:
    """Raise UsageError unless two layers are the same operations in the same order."""
    for a, b in zip(one, other, strict=False):
        if a.name != b.name or len(a.operands) != len(b.operands):
            raise UsageError(
                f'share: the layers of "{name}" are not of one kind: {module_name(a)} is {a.name} on '
                f"{len(a.operands)} operands, and {module_name(b)}, in its place, {b.name} on {len(b.operands)}"
            )
    if len(one) != len(other):
        raise UsageError(
            f'share: the layers of "{name}" are not of one kind: the layer of {module_name(one[0])} has {len(one)} '
            f"operations, that of {module_name(other[0])} {len(other)}"
        )


class _Ranges:
    """Values whose ranges are one (a disjoint-set forest), and what was seen of each."""

    def __init__(self, ranges: Ranges, weights: Weights) -> None:
        self.ranges, self.weights = ranges, weights
        self.parent: dict[SSAValue, SSAValue] = {}
        self.scores: dict[AttentionOp, AttentionOp] = {}

    def join(self, one: Operation, other: Operation) -> None:
        """Two operations stand for each other."""
        for a, b in zip([*one.operands, *one.results], [*other.operands, *other.results], strict=True):
            self._unite(a, b)
            self._unite(root(a), root(b))
        if isinstance(one, AttentionOp) and isinstance(other, AttentionOp):
            self.scores[other] = one

    def _unite(self, a: SSAValue, b: SSAValue) -> None:
        self.parent[self._first(b)] = self._first(a)

    def _first(self, value: SSAValue) -> SSAValue:
        while self.parent.setdefault(value, value) is not value:
            self.parent[value] = value = self.parent[self.parent[value]]
        return value

    def spread(self) -> None:
        """Give each value the largest magnitude of those that it is one with, and each attention the largest scores."""
        largest = self.ranges.largest
        most: dict[SSAValue, float] = {}
        for value in self.parent:
            if value not in largest and isinstance(value.owner, ParameterOp) and is_wide(element_of(value)):
                wide = self.weights.wide(value.owner.source.data)
                largest[value] = float(wide.abs().max()) if wide.numel() and wide.is_floating_point() else 0.0
            first = self._first(value)
            most[first] = max(most.get(first, 0.0), largest.get(value, 0.0))
        largest.update({value: most[self._first(value)] for value in self.parent if value in largest})
        scores = self.ranges.scores
        for ordered in (self.scores.items(), reversed(self.scores.items())):
            for a, b in ordered:
                scores[a] = scores[b] = max(scores.get(a, 0.0), scores.get(b, 0.0))
