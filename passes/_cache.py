"""How a cache keeps keys and values: what one scale stands for, and which of the newest positions stay wide."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

from xdsl.dialects.builtin import DYNAMIC_INDEX, DenseArrayBase, IntegerAttr, NoneAttr, i32
from xdsl.ir import Attribute, SSAValue

from ..dialects.errors import UsageError, did_you_mean
from ..dialects.formats import BlockType, Rounding
from ..dialects.instances import format_of
from ..dialects.operations._assembly import operand_fields
from ..dialects.operations.attention import AttentionOp
from ._sites import Site, root, rounded_alike

PER = {"token": (-1,), "channel": (-2,)}
"""Along which dimension of [batch, heads, positions, width] the blocks run that have one scale per token, channel."""


@dataclass(frozen=True)
class Kept:
    """A format of the cache, for keys or for values.

    `per` is "token" (blocks along the width of a head, which is the default) or "channel" (blocks of successive
    positions, for each channel of each head). The newest `wide` positions stay as they were computed, and the others
    are rounded `step` at a time: the positions of one block where it is left out. `torch_operators.narrowed` says
    which positions a query so finds rounded. KIVI (arXiv 2402.02750) with a residual of R positions is `step` = R for
    keys per channel and `wide` = R for values per token.
    """

    format: str
    per: str | None = None
    wide: int | None = None
    step: int | None = None

    def check(self, what: str) -> None:
        """Raise UsageError for what no operand can make right; `what` is `keys` or `values`."""
        if self.per is not None:
            if self.per not in PER:
                raise UsageError(f"{what}_per={self.per!r}: token or channel{did_you_mean(self.per, PER)}")
            type = format_of(self.format)
            if not isinstance(type, BlockType):
                raise UsageError(f"{what}_per={self.per!r} has no effect: {self.format} has no scales")
            if len(set(_given_dims(self.format))) > 1:
                raise UsageError(f"{what}_per={self.per!r} has no effect: {self.format} says itself how its blocks lie")
        if self.wide is not None and self.wide < 0:
            raise UsageError(f"{what}_wide={self.wide}: a number of positions, 0 or more")
        if self.step is not None and self.step < 1:
            raise UsageError(f"{what}_step={self.step}: a number of positions, 1 or more")

    @property
    def dims(self) -> Sequence[int]:
        return PER[self.per or "token"]

    def layout(self, site: Site) -> Attribute:
        """The type of the rounded operand."""
        return site.layout(self.format, self.dims)

    def steps(self, site: Site) -> int:
        """How many positions are rounded at a time, 1 where each is by itself; 0 where every position is rounded with
        all others. UsageError where that contradicts what is stated, or a position would look at later ones.
        """
        what, named, type = f"{site.operand}s", self.format, self.layout(site)
        together = _positions(type)
        if together == 0:
            if self.per == "channel" or self.wide or self.step:
                raise UsageError(
                    f"{site.name}: {named} has a scale over all positions, which each new one would change: give the "
                    "cache groups, such as int4_g32"
                )
            return 0
        step = together if self.step is None else self.step
        if step % together:
            raise UsageError(f"{what}_step={step}: {named} rounds {together} positions together; give a multiple")
        if (step > 1 or self.wide) and cast(AttentionOp, site.operation).causal is None:
            raise UsageError(
                f"{site.name}: {site.module} is not known to be causal, so that no position is newer than another: "
                f"leave out {what}_wide and {what}_step, and round {what} per token"
            )
        return step

    def keep(self, site: Site, how: Rounding) -> None:
        """Round the operand of a `cache` site so."""
        step, wide = self.steps(site), self.wide or 0
        site.retype(self.format, how, self.dims)
        newest = rounded_alike(site.value, root(site.value)) if step > 1 or wide else None
        set_newest(cast(AttentionOp, site.operation), site.operand, newest, wide, step)


def kept_by(rule: Any) -> dict[str, Kept]:
    """How a rule keeps `keys` and `values`, where it says so. Raises UsageError for what has no effect.

    `rule` has the options that `quantize` has for the cache.
    """
    if rule.cache and rule.cache_keys and rule.cache_values:
        raise UsageError("cache has no effect beside cache_keys and cache_values: leave it out")
    found: dict[str, Kept] = {}
    for what in ("keys", "values"):
        own = {name: getattr(rule, f"{what}_{name}") for name in ("per", "wide", "step")}
        format = getattr(rule, f"cache_{what}") or rule.cache
        if format is None:
            if stated := [name for name, value in own.items() if value is not None]:
                raise UsageError(f"{what}_{stated[0]} has no effect without a format: give cache or cache_{what}")
            continue
        found[what] = Kept(format, **own)
        found[what].check(what)
    return found


def _given_dims(format: str) -> tuple[int, ...]:
    type = format_of(format, rank=1)
    return type.dims if isinstance(type, BlockType) else ()


def _positions(type: Attribute) -> int:
    """How many positions one scale of [batch, heads, positions, width] spans; 0 where it spans all, or sequences."""
    if not isinstance(type, BlockType):
        return 1
    sequences, _, positions, _ = (1, 1, 1, 1, *type.dims)[-4:]
    if type.tensor_scale != NoneAttr() or sequences != 1 or positions == DYNAMIC_INDEX:
        return 0
    return positions


def set_newest(operation: AttentionOp, name: str, newest: SSAValue | None, wide: int = 0, step: int = 1) -> None:
    """Let attention read the newest positions of key or value from `newest`; None: all from key or value."""
    held: dict[str, SSAValue | None] = {field: getattr(operation, field) for field, _ in operand_fields(AttentionOp)}
    held[f"wide_{name}"] = newest
    operation.operands = [value for value in held.values() if value is not None]
    sizes = DenseArrayBase.from_list(i32, [int(value is not None) for value in held.values()])
    operation.properties["operandSegmentSizes"] = sizes
    for what, number in (("wide", wide), ("step", step)):
        operation.properties.pop(f"{name}_{what}", None)
        if newest is not None:
            operation.properties[f"{name}_{what}"] = IntegerAttr(number, 64)
