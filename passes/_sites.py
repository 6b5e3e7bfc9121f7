"""Sites: the values of a module whose number format a pass may change."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal, cast

from xdsl.dialects.builtin import (
    FloatAttr,
    IndexType,
    IntegerAttr,
    IntegerType,
    ModuleOp,
    StringAttr,
    TensorType,
    UnitAttr,
)
from xdsl.ir import Attribute, Block, Operation, SSAValue
from xdsl.rewriter import InsertPoint, Rewriter

from ..dialects.errors import UsageError
from ..dialects.formats import Rounding, default_scale_rule, is_wide
from ..dialects.instances import format_of, name_of
from ..dialects.operations._origin import parameters_of
from ..dialects.operations._values import hint_of, path_of
from ..dialects.operations.attention import AttentionOp
from ..dialects.operations.cast import CastOp
from ..dialects.operations.contraction import Contraction, EmbeddingOp, MatmulOp, is_outer_product, weights_of

Role = Literal["weight", "activation", "attention", "cache"]

ROLES: tuple[Role, ...] = ("weight", "activation", "attention", "cache")


@dataclass(frozen=True)
class Site:
    """One operand of one operation: where a cast may stand.

    `role` says what the value is: a `weight` (it follows from parameters alone, in whatever layout), an `activation`
    (it meets a weight), an `attention` operand (query, key, value, the probabilities, or both sides of a product of
    two computed values), or the `cache` (key and value as a cache would hold them, rounded before attention reads
    them).
    """

    operation: Operation
    operand: str
    role: Role

    @property
    def module(self) -> str:
        """The model's module that the operation belongs to: `model.layers.0.self_attn.q_proj`."""
        return module_name(self.operation)

    @property
    def kind(self) -> str:
        """The operation's mnemonic: `linear`, `conv`, `matmul`, `attention`, `embedding` ..."""
        return self.operation.name.removeprefix("mx.")

    @property
    def name(self) -> str:
        return f"{self.module}.{'cache.' if self.role == 'cache' else ''}{self.operand}"

    @property
    def is_probabilities(self) -> bool:
        """Attention's probabilities are no value of the module: their format is a property of the operation."""
        return self.operand == "probabilities"

    @property
    def value(self) -> SSAValue:
        """The operand as the operation reads it now, casts included. Raises TypeError for the probabilities."""
        if self.is_probabilities:
            raise TypeError(f"{self.name} is inside the operation and no value of the module")
        return cast(SSAValue, getattr(self.operation, self.operand))

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes as the type states them; a dynamic one is -1."""
        if self.is_probabilities:
            query, key = _shape(cast(AttentionOp, self.operation).query), _shape(cast(AttentionOp, self.operation).key)
            return (*query[:-1], key[-2])
        return _shape(self.value)

    @property
    def group(self) -> str:
        """Sites of one decision: what reads one value (q, k and v; gate and up), and the weights that meet it there."""
        if self.role == "weight" and not isinstance(self.operation, EmbeddingOp):
            others = [s for s in sites_of(self.operation) if s.role == "activation"]
            return f"weights of {others[0].group}" if others else self.name
        if self.is_probabilities:
            return self.name
        source = root(self.value)
        return source.name_hint or f"{module_name(self.operation)}.{self.operand}"

    @property
    def read(self) -> SSAValue:
        """The operand in the format of this site: what attention reads may be rounded once more behind the cache."""
        return _under_attention(self.value) if self.role == "cache" else self.value

    @property
    def format(self) -> Attribute:
        """The format that the operation reads here now."""
        if self.is_probabilities:
            probabilities = cast(AttentionOp, self.operation).probabilities
            return (
                cast(TensorType, cast(AttentionOp, self.operation).query.type).element_type
                if probabilities is None
                else probabilities
            )
        return cast(TensorType, self.read.type).element_type

    @property
    def is_wide(self) -> bool:
        return is_wide(self.format) if self.role != "cache" else not _is_cache(self.read)

    @property
    def rule(self) -> int | None:
        """Which rule decided about the operation (counted from 1 in the order in which the passes ran), if one did."""
        decided = self.operation.attributes.get("rule")
        return decided.value.data if isinstance(decided, IntegerAttr) else None

    def rounded(self) -> str | None:
        """Why no format can be given any more: the value itself is narrow, as in an artefact. None where it is wide.

        A cast can be replaced: what it rounds is still there. What is stored or yielded in a format is all there is:
        another format would round it a second time, cost what it costs, and bring nothing back.
        """
        if self.is_probabilities:
            return None
        values = [root(self.value), *(parameter.result for parameter in parameters_of(self.value))]
        formats = [cast(TensorType, value.type).element_type for value in values]
        narrow = next((format for format in formats if not is_wide(format)), None)
        if narrow is None:
            return None
        return (
            f"is {name_of(narrow)} already, and no wide values stand behind it: another format would round it twice; "
            "give the format when the model is compiled"
        )

    def layout(self, format: str, dims: Sequence[int] | None = None) -> Attribute:
        """The type of a named format, laid out for this operand: blocks run along `dims`, or what is summed over."""
        return format_of(format, rank=len(self.shape), dims=dims or self._reduced())

    def retype(self, format: str, how: Rounding | None = None, dims: Sequence[int] | None = None) -> None:
        """Round this operand into `format`; readers of one value that round it alike share one cast.

        UsageError where the value under all casts is narrow already (`rounded`).
        """
        if reason := self.rounded():
            raise UsageError(f"{self.name} {reason}")
        type, how = self.layout(format, dims), how or Rounding()
        how = replace(how, scale_rule=how.scale_rule or default_scale_rule(type))
        if self.is_probabilities:
            set_probabilities(cast(AttentionOp, self.operation), type, how)
            return
        value = self.value
        if self.role == "cache":
            self._set(self.operand, rounded_alike(value, _cast_of(root(value), type, how, cache=True)))
        elif self.role == "attention":
            self._set(self.operand, _cast_of(_under_attention(value), type, how))
            if isinstance(newest := getattr(self.operation, f"wide_{self.operand}", None), SSAValue):
                self._set(f"wide_{self.operand}", _cast_of(root(newest), type, how))
        else:
            self._set(self.operand, _cast_of(root(value), type, how))

    def _set(self, operand: str, value: SSAValue) -> None:
        """Let the operation read another value in the operand of that name (one value may stand in two operands)."""
        place = operand_names(self.operation).index(operand)
        old = self.operation.operands[place]
        self.operation.operands[place] = value
        _drop_unused(old)

    def _owns(self, index: int) -> bool:
        """Whether operand `index` is the one called `self.operand`."""
        return operand_names(self.operation)[index] == self.operand

    def _reduced(self) -> tuple[int, ...]:
        """What blocks run along."""
        if isinstance(self.operation, EmbeddingOp):
            return (-1,)
        return cast(Contraction, self.operation).reduced()[self.operand]


def sites(module: ModuleOp, *, kind: str | None = None) -> list[Site]:
    """Every site of the module in the order of its operations; of one kind of operation where `kind` is given."""
    found = (site for op in module.walk() if isinstance(op, (Contraction, EmbeddingOp)) for site in sites_of(op))
    return [site for site in found if kind is None or site.kind == kind]


def sites_of(operation: Operation) -> Iterator[Site]:
    """The sites of one operation."""
    if isinstance(operation, EmbeddingOp):
        yield Site(operation, "weight", "weight")
        return
    if not isinstance(operation, Contraction):
        return
    if is_outer_product(operation):
        return
    weights = weights_of(operation)
    computed = isinstance(operation, AttentionOp) or (isinstance(operation, MatmulOp) and not weights)
    for operand in operation.reduced():
        if operand != "probabilities" and not _is_float(getattr(operation, operand)):
            continue
        yield Site(operation, operand, "weight" if operand in weights else "attention" if computed else "activation")
    if isinstance(operation, AttentionOp):
        yield Site(operation, "key", "cache")
        yield Site(operation, "value", "cache")


def module_name(operation: Operation) -> str:
    """The name of the model's module that an operation stands for, from the name of its first result."""
    return path_of(operation.results[0]) or f"{operation.name.removeprefix('mx.')}_{_position(operation)}"


def root(value: SSAValue) -> SSAValue:
    """The value under all casts."""
    while isinstance(value.owner, CastOp):
        value = value.owner.input
    return value


def rounding_properties(how: Rounding) -> dict[str, Attribute]:
    """A way of rounding as properties of a cast; the scale rule is always written out."""
    properties: dict[str, Attribute] = {"rounding": StringAttr(how.rounding)}
    if how.scale_rule is not None:
        properties["scale_rule"] = StringAttr(how.scale_rule)
    if how.clip is not None:
        properties["clip"] = FloatAttr(how.clip, 64)
    if how.threshold is not None:
        properties["threshold"] = FloatAttr(how.threshold, 64)
    if how.seed or how.rounding == "stochastic":
        properties["seed"] = IntegerAttr(how.seed, 64)
    return properties


def _position(operation: Operation) -> int:
    block = operation.parent
    return 0 if block is None else block.get_operation_index(operation)


def _shape(value: SSAValue) -> tuple[int, ...]:
    return cast(TensorType, value.type).get_shape()


def _is_float(value: SSAValue) -> bool:
    """Whether the values are numbers that a format can hold: a product of integers stays one."""
    return not isinstance(cast(TensorType, value.type).element_type, IntegerType | IndexType)


def operand_names(operation: Operation) -> list[str]:
    """The declared field of each operand, in order."""
    names: list[str] = []
    for field in operation.get_irdl_definition().operands:  # pyright: ignore[reportAttributeAccessIssue]
        held = getattr(operation, field[0])
        names += [field[0]] * (0 if held is None else 1 if isinstance(held, SSAValue) else len(held))
    return names


def _is_cache(value: SSAValue) -> bool:
    return isinstance(value.owner, CastOp) and "cache" in value.owner.attributes


def _under_attention(value: SSAValue) -> SSAValue:
    """The value under the cast that attention reads: the cache's where there is one, else the root."""
    while isinstance(value.owner, CastOp) and not _is_cache(value):
        value = value.owner.input
    return value


def rounded_alike(value: SSAValue, base: SSAValue) -> SSAValue:
    """`base` under the casts with which attention rounds `value`, behind the cache."""
    owner = value.owner
    if not isinstance(owner, CastOp) or _is_cache(value):
        return base
    return _cast_of(rounded_alike(owner.input, base), owner.result.type.element_type, owner.how())


def _cast_of(value: SSAValue, format: Attribute, how: Rounding, *, cache: bool = False) -> SSAValue:
    """`value` rounded into `format`: the cast that stands there already, or a new one right behind the value."""
    for use in value.uses:
        op = use.operation
        if (
            isinstance(op, CastOp)
            and op.result.type.element_type == format
            and op.how() == how
            and op.sensitivity is None
            and _is_cache(op.result) == cache
        ):
            return op.result
    type = cast(TensorType, value.type)
    new = CastOp.build(
        operands=[value, None],
        result_types=[TensorType(format, type.get_shape())],
        properties=rounding_properties(how),
    )
    if cache:
        new.attributes["cache"] = UnitAttr()
    new.result.name_hint = hint_of(f"{value.name_hint}.{name_of(format)}") if value.name_hint else None
    where = InsertPoint.at_start(value.owner) if isinstance(value.owner, Block) else InsertPoint.after(value.owner)
    Rewriter.insert_op(new, where)
    return new.result


def _drop_unused(value: SSAValue) -> None:
    while isinstance(value.owner, CastOp) and not value.uses:
        unused, value = value.owner, value.owner.input
        Rewriter.erase_op(unused)


def set_probabilities(operation: AttentionOp, format: Attribute, how: Rounding) -> None:
    """Let attention round its probabilities into a format."""
    operation.properties["probabilities"] = format
    operation.properties |= {k: v for k, v in rounding_properties(how).items() if k in ("scale_rule", "rounding")}
