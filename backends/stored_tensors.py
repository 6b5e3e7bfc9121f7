"""What the file of an artefact holds, tensor by tensor, told from the module's types before anything is encoded."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import prod

from xdsl.dialects.builtin import ModuleOp
from xdsl.ir import Attribute

from ..dialects.errors import MxloomError
from ..dialects.formats import is_wide, storage_bits
from ..dialects.instances import name_of
from ..dialects.operations._origin import stored_readers
from ..dialects.operations._shapes import element_of, shape_of
from ..dialects.operations._values import element_type
from ..dialects.operations.parameter import ParameterOp
from .weight_store import WeightStore


@dataclass(frozen=True)
class Tensor:
    """One stored tensor: a parameter in the format in which the file holds it."""

    name: str
    format: str
    elements: int
    bits: int

    @property
    def bytes(self) -> int:
        """The size in the file, rounded up to whole bytes."""
        return -(-self.bits // 8)


def stored_tensors(module: ModuleOp, weights: WeightStore, state: Iterable[str] = ()) -> Iterator[Tensor]:
    """Every tensor that the artefact holds, each once.

    One for each parameter that is read wide and for each encoding of it, and what else of the model's `state` no
    operation reads (the counter of a batch normalisation).
    """
    parameters = [op for op in module.walk() if isinstance(op, ParameterOp)]
    seen: set[tuple[str, Attribute | None]] = set()
    for op in parameters:
        own = element_of(op.result)
        narrow = [cast for cast in stored_readers(op) if cast is not None] if is_wide(own) else []
        for cast in narrow:
            yield _encoded(op.source.data, element_of(cast.result), shape_of(cast.result))
        key = op.source.data, None if is_wide(own) else own
        if key in seen or (narrow and None not in stored_readers(op)):
            continue
        seen.add(key)
        yield _wide(op.source.data, weights) if is_wide(own) else _encoded(op.source.data, own, shape_of(op.result))
    yield from _unread([op.source.data for op in parameters], weights, state)


def _unread(read: Iterable[str], weights: WeightStore, state: Iterable[str]) -> Iterator[Tensor]:
    """What of the state no operation reads, as it is stored."""
    counted = {weights.canonical(part) for name in read for part in weights.parts(name).values()}
    for name, kept in second_names(read, weights, state).items():
        for own in ([name] if name in weights else weights.parts(name).values()) if name == kept else ():
            if weights.canonical(own) not in counted:
                counted.add(weights.canonical(own))
                yield _wide(weights.canonical(own), weights)


def second_names(read: Iterable[str], weights: WeightStore, state: Iterable[str]) -> Mapping[str, str]:
    """For each name of the state that the module does not read, the name it is stored under: its own, or that of a
    tensor which the module reads and which it is tied to."""
    read = dict.fromkeys(read)
    first = {weights.canonical(name): name for name in reversed(read) if name in weights}
    return {name: first.get(weights.canonical(name), name) for name in state if name not in read}


def _encoded(name: str, format: Attribute, shape: tuple[int, ...]) -> Tensor:
    return Tensor(name, name_of(format), prod(shape), storage_bits(format, shape))


def _wide(name: str, weights: WeightStore) -> Tensor:
    """As the checkpoint stores it: a cast into another wide type rounds when the weight is read."""
    dtype = weights.dtype(name)
    try:
        format = name_of(element_type(dtype))
    except MxloomError:
        format = str(dtype).removeprefix("torch.")
    return Tensor(name, format, prod(weights.shape(name)), weights.stored_bits(name))
