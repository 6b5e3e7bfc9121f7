"""Where the inverse of an input scale can be folded: found in the module, by what makes a value and who reads it.

A contraction's input channels are scaled by 1/s and its weight's columns by s. For the function to stay as it is,
every value that is scaled must be made by parameters that can take 1/s, and every reader of it must take s in turn. The
search starts at the contraction's input and lets each operation that a scaled value meets agree (`_scale_rules`).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from xdsl.dialects.func import ReturnOp
from xdsl.ir import Block, Operation, SSAValue

from ..dialects.formats import is_wide
from ..dialects.operations._origin import is_weight
from ..dialects.operations._shapes import element_of
from ..dialects.operations.cast import CastOp
from ..dialects.operations.movement import Movement
from ..dialects.operations.parameter import ParameterOp
from ..dialects.operations.pointwise import AddOp, ConvertOp, MulOp
from ._channels import Channels, Labels, UnfollowedError, along, widened
from ._given import parameter_under
from ._scale_rules import apply_rule
from ._sites import Site, module_name, root, sites_of

TRIES = 32
"""So many ways of choosing factors of products are tried."""


@dataclass(frozen=True, eq=False)
class Place:
    """One operand of one operation that takes a scale: a parameter, `plus` a number, times the numbers of channels.

    `labels` say which channel each element of the operand belongs to, `own` the same for the parameter under it, whose
    layout may be another.
    """

    operation: Operation
    operand: int
    labels: Labels
    own: Labels
    plus: float = 0.0

    @property
    def value(self) -> SSAValue:
        return self.operation.operands[self.operand]

    @property
    def parameter(self) -> ParameterOp:
        """The parameter under the operand now."""
        return parameter_under(self.value)


@dataclass
class Fold:
    """A value's channels, and the parameters that take a scale of them.

    `makers` take 1/s and `readers`, the weights of contractions, take s. `inputs` are what these contractions read,
    each with the labels of its channels, one dimension. `crossed` is every operation between.
    """

    channels: Channels
    makers: list[Place]
    readers: list[Place]
    inputs: list[tuple[Site, Labels]]
    crossed: list[Operation]

    @property
    def into(self) -> str:
        """The modules whose parameters take 1/s."""
        return ", ".join(dict.fromkeys(module_name(place.operation) for place in self.makers))


class _OpenChoiceError(Exception):
    """A product could be scaled by one of several factors."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.count = count


@dataclass
class Region:
    """The values that are scaled in one attempt, with the labels of each; the choices among factors are given."""

    channels: Channels
    choices: Sequence[int]
    makers: dict[tuple[Operation, int], Place] = field(default_factory=dict)
    readers: dict[tuple[Operation, int], Place] = field(default_factory=dict)
    _labels: dict[SSAValue, Labels] = field(default_factory=dict)
    _chosen: dict[Operation, int] = field(default_factory=dict)
    _taken: int = 0
    _waiting: deque[Operation] = field(default_factory=deque)
    _met: dict[Operation, None] = field(default_factory=dict)

    def labels(self, value: SSAValue) -> Labels | None:
        return self._labels.get(value)

    def scale(self, value: SSAValue, labels: Labels) -> None:
        if value in self._labels:
            self.channels.unite(self._labels[value], labels)
        elif not self.channels.is_fixed(labels):
            self._check(value)
            self._labels[value] = labels
            self._waiting += [use.operation for use in value.uses]
            assert isinstance(value.owner, Operation)
            self._waiting.append(value.owner)

    def _check(self, value: SSAValue) -> None:
        if isinstance(value.owner, Block):
            raise UnfollowedError(f"{value.name_hint} is an input of the model")
        if isinstance(value.owner, ParameterOp):
            raise UnfollowedError(f"{value.owner.source.data} is read as it is")
        if not is_wide(element_of(value)) and not isinstance(value.owner, CastOp):
            raise UnfollowedError(f"{module_name(value.owner)} yields {element_of(value)}, and no wide numbers")
        if any(isinstance(use.operation, ReturnOp) for use in value.uses):
            raise UnfollowedError(f"{module_name(value.owner)} is a result of the model")

    def weight(
        self, operation: Operation, value: SSAValue, labels: Labels, *, plus: float = 0.0, reads: bool = False
    ) -> None:
        operand = list(operation.operands).index(value)
        places = self.readers if reads else self.makers
        held = places.get((operation, operand))
        if held is not None:
            self.channels.unite(held.labels, labels)
            return
        if not is_weight(value):
            raise UnfollowedError(f"{module_name(operation)} multiplies by what is computed")
        places[operation, operand] = _place(self.channels, operation, operand, labels, plus)

    def chosen(self, operation: Operation) -> int | None:
        return self._chosen.get(operation)

    def choose(self, operation: Operation, options: Sequence[int]) -> int:
        if operation not in self._chosen:
            choice = 0
            if len(options) > 1:
                if self._taken == len(self.choices):
                    raise _OpenChoiceError(len(options))
                choice, self._taken = self.choices[self._taken], self._taken + 1
            self._chosen[operation] = options[choice]
        return self._chosen[operation]

    def run(self, value: SSAValue, labels: Labels) -> Fold:
        """Scale `value`, and all that must be scaled with it. UnfollowedError says why that cannot be."""
        self.scale(value, labels)
        while self._waiting:
            operation = self._waiting.popleft()
            self._met[operation] = None
            apply_rule(self, operation)
        if self.channels.is_fixed(labels):
            raise UnfollowedError(f"no channel of {value.name_hint} is its own")
        makers, readers = list(self.makers.values()), list(self.readers.values())
        ends = {place.operation for place in (*makers, *readers)}
        between = (operation for operation in self._met if operation not in ends)
        crossed = [operation for operation in between if any(result in self._labels for result in operation.results)]
        return Fold(self.channels, makers, readers, self._inputs(readers), crossed)

    def read_alone(self, sites: Iterable[Site], labels: Labels) -> Fold:
        """The contractions at `sites` take a scale of what they read, which nothing else does."""
        for site in sites:
            self._labels[site.value] = labels
            apply_rule(self, site.operation)
        readers = list(self.readers.values())
        return Fold(self.channels, [], readers, self._inputs(readers), [])

    def _inputs(self, readers: Iterable[Place]) -> list[tuple[Site, Labels]]:
        found = list[tuple[Site, Labels]]()
        for place in readers:
            site = activation_of(place.operation)
            labels, dim = self._labels[site.value], channel_dim(site)
            found.append((site, widened(labels, dim, site.shape[dim]).reshape(-1)))
        return found


def activation_of(operation: Operation) -> Site:
    """What a contraction with a weight reads beside it."""
    return next(site for site in sites_of(operation) if site.role == "activation")


def channel_dim(site: Site) -> int:
    """The dimension of an activation that holds the channels which its contraction sums over."""
    rank = len(site.shape)
    dims = {"conv": 1, "matmul": rank - 1 if site.operand == "input" else max(rank - 2, 0)}
    return dims.get(site.kind, rank - 1)


def find_fold(site: Site) -> Fold:
    """Where a scale of the channels of an activation can be folded. UnfollowedError says why nowhere."""
    channels, labels = channels_of(site)
    reasons = dict[str, None]()
    open_choices: list[tuple[int, ...]] = [()]
    for _ in range(TRIES):
        if not open_choices:
            break
        choices = open_choices.pop()
        try:
            return Region(Channels(channels.count), choices).run(root(site.value), labels)
        except _OpenChoiceError as choice:
            open_choices += [(*choices, index) for index in reversed(range(choice.count))]
        except UnfollowedError as error:
            reasons[str(error)] = None
    raise UnfollowedError("; ".join(list(reasons)[:2]))


def without_fold(sites: Sequence[Site]) -> Fold:
    """Contractions that read one value, their weights alone: the value itself is then scaled on its way to them."""
    channels, labels = channels_of(sites[0])
    return Region(channels, ()).read_alone(sites, labels)


def channels_of(site: Site) -> tuple[Channels, Labels]:
    """The channels that a contraction sums over, and their labels. UnfollowedError where their number is not known."""
    dim = channel_dim(site)
    if site.shape[dim] < 1:
        raise UnfollowedError(f"{site.name} has a number of channels that is not known")
    return Channels(site.shape[dim]), along(site.shape[dim], dim, len(site.shape))


def _place(channels: Channels, operation: Operation, operand: int, labels: Labels, plus: float) -> Place:
    """Follow an operand's labels to its parameter. UnfollowedError where it is computed in another way, or packed."""
    value, own = operation.operands[operand], labels
    while not isinstance(value.owner, ParameterOp):
        owner = value.owner
        if isinstance(owner, AddOp | MulOp) and owner.scalar is not None:
            factor = owner.scalar.value.data
            plus = plus / factor if isinstance(owner, MulOp) else plus + factor
        elif not isinstance(owner, CastOp | ConvertOp | Movement):
            raise UnfollowedError(f"the weight of {module_name(operation)} is computed in the model")
        else:
            own = _backward(channels, value, own)
        value = owner.operands[0]
    if not is_wide(element_of(value)):
        raise UnfollowedError(
            f"the codes of {value.owner.source.data} are decided: passes that choose codes or scales come later"
        )
    return Place(operation, operand, labels, own, plus)


def _backward(channels: Channels, value: SSAValue, labels: Labels) -> Labels:
    """The labels of what one operation of a weight's layout reads to make `value`."""
    owner = value.owner
    assert isinstance(owner, Operation)
    layout = _Layout(channels, {value: labels})
    apply_rule(layout, owner)
    found = layout.found.get(owner.operands[0])
    if found is None:
        raise UnfollowedError(f"{module_name(owner)} lays a weight out in a way that is not followed")
    return found


@dataclass
class _Layout:
    """The values of a weight's layout: no choice is open among them."""

    channels: Channels
    found: dict[SSAValue, Labels]

    def labels(self, value: SSAValue) -> Labels | None:
        return self.found.get(value)

    def scale(self, value: SSAValue, labels: Labels) -> None:
        self.found.setdefault(value, labels)

    def weight(
        self, operation: Operation, value: SSAValue, labels: Labels, *, plus: float = 0.0, reads: bool = False
    ) -> None:
        self.found.setdefault(value, labels)

    def chosen(self, operation: Operation) -> int | None:
        return None

    def choose(self, operation: Operation, options: Sequence[int]) -> int:
        return options[0]
