"""Parameters times numbers, each for its own readers alone: in place where no one else reads them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
from xdsl.dialects.builtin import ModuleOp, StringAttr, TensorType, f32
from xdsl.ir import Operation, SSAValue
from xdsl.rewriter import InsertPoint, Rewriter

from ..dialects.formats import is_wide
from ..dialects.operations._origin import is_weight
from ..dialects.operations._shapes import element_of
from ..dialects.operations._values import hint_of
from ..dialects.operations.normalization import RMSNormOp
from ..dialects.operations.parameter import ParameterOp
from ._folding import Fold, Place
from ._given import erase_unused, laid_out, parameter_under
from ._sites import root

if TYPE_CHECKING:
    from torch import Tensor

    from ..backends.weight_store import WeightStore

LARGEST_ERROR = 1e-6
"""Of a gain 1 + w, where w is rounded to f32: beyond it the gain itself becomes the parameter."""

Use = tuple[Operation, int]


class Parameters:
    """The parameters of a module, to be changed for some of their readers.

    A parameter that others read too, or that they read in another way, gets a second name: its own with `.word` behind
    it. Values are computed in f64 and held in f32, or in the dtype they were stored in where that holds them exactly.
    """

    def __init__(self, module: ModuleOp, weights: WeightStore, word: str) -> None:
        self.weights, self.word = weights, word
        self._named: dict[str, list[ParameterOp]] = {}
        for op in module.walk():
            if isinstance(op, ParameterOp):
                self._named.setdefault(op.source.data, []).append(op)

    def apply(self, fold: Fold, scale: np.ndarray) -> None:
        """Divide what makes the channels by `scale`, and multiply the weights that read them by it: [channels]."""
        edits = [(place, 1.0 / scale) for place in fold.makers] + [(place, scale) for place in fold.readers]
        spread = fold.channels.spread
        while edits:
            (place, numbers), *edits = edits
            factors, alike = spread(numbers, place.own), [place]
            for other in list(edits):
                if _alike(other[0], place) and np.array_equal(spread(other[1], other[0].own), factors):
                    alike.append(other[0])
                    edits.remove(other)
            if not self._multiply(alike, factors):
                for each in alike:
                    self._set_gain(each, spread(numbers, each.labels))

    def replace(self, use: Use, values: Tensor) -> None:
        """Let one operand be a parameter of these values; in place where nobody else reads the one that it is now."""
        operation, operand = use
        value = operation.operands[operand]
        source = parameter_under(value).source.data
        if isinstance(value.owner, ParameterOp) and set(self._uses(source)) <= {use}:
            self.weights.put(source, values)
            return
        made = self.make(source, self.word, values, parameter_under(value))
        self._read(use, made.result)

    def make(self, source: str, word: str, values: Tensor, after: Operation) -> ParameterOp:
        """A new parameter, named after the known weight `source`, right behind the operation `after`, and wide as that.

        f32 where that is narrow.
        """
        name = self._free_name(source, word)
        self.weights.put(name, values)
        like = element_of(after.results[0])
        like = like if is_wide(like) else f32
        made = ParameterOp.build(
            result_types=[TensorType(like, list(values.shape))], properties={"source": StringAttr(name)}
        )
        made.result.name_hint = hint_of(name)
        Rewriter.insert_op(made, InsertPoint.after(after))
        self._named.setdefault(name, []).append(made)
        return made

    def _multiply(self, places: Sequence[Place], factors: np.ndarray) -> bool:
        """Multiply a parameter for these places, which read it alike; False where f32 does not hold what it becomes."""
        import torch

        parameter, plus = places[0].parameter, places[0].plus
        source = parameter.source.data
        gain = (self.weights.wide(source).double() + plus) * torch.from_numpy(np.ascontiguousarray(factors))
        values = (gain - plus).float()
        if plus and not torch.allclose(values.double() + plus, gain, rtol=LARGEST_ERROR, atol=0):
            return False
        values = self._as_stored(source, values)
        if set(self._uses(source)) <= {(place.operation, place.operand) for place in places}:
            self.weights.put(source, values)
            return True
        made = self.make(source, self.word, values, parameter)
        for place in places:
            self._read((place.operation, place.operand), _copied(place.value, parameter.result, made.result))
        return True

    def _set_gain(self, place: Place, factors: np.ndarray) -> None:
        """Let an operation read its whole gain, where that of a norm is 1 + w and w could not be told from -1."""
        import torch

        operation = place.operation
        offset = 1.0 if isinstance(operation, RMSNormOp) and operation.unit_offset is not None else 0.0
        held = laid_out(place.value, self.weights).double() + offset
        values = (held * torch.from_numpy(np.ascontiguousarray(factors))).float()
        made = self.make(place.parameter.source.data, self.word, values, place.parameter)
        self._read((operation, place.operand), made.result)
        operation.properties.pop("unit_offset", None)

    def _as_stored(self, source: str, values: Tensor) -> Tensor:
        narrow = values.to(self.weights.dtype(source))
        return narrow if narrow.to(values.dtype).equal(values) else values

    def _uses(self, source: str) -> Iterator[Use]:
        """Who reads a parameter of this name, casts and layouts passed."""
        for parameter in self._named.get(source, ()):
            yield from _readers(parameter.result)

    def _read(self, use: Use, value: SSAValue) -> None:
        operation, operand = use
        old = operation.operands[operand]
        operation.operands[operand] = value
        if not old.uses and isinstance(old.owner, Operation):
            erase_unused(old.owner)

    def _free_name(self, source: str, word: str) -> str:
        while (known := source.rpartition(".")[0]) and self._is_known(known):
            source = known  # itself made from a weight: names have one such part
        name, count = f"{source}.{word}", 1
        while self._is_known(name):
            name, count = f"{source}.{word}_{count}", count + 1
        return name

    def _is_known(self, name: str) -> bool:
        return name in self.weights or bool(self.weights.parts(name))


def _alike(one: Place, other: Place) -> bool:
    return one.parameter.source == other.parameter.source and one.plus == other.plus


def _readers(value: SSAValue) -> Iterator[Use]:
    for use in value.uses:
        results = use.operation.results
        if results and is_weight(results[0]):
            for result in results:
                yield from _readers(result)
        else:
            yield use.operation, use.index


def _copied(value: SSAValue, old: SSAValue, new: SSAValue) -> SSAValue:
    """The casts and layouts between a parameter and a value, once more upon another parameter."""
    if value is old:
        return new
    owner = value.owner
    assert isinstance(owner, Operation)
    below = owner.operands[0]
    copy = owner.clone({below: _copied(below, old, new)})
    Rewriter.insert_op(copy, InsertPoint.after(owner))
    return copy.results[owner.results.index(value)]


def largest_weights(places: Iterable[Place], weights: WeightStore) -> list[tuple[np.ndarray, np.ndarray]]:
    """For each place its labels, and of their shape the largest magnitudes of the weight along the other dimensions."""
    found = list[tuple[np.ndarray, np.ndarray]]()
    for place in places:
        values = laid_out(root(place.value), weights)
        dims = [dim for dim, size in enumerate(place.labels.shape) if size == 1]
        largest = values.abs().amax(dims, keepdim=True) if dims else values.abs()
        found.append((place.labels, largest.numpy()))
    return found
