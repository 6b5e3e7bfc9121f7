"""New values for weights: each reader is given what it needs, and who reads a weight in another role keeps the old."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from xdsl.dialects.builtin import ModuleOp, StringAttr, TensorType, f32
from xdsl.ir import Block, Operation, SSAValue
from xdsl.rewriter import InsertPoint, Rewriter

from ..dialects.errors import UsageError
from ..dialects.formats import is_wide
from ..dialects.hadamard import hadamard
from ..dialects.instances import name_of
from ..dialects.operations._shapes import element_of, shape_of
from ..dialects.operations._values import element_type, hint_of, path_of
from ..dialects.operations.cast import CastOp
from ..dialects.operations.contraction import EmbeddingOp
from ..dialects.operations.parameter import ParameterOp
from ._given import erase_unused
from ._sites import module_name, operand_names, root

if TYPE_CHECKING:
    from torch import Tensor

    from ..backends.weight_store import WeightStore

Read = tuple[Operation, int]
"""An operation that reads a weight, and the place among its operands."""


class Step(Protocol):
    """What is done to a weight in f64; `stored` are the weights as they were."""

    def __call__(self, weight: Tensor, stored: WeightStore) -> Tensor: ...


@dataclass(frozen=True)
class Rotation:
    """Each run of `size` numbers along `dim` times the Hadamard matrix of `mx.hadamard`."""

    dim: int
    size: int
    seed: int | None

    def __call__(self, weight: Tensor, stored: WeightStore) -> Tensor:
        return hadamard(weight, self.size, self.dim, self.seed)


@dataclass(frozen=True)
class Gain:
    """Each number along `dim` times the gain of a norm: its weight, or 1 + weight (`unit_offset`)."""

    dim: int
    source: str
    unit_offset: bool

    def __call__(self, weight: Tensor, stored: WeightStore) -> Tensor:
        gain = stored.wide(self.source).double()
        shape = (-1, *(1,) * (-1 - self.dim))
        return weight * (1 + gain if self.unit_offset else gain).reshape(shape)


@dataclass(frozen=True)
class Constant:
    """Every number replaced by one."""

    number: float

    def __call__(self, weight: Tensor, stored: WeightStore) -> Tensor:
        return weight.new_full(weight.shape, self.number)


@dataclass
class NewWeights:
    """What is to be done to the weights that operations read, gathered first and carried out at once."""

    suffix: str
    steps: dict[Read, list[Step]] = field(default_factory=dict)

    def add(self, operation: Operation, operand: str, *steps: Step) -> None:
        """Do more to the weight that an operation reads as `operand`."""
        self.steps.setdefault((operation, operand_names(operation).index(operand)), []).extend(steps)

    def apply(self, module: ModuleOp, weights: WeightStore) -> None:
        """Put the new values into the store, in f32.

        Readers that want different things of one weight get a parameter of their own each, named after the old with
        the suffix behind it, but for one group that keeps the name: those that want nothing, else a look-up's.
        """
        stored = weights.copy()
        parameters: dict[str, list[ParameterOp]] = {}
        for op in module.walk():
            if isinstance(op, ParameterOp):
                parameters.setdefault(weights.canonical(op.source.data), []).append(op)
        for source, ops in parameters.items():
            groups: dict[tuple[Step, ...], list[Read]] = {}
            for op in ops:
                for read in reads_of(op.result):
                    groups.setdefault(tuple(self.steps.get(read, ())), []).append(read)
            kept = _kept(groups)
            for steps, reads in groups.items():
                if steps:
                    self._change(source, steps, reads, weights, stored, in_place=reads is kept)

    def _change(
        self,
        source: str,
        steps: tuple[Step, ...],
        reads: list[Read],
        weights: WeightStore,
        stored: WeightStore,
        *,
        in_place: bool,
    ) -> None:
        for operation, place in reads:
            check_unfitted(operation.operands[place])
        values = stored.wide(source).double()
        for step in steps:
            values = step(values, stored)
        values = values.float().contiguous()
        if in_place:
            replace_values(weights, source, values)
            return
        name = free_name(f"{source}.{self.suffix}", weights)
        weights.put(name, values)
        operation, place = reads[0]
        made = parameter(name, values, before=root(operation.operands[place]).owner)
        for operation, place in reads:
            set_operand(operation, place, recast(operation.operands[place], made))


def _kept(groups: dict[tuple[Step, ...], list[Read]]) -> list[Read] | None:
    """Those readers whose values stand under the weight's own name."""
    if () in groups:
        return groups[()]
    every = list(groups.values())
    return next((r for r in every if any(isinstance(op, EmbeddingOp) for op, _ in r)), every[0] if every else None)


def replace_values(weights: WeightStore, name: str, values: Tensor) -> None:
    """New values under all names of a weight."""
    kept = weights.canonical(name)
    others = [alias for alias, target in weights.aliases.items() if target == kept]
    weights.put(kept, values)
    for other in others:
        weights.alias(other, kept)


def parameter(name: str, values: Tensor, *, before: Operation | Block) -> SSAValue:
    """A new parameter of the module, before an operation: f32 where its values are floats, else as they are."""
    element = f32 if values.is_floating_point() else element_type(values.dtype)
    made = ParameterOp.build(
        result_types=[TensorType(element, tuple(values.shape))], properties={"source": StringAttr(name)}
    )
    made.result.name_hint = hint_of(name)
    where = InsertPoint.at_start(before) if isinstance(before, Block) else InsertPoint.before(before)
    Rewriter.insert_op(made, where)
    return made.result


def free_name(wanted: str, weights: WeightStore) -> str:
    """`wanted`, or with a number behind it where that is taken."""
    name, count = wanted, 1
    while name in weights or weights.parts(name):
        name, count = f"{wanted}_{count}", count + 1
    return name


def reads_of(value: SSAValue) -> Iterator[Read]:
    """Who reads a value, through whatever casts."""
    for use in list(value.uses):
        if isinstance(use.operation, CastOp) and use.index == 0:
            yield from reads_of(use.operation.result)
        else:
            yield use.operation, use.index


def plain_weight(operation: Operation, operand: str) -> ParameterOp | None:
    """The wide parameter that an operation reads as it lies in the store, casts aside; None where there is none."""
    value = getattr(operation, operand)
    owner = root(value).owner if isinstance(value, SSAValue) else None
    return owner if isinstance(owner, ParameterOp) and is_wide(element_of(owner.result)) else None


def check_undecided(operation: Operation, operand: str, pass_name: str) -> None:
    """UsageError where a weight is codes already, which nobody can give other values."""
    value = getattr(operation, operand)
    owner = root(value).owner
    if isinstance(owner, ParameterOp) and not is_wide(element_of(owner.result)):
        raise UsageError(
            f"{pass_name}: the codes of the weight of {module_name(operation)} are decided already. It changes "
            "weights, and stands before passes that choose scales or codes; it works on models, not on artefacts"
        )


def recast(value: SSAValue, base: SSAValue) -> SSAValue:
    """`base` under the casts that stand over the root of `value`; those that stand over `base` already are shared.

    UsageError for a cast that was fitted to the numbers of `value`.
    """
    check_unfitted(value)
    if not isinstance(value.owner, CastOp):
        return base
    return _same_cast(value.owner, recast(value.owner.input, base))


def set_operand(operation: Operation, place: int, value: SSAValue) -> None:
    """Let an operation read another value; what nobody reads any more goes."""
    old = operation.operands[place]
    operation.operands[place] = value
    if isinstance(old.owner, Operation) and not any(result.uses for result in old.owner.results):
        erase_unused(old.owner)


def check_unfitted(value: SSAValue) -> None:
    """UsageError where a cast over the root of a value was fitted to the numbers that it rounds."""
    while isinstance(value.owner, CastOp):
        if value.owner.sensitivity is not None or value.owner.clip is not None:
            raise UsageError(
                f"the cast %{value.name_hint or '?'} was fitted to values that change now: "
                "passes that fit casts stand behind those that change values"
            )
        value = value.owner.input


def _same_cast(cast: CastOp, base: SSAValue) -> SSAValue:
    """`base` rounded as a cast rounds its input: by the cast that does so already, or by a new one."""
    format = element_of(cast.result)
    for use in base.uses:
        other = use.operation
        if (
            isinstance(other, CastOp)
            and element_of(other.result) == format
            and other.properties == cast.properties
            and other.attributes == cast.attributes
        ):
            return other.result
    made = CastOp.build(
        operands=[base, None],
        result_types=[TensorType(format, shape_of(base))],
        properties=dict(cast.properties),
        attributes=dict(cast.attributes),
    )
    made.result.name_hint = hint_of(f"{path_of(base)}.{name_of(format)}") if base.name_hint else None
    owner = base.owner
    Rewriter.insert_op(made, InsertPoint.at_start(owner) if isinstance(owner, Block) else InsertPoint.after(owner))
    return made.result
