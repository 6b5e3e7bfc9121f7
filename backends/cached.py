"""What a language model's cache holds of its keys and values, counted from the types of a module."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

from xdsl.dialects.builtin import IntegerAttr, ModuleOp
from xdsl.ir import Attribute, SSAValue

from ..dialects.formats import is_wide, storage_bits
from ..dialects.instances import name_of
from ..dialects.operations._shapes import element_of
from ..dialects.operations._values import path_of
from ..dialects.operations.attention import AttentionOp
from ..dialects.operations.cast import CastOp
from ._shapes import Shapes


@dataclass(frozen=True)
class Cached:
    """Keys or values of one attention after `positions` of each of `sequences` sequences.

    The cache holds `held` of these positions (a sliding window drops the others), `rounded` of them in `format` and the
    newest wide. `elements` and `bits` are those of what it holds.
    """

    name: str
    format: str
    sequences: int
    positions: int
    held: int
    rounded: int
    elements: int
    bits: int
    narrow: bool

    @property
    def bytes_per_token(self) -> float:
        """Bytes for each position that was seen, the average over all of them."""
        return self.bits / 8 / (self.sequences * self.positions)


def cached(module: ModuleOp, shapes: Shapes) -> Iterator[Cached]:
    """What is cached where attention is causal, each value once: some layers read keys and values of another."""
    seen: set[SSAValue] = set()
    for op in module.walk():
        if not isinstance(op, AttentionOp) or op.causal is None:
            continue
        for name in ("key", "value"):
            held = _held(getattr(op, name))
            if held not in seen and prod(shapes[held]):
                seen.add(held)
                yield _cached(op, name, held, shapes)


def rounded_positions(op: AttentionOp, name: str, positions: int) -> int:
    """How many of the first positions the last query finds rounded, of key or value."""
    if getattr(op, f"wide_{name}") is None:
        return positions
    wide, step = _number(op, f"{name}_wide"), _number(op, f"{name}_step")
    return max(positions - wide, 0) // step * step


def _cached(op: AttentionOp, name: str, value: SSAValue, shapes: Shapes) -> Cached:
    sequences, heads, positions, width = shapes[value]
    held = positions if op.window is None else min(positions, op.window.value.data)
    rounded = max(rounded_positions(op, name, positions) - (positions - held), 0)
    bits = split_bits((sequences, heads, held, width), rounded, element_of(value), _below(value))
    return Cached(
        name=f"{path_of(op.results[0]) or op.name}.{name}",
        format=name_of(element_of(value)),
        sequences=sequences,
        positions=positions,
        held=held,
        rounded=rounded,
        elements=sequences * heads * held * width,
        bits=bits,
        narrow=not is_wide(element_of(value)),
    )


def split_bits(shape: tuple[int, int, int, int], rounded: int, narrow: Attribute, wide: Attribute) -> int:
    """Bits of [batch, heads, positions, width] of which so many positions are in one format, the others in another."""
    sequences, heads, positions, width = shape
    parts = ((narrow, rounded), (wide, positions - rounded))
    return sum(storage_bits(format, (sequences, heads, count, width)) for format, count in parts if count)


def _held(value: SSAValue) -> SSAValue:
    """What of an operand the cache holds: it may be rounded once more where attention reads it."""
    found = value
    while isinstance(found.owner, CastOp) and "cache" not in found.owner.attributes:
        found = found.owner.input
    return found


def _below(value: SSAValue) -> Attribute:
    """The type that the cache's rounding is given."""
    return element_of(value.owner.input) if isinstance(value.owner, CastOp) else element_of(value)


def _number(op: AttentionOp, name: str) -> int:
    number = getattr(op, name)
    return number.value.data if isinstance(number, IntegerAttr) else 0
