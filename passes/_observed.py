"""What is observed of a module: which values, as which operations read them, and which site asks for what."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import cast

from xdsl.dialects.builtin import ModuleOp
from xdsl.ir import Operation, SSAValue

from ..dialects.operations._shapes import UNKNOWN, product, shape_of
from ..dialects.operations.attention import AttentionOp
from ..dialects.operations.cast import CastOp
from ..dialects.operations.contraction import Contraction, ConvOp, EmbeddingOp, ExpertLinearOp
from ._sites import Role, Site, root, sites, sites_of

Shape = tuple[int, ...]

Reader = tuple[Operation, int]
"""An operation and the place of one of its operands."""


@dataclass(frozen=True, eq=False)
class Values:
    """A value that is no weight, and how its channels lie: along `channel`, counted from the end.

    With `heads` (operands of attention, [batch, heads, positions, width]) every head has channels of its own.
    """

    key: str
    value: SSAValue
    channel: int
    heads: bool

    @property
    def shape(self) -> Shape:
        """Of the statistics: [channels], [heads, channels], or [1] where the number of channels changes."""
        sizes = shape_of(self.value)
        found = (sizes[1], sizes[-1]) if self.heads else (sizes[self.channel],)
        return (1,) if UNKNOWN in found else found


@dataclass(frozen=True, eq=False)
class Products:
    """The second moment of the rows that one operation, or several alike, multiplies with its weight."""

    key: str
    operation: Contraction
    operand: str

    @property
    def value(self) -> SSAValue:
        return root(getattr(self.operation, self.operand))

    @property
    def parts(self) -> int:
        """Independent matrices: one for each expert, and for each group of a convolution."""
        if isinstance(self.operation, ExpertLinearOp):
            return shape_of(self.operation.weight)[0]
        return self.operation._groups() if isinstance(self.operation, ConvOp) else 1

    @property
    def size(self) -> int:
        """Rows and columns of the matrix: what one output sums over."""
        if isinstance(self.operation, ConvOp):
            return product(shape_of(self.operation.weight)[1:])
        reduced = self.operation.reduced()
        sizes = [shape_of(getattr(self.operation, name))[dims[0]] for name, dims in reduced.items()]
        return max(sizes)


@dataclass(frozen=True, eq=False)
class Gradients:
    """A value as the contractions that read it see it together: the loss is differentiated there.

    A weight is taken as it is read, casts included (a cast passes gradients straight through), any other value under
    its casts. `readers` are the places (operation, operand number) where it is read: the contractions, or their casts.
    """

    key: str
    role: Role
    value: SSAValue
    channel: int
    heads: bool
    is_table: bool
    readers: list[Reader] = field(default_factory=list)

    @property
    def is_weight(self) -> bool:
        return self.role == "weight"

    @property
    def shape(self) -> Shape:
        if self.is_weight:
            return shape_of(self.value)
        return Values(self.key, self.value, self.channel, self.heads).shape


@dataclass
class Asked:
    """What one site asks for, by key."""

    values: list[str] = field(default_factory=list)
    products: list[str] = field(default_factory=list)
    gradients: str | None = None

    def of(self, kind: str) -> list[str]:
        """The keys of one kind of statistics."""
        if kind == "fisher":
            return [self.gradients] if self.gradients is not None else []
        return self.values if kind == "ranges" else self.products


@dataclass
class Plan:
    """Everything that is observed of a module; `asked` by the operation and operand of each site."""

    module: ModuleOp
    values: dict[str, Values] = field(default_factory=dict)
    products: dict[str, Products] = field(default_factory=dict)
    gradients: dict[str, Gradients] = field(default_factory=dict)
    asked: dict[tuple[Operation, str], Asked] = field(default_factory=dict)

    def at(self, operation: Operation) -> tuple[list[Values], list[Products]]:
        """What is observed when an operation runs."""
        return self._values_at.get(operation, []), self._products_at.get(operation, [])

    @property
    def operands(self) -> dict[Operation, list[str]]:
        """The operands of each operation that are sites."""
        found: dict[Operation, list[str]] = {}
        for operation, operand in self.asked:
            found.setdefault(operation, []).append(operand)
        return found

    def __post_init__(self) -> None:
        self._values_at: dict[Operation, list[Values]] = {}
        self._products_at: dict[Operation, list[Products]] = {}


def plan_of(module: ModuleOp) -> Plan:
    """What there is to observe of a module: each value once, however many operations read it in the same way."""
    return _Planner(module).plan


class _Planner:
    def __init__(self, module: ModuleOp) -> None:
        self.plan = Plan(module)
        self._known: dict[tuple[object, ...], str] = {}
        self._taken: set[tuple[object, str]] = set()
        every = [site for site in sites(module) if not site.is_probabilities]
        for site in every:
            if site.role != "cache":
                self.plan.asked[site.operation, site.operand] = Asked()
        for site in every:
            if site.role != "cache":
                self._add(site)
        self._share_weights(every)

    def _add(self, site: Site) -> None:
        asked = self.plan.asked[site.operation, site.operand]
        value, along = root(site.value), site._reduced()
        is_table, heads = isinstance(site.operation, EmbeddingOp), isinstance(site.operation, AttentionOp)
        channel = -1 if heads else along[0]
        asked.gradients = self._gradients(site, value, channel, heads, is_table)
        if site.role != "weight":
            asked.values = [self._values(site, value, channel, heads)]
        if site.role == "activation":
            asked.products = [self._products(site, value)]

    def _values(self, site: Site, value: SSAValue, channel: int, heads: bool) -> str:
        place = ("values", value, channel, heads)
        if place not in self._known:
            key = self._name(place, site.name)
            self.plan.values[key] = found = Values(key, value, channel, heads)
            self.plan._values_at.setdefault(site.operation, []).append(found)
        return self._known[place]

    def _products(self, site: Site, value: SSAValue) -> str:
        place = ("products", value, *geometry(cast(Contraction, site.operation), site.operand))
        if place not in self._known:
            key = self._name(place, site.name)
            self.plan.products[key] = found = Products(key, cast(Contraction, site.operation), site.operand)
            self.plan._products_at.setdefault(site.operation, []).append(found)
        return self._known[place]

    def _gradients(self, site: Site, value: SSAValue, channel: int, heads: bool, is_table: bool) -> str:
        value = site.value if site.role == "weight" else value
        kind = (heads, None if site.role == "weight" else channel)
        place = ("gradients", value, site.role, is_table, *kind)
        if place not in self._known:
            key = self._name(place, site.name)
            self.plan.gradients[key] = Gradients(key, site.role, value, channel, heads, is_table)
        found = self.plan.gradients[self._known[place]]
        found.readers.extend(reader for reader in _readers(site) if reader not in found.readers)
        return found.key

    def _name(self, place: tuple[object, ...], name: str) -> str:
        """A key for a place: the name of the first site there, with a number behind it where that is taken."""
        key, number = name, 1
        while (place[0], key) in self._taken:
            number += 1
            key = f"{name}#{number}"
        self._taken.add((place[0], key))
        self._known[place] = key
        return key

    def _share_weights(self, every: Iterable[Site]) -> None:
        """A weight is asked about all rows it meets: those of every operation that reads it."""
        together: dict[str, list[Asked]] = {}
        for site in every:
            if site.role == "weight":
                asked = self.plan.asked[site.operation, site.operand]
                together.setdefault(cast(str, asked.gradients), []).append(asked)
                for other in sites_of(site.operation):
                    if other.role == "activation":
                        met = self.plan.asked[site.operation, other.operand]
                        asked.values, asked.products = list(met.values), list(met.products)
        for group in together.values():
            values = list(dict.fromkeys(key for asked in group for key in asked.values))
            products = list(dict.fromkeys(key for asked in group for key in asked.products))
            for asked in group:
                asked.values, asked.products = values, products


def geometry(operation: Contraction, operand: str) -> tuple[object, ...]:
    """How an operation takes rows from a value: operations that multiply the same rows of one value have the same."""
    if isinstance(operation, ConvOp):
        window = tuple(tuple(operation.per_dimension(name)) for name in ("stride", "padding", "dilation"))
        return ("conv", shape_of(operation.weight)[1:], *window, operation._groups())
    if isinstance(operation, ExpertLinearOp):
        return ("experts", operation.index, shape_of(operation.weight)[0])
    return ("rows", operation.reduced()[operand])


def _readers(site: Site) -> list[Reader]:
    """Where a contraction's operand leaves its root: at the contraction, or at the first of its casts.

    A weight's is at the contraction.
    """
    reader: Operation = site.operation
    value, base = site.value, site.value if site.role == "weight" else root(site.value)
    while value is not base:
        reader = cast(CastOp, value.owner)
        value = reader.input
    if reader is not site.operation:
        return [(reader, 0)]
    return [(reader, i) for i, operand in enumerate(reader.operands) if operand is base and site._owns(i)]
