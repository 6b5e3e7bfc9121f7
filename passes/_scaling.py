"""What rules of scaling ask for and share: the values that are scaled, and how one operation makes them agree."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

from xdsl.ir import Operation, SSAValue

from ..dialects.operations._origin import is_weight
from ._channels import Channels, Labels, UnfollowedError
from ._sites import module_name


class Scaling(Protocol):
    """The values that are to be scaled; a rule adds to them."""

    channels: Channels

    def labels(self, value: SSAValue) -> Labels | None:
        """The labels of a value that is scaled; None for any other."""
        ...

    def scale(self, value: SSAValue, labels: Labels) -> None:
        """Let a value be scaled."""
        ...

    def weight(
        self, operation: Operation, value: SSAValue, labels: Labels, *, plus: float = 0.0, reads: bool = False
    ) -> None:
        """Let an operation's parameter, `plus` a number, take the scale.

        `reads`: it takes the scale of what it is multiplied by, where other parameters take its inverse.
        """
        ...

    def chosen(self, operation: Operation) -> int | None:
        """Which of several ways to agree is decided for an operation."""
        ...

    def choose(self, operation: Operation, options: Sequence[int]) -> int:
        """Decide which, once."""
        ...


def called(op: Operation) -> str:
    """An operation for people."""
    return f"{module_name(op)} ({op.name})" if op.results else op.name


def both_ways(
    region: Scaling,
    op: Operation,
    backward: Callable[[Labels], Labels],
    forward: Callable[[Labels], Labels],
) -> None:
    """An operation whose first operand alone is scaled, and with it its result."""
    given, result = op.operands[0], op.results[0]
    require_unscaled(region, op, op.operands[1:])
    if (labels := region.labels(result)) is not None and region.labels(given) is None:
        region.scale(given, backward(labels))
    if (labels := region.labels(given)) is not None:
        region.scale(result, forward(labels))


def require_unscaled(region: Scaling, op: Operation, values: Iterable[SSAValue]) -> None:
    """Raise UnfollowedError where one of the values is scaled."""
    if any(region.labels(value) is not None for value in values):
        raise UnfollowedError(f"{called(op)} reads it, and its result does not scale with that")


def give(region: Scaling, op: Operation, value: SSAValue, labels: Labels) -> None:
    """Scale what an operation reads or makes: a parameter for this operation alone, any other value for all."""
    if is_weight(value):
        region.weight(op, value, labels)
    else:
        region.scale(value, labels)
