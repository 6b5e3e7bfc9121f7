"""What the file of an artefact holds, tensor by tensor, told from the module's types before anything is encoded."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import prod

from xdsl.dialects.builtin import ModuleOp
from xdsl.ir import Attribute, SSAValue

from ..dialects.errors import MxloomError
from ..dialects.formats import MixedType, bits, is_wide, storage_bits
from ..dialects.instances import name_of
from ..dialects.operations._origin import stored_readers
from ..dialects.operations._shapes import element_of, shape_of
from ..dialects.operations._values import element_type
from ..dialects.operations.parameter import ParameterOp
from .weight_store import WeightStore


@dataclass(frozen=True)
class Tensor:
    """One stored tensor: a parameter in the format in which the file holds it.

    `bits` are those that it takes, `own_bits` those that its format has for so many elements of a large tensor. What it
    takes more is padding, for blocks are stored whole, and scales of blocks that are shorter than they could be.
    """

    name: str
    format: str
    elements: int
    bits: int
    own_bits: float

    @property
    def bytes(self) -> int:
        """The size in the file, rounded up to whole bytes."""
        return -(-self.bits // 8)

    @property
    def is_padded(self) -> bool:
        """Whether padding and scales take more than all else."""
        return self.elements > 0 and self.bits > 2 * self.own_bits

    def __str__(self) -> str:
        """`fc.weight 45.33 bits an element, not the 4.25 of mxfp4 (91% added)`."""
        each, own = self.bits / self.elements, self.own_bits / self.elements
        return (
            f"{self.name} {each:.4g} bits an element, not the {own:.4g} of {self.format} ({1 - own / each:.0%} added)"
        )


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
            result = cast.result
            yield sized(op.source.data, element_of(result), shape_of(result), high_blocks(result, weights))
        key = op.source.data, None if is_wide(own) else own
        if key in seen or (narrow and None not in stored_readers(op)):
            continue
        seen.add(key)
        shape, name = shape_of(op.result), op.source.data
        yield _wide(name, weights) if is_wide(own) else sized(name, own, shape, high_blocks(op.result, weights))
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


def sized(name: str, format: Attribute, shape: tuple[int, ...], high_blocks: int | None = None) -> Tensor:
    """A tensor of the shape in the format; in a mixed one the most that it can take, unless `high_blocks` are known."""
    count = prod(shape)
    if not isinstance(format, MixedType) or high_blocks is None:
        return Tensor(name, name_of(format), count, storage_bits(format, shape), bits(format) * count)
    low_share = 1 - high_blocks / max(format.blocks(shape), 1)
    own_bits = format.bits_at(low_share) * count
    return Tensor(name, name_of(format), count, format.storage_bits_at(shape, high_blocks), own_bits)


def high_blocks(value: SSAValue, weights: WeightStore) -> int | None:
    """How many blocks of a value in a mixed format are high, where its choice is stored; None for any other value."""
    owner, format = value.owner, element_of(value)
    if not isinstance(format, MixedType) or not isinstance(owner, ParameterOp):
        return None
    choice = weights.parts(owner.source.data).get("choice")
    return None if choice is None else format.high_blocks(shape_of(value), {"choice": weights[choice]})


def _wide(name: str, weights: WeightStore) -> Tensor:
    """As the checkpoint stores it: a cast into another wide type rounds when the weight is read."""
    dtype = weights.dtype(name)
    try:
        format = name_of(element_type(dtype))
    except MxloomError:
        format = str(dtype).removeprefix("torch.")
    size = weights.stored_bits(name)
    return Tensor(name, format, prod(weights.shape(name)), size, size)
