"""What calibration inputs show of a module's values: largest magnitudes, shapes, the scores of attention."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from math import frexp
from typing import TYPE_CHECKING, Any

from xdsl.dialects.builtin import ModuleOp
from xdsl.ir import SSAValue

from ..backends.reference import Interpreter, Weights, body
from ..dialects.errors import MxloomError
from ..dialects.formats import FixedType
from ..dialects.operations._shapes import shape_of
from ..dialects.operations.attention import AttentionOp

if TYPE_CHECKING:
    from torch import Tensor

UNSEEN = 1e30
"""Magnitudes from here on are masks (the lowest number of a float type, infinity), and no values."""

LARGEST_FRACTION = 40
"""Bits behind the point, at most: what tables and normalizations in integers take."""

FINEST = 2.0 ** (8 - LARGEST_FRACTION)
"""Magnitudes below have fewer than 8 significant bits in any format."""


@dataclass
class Ranges:
    """The largest magnitude of every float value, of the scores of every attention, and the shapes of one run.

    `masks` holds the values that reach below -`UNSEEN`; scores are those before they are scaled.
    """

    largest: dict[SSAValue, float] = field(default_factory=dict)
    scores: dict[AttentionOp, float] = field(default_factory=dict)
    shapes: dict[SSAValue, tuple[int, ...]] = field(default_factory=dict)
    masks: set[SSAValue] = field(default_factory=set)

    def moved(self, old: SSAValue, new: SSAValue) -> None:
        """`new` has taken the place of `old`."""
        if old in self.largest:
            self.largest[new] = self.largest[old]
        if old in self.shapes:
            self.shapes[new] = self.shapes[old]
        if old in self.masks:
            self.masks.add(new)

    def shape(self, value: SSAValue) -> tuple[int, ...]:
        """The value's shape as it was seen, or as its type states it."""
        return self.shapes.get(value, shape_of(value))


def observed(module: ModuleOp, weights: Weights, inputs: Iterable[Sequence[Tensor]]) -> Ranges:
    """The ranges of a module's values over some inputs, by the reference interpreter."""
    interpreter, found = Interpreter(module, weights), Ranges()
    for value, tensor in interpreter.constants.items():
        if isinstance(value, SSAValue):
            _see(found, value, tensor)
    for place, given in enumerate(inputs):
        _check_finite(module, place, given)
        held: dict[SSAValue, Any] = {}
        wanted = {operand for op in module.walk() if isinstance(op, AttentionOp) for operand in (op.query, op.key)}

        def observe(
            value: SSAValue, tensor: Any, held: dict[SSAValue, Any] = held, wanted: set[SSAValue] = wanted
        ) -> None:
            _see(found, value, tensor)
            if value in wanted:
                held[value] = tensor
            if isinstance(value.owner, AttentionOp):
                op = value.owner
                found.scores[op] = max(found.scores.get(op, 0.0), _scores(held[op.query], held[op.key]))

        interpreter(*given, observe=observe)
    return found


def _check_finite(module: ModuleOp, place: int, given: Sequence[Tensor]) -> None:
    """Raise MxloomError for a calibration input that is no number: it has no range."""
    for argument, tensor in zip(body(module).args, given, strict=True):
        if tensor.is_floating_point() and (bad := int((~tensor.isfinite()).sum())):
            raise MxloomError(
                f"calibration input {place}: {bad} of {tensor.numel()} values of {argument.name_hint} are NaN or "
                "infinite, and have no range; leave such inputs out"
            )


def _see(found: Ranges, value: SSAValue, tensor: Any) -> None:
    if not hasattr(tensor, "is_floating_point"):
        return
    found.shapes[value] = tuple(tensor.shape)
    if not tensor.is_floating_point() or not tensor.numel():
        return
    magnitudes = tensor.detach().abs()
    hidden = magnitudes >= UNSEEN
    if bool(hidden.any()):
        found.masks.add(value)
        magnitudes = magnitudes.masked_fill(hidden, 0.0)
    found.largest[value] = max(found.largest.get(value, 0.0), float(magnitudes.max()))


def _scores(query: Tensor, key: Tensor) -> float:
    """The largest product of a query and a key of its group."""
    batch, heads, rows, width = query.shape
    grouped = query.reshape(batch, key.shape[1], heads // key.shape[1] * rows, width)
    return float((grouped.double() @ key.double().transpose(-1, -2)).abs().max())


def fixed_for(largest: float, width: int, *, headroom: float = 2.0) -> FixedType:
    """The fixed-point format of `width` bits that holds `headroom` times a magnitude: 2^n, n as small as may be."""
    mantissa, exponent = frexp(headroom * largest) if largest > 0 else (0.5, 1)
    n = exponent - 1 if mantissa == 0.5 else exponent
    return FixedType(width, min(width - 1 - n, LARGEST_FRACTION))  # pyright: ignore[reportArgumentType]
