"""Streams: values of one width that only look-ups and linear layers write, and only linear layers read, norms between.

Such values may all be multiplied with one orthogonal matrix: what writes them is rotated on its way out, what reads
them on its way in, and sums, moves and root mean square norms do not notice (QuaRot, arXiv 2404.00456, section 4).
They are found by following what operations do to their last dimension, not by names.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from xdsl.dialects.builtin import TensorType
from xdsl.dialects.func import ReturnOp
from xdsl.ir import Block, Operation, SSAValue

from ..dialects.operations._shapes import UNKNOWN, shape_of
from ..dialects.operations._values import torch_dtype
from ..dialects.operations.cast import CastOp
from ..dialects.operations.contraction import EmbeddingOp, ExpertLinearOp, LinearOp
from ..dialects.operations.movement import Movement, PermuteOp, SelectOp, TransposeOp
from ..dialects.operations.normalization import RMSNormOp
from ..dialects.operations.pointwise import AddOp, ConvertOp, DivOp, MulOp, NegOp, SubOp
from ..dialects.operations.reduction import MeanOp, SumOp
from ._new_weights import Constant, Gain, NewWeights, Rotation, plain_weight
from ._sites import module_name

Layer = LinearOp | ExpertLinearOp


@dataclass
class Stream:
    """Values of `width` numbers a row: who writes and reads them, and the norms whose gains stand before readers."""

    width: int
    writers: list[Layer | EmbeddingOp] = field(default_factory=list)
    readers: list[Layer] = field(default_factory=list)
    norms: list[RMSNormOp] = field(default_factory=list)
    gains: dict[Operation, RMSNormOp] = field(default_factory=dict)
    reason: str = ""
    """Why it cannot be rotated; empty where it can."""


def streams(block: Block) -> list[Stream]:
    """Every stream that a linear layer reads, those that cannot be rotated included."""
    return _Followed(block).streams()


class _Followed:
    """Values joined to classes that one matrix would have to rotate."""

    def __init__(self, block: Block) -> None:
        self.parents: dict[SSAValue, SSAValue] = {}
        self.gain: dict[SSAValue, RMSNormOp] = {}
        self.faults: list[tuple[SSAValue, str]] = []
        self.layers: list[Layer | EmbeddingOp] = []
        self.norms: list[RMSNormOp] = []
        for argument in block.args:
            self._fault(argument, "is an input of the model")
        for op in block.ops:
            self._visit(op)

    def streams(self) -> list[Stream]:
        found: dict[SSAValue, Stream] = {}

        def of(value: SSAValue) -> Stream:
            return found.setdefault(self._first(value), Stream(shape_of(value)[-1]))

        for op in self.layers:
            if isinstance(op, EmbeddingOp):
                of(op.result).writers.append(op)
                continue
            of(op.input).readers.append(op)
            of(op.result).writers.append(op)
            if op.input in self.gain:
                of(op.input).gains[op] = self.gain[op.input]
        for norm in self.norms:
            of(norm.input).norms.append(norm)
        for value, reason in self.faults:
            if (stream := found.get(self._first(value))) and not stream.reason:
                stream.reason = reason
        return [stream for stream in found.values() if stream.readers]

    def _visit(self, op: Operation) -> None:
        match op:
            case LinearOp() | ExpertLinearOp() | EmbeddingOp():
                self._layer(op)
            case RMSNormOp():
                self._norm(op)
            case AddOp() | SubOp() if op.other is not None and _alike(op.input, op.other):
                self._joined(op, op.input, op.other)
            case MulOp() | DivOp() if (kept := _scaled(op)) is not None:
                self._joined(op, kept)
            case CastOp() | NegOp() | ConvertOp():
                self._joined(op, op.input)
            case Movement() | SumOp() | MeanOp() if _keeps_rows(op):
                self._joined(op, *(value for value in op.operands if _is_float(value)))
            case _:
                what = "is returned" if isinstance(op, ReturnOp) else f"meets {op.name} %{_name(op)}"
                for value in (*op.operands, *op.results):
                    self._fault(value, what)

    def _layer(self, op: Layer | EmbeddingOp) -> None:
        self.layers.append(op)
        names = ("weight",) if isinstance(op, EmbeddingOp) or op.bias is None else ("weight", "bias")
        for name in names:
            if plain_weight(op, name) is None:
                for value in (op.operands[0], op.result):
                    self._fault(value, f"meets {module_name(op)}, whose {name} does not lie in the store as it is read")

    def _norm(self, op: RMSNormOp) -> None:
        """A norm without a gain is passed; one with a gain only if it can go to those who read its result."""
        if op.input in self.gain:
            self._fault(op.input, f"passes two norms, the second being {_name(op)}")
        self._join(op.input, op.result)
        if op.weight is None:
            return
        if plain_weight(op, "weight") is None or op.integer is not None:
            self._fault(op.input, f"passes the norm {_name(op)}, whose gain does not lie in the store as it is read")
            return
        self.norms.append(op)
        self.gain[op.result] = op

    def _joined(self, op: Operation, *values: SSAValue) -> None:
        """All results are rotated as all operands are; a gain may pass where it is the gain of all of them."""
        if not values:
            return
        gains = {self.gain.get(value) for value in values}
        for value in (*values[1:], *op.results):
            self._join(values[0], value)
        if len(gains) > 1 or (isinstance(op, AddOp | SubOp) and gains != {None}):
            self._fault(values[0], f"meets %{_name(op)} behind a norm's gain")
        gain = next(iter(gains))
        if gain is not None:
            self.gain.update(dict.fromkeys(op.results, gain))

    def _fault(self, value: SSAValue, reason: str) -> None:
        if isinstance(value.type, TensorType):
            self.faults.append((value, reason))

    def _first(self, value: SSAValue) -> SSAValue:
        while (parent := self.parents.get(value, value)) is not value:
            self.parents[value] = self.parents.get(parent, parent)
            value = parent
        return value

    def _join(self, one: SSAValue, other: SSAValue) -> None:
        self.parents[self._first(other)] = self._first(one)


def rotate_stream(stream: Stream, new: NewWeights, size: int, seed: int | None) -> None:
    """Rotate what writes the stream on its way out and what reads it on its way in, gains of norms folded into it."""
    for op in stream.writers:
        if isinstance(op, EmbeddingOp):
            new.add(op, "weight", Rotation(-1, size, seed))
        else:
            rotate_outputs(op, new, size, seed)
    for op in stream.readers:
        along = op.reduced()["weight"][0]
        if gain := stream.gains.get(op):
            held = plain_weight(gain, "weight")
            assert held is not None
            new.add(op, "weight", Gain(along, held.source.data, gain.unit_offset is not None))
        new.add(op, "weight", Rotation(along, size, seed))
    for norm in stream.norms:
        new.add(norm, "weight", Constant(0.0 if norm.unit_offset is not None else 1.0))


def rotate_outputs(op: Layer, new: NewWeights, size: int, seed: int | None) -> None:
    """Let a layer yield what it yields, rotated."""
    new.add(op, "weight", Rotation(-1 if op.transposed is not None else -2, size, seed))
    if op.bias is not None:
        new.add(op, "bias", Rotation(-1, size, seed))


def _alike(one: SSAValue, other: SSAValue) -> bool:
    """Whether two values that are added have rows of one width."""
    a, b = shape_of(one), shape_of(other)
    return bool(a) and bool(b) and a[-1] == b[-1] != UNKNOWN


def _scaled(op: MulOp | DivOp) -> SSAValue | None:
    """The operand that is multiplied by one number a row; None where each number of a row meets its own."""
    if op.other is None:
        return op.input
    width = shape_of(op.result)[-1:]
    numbers = [not shape_of(value) or shape_of(value)[-1] == 1 for value in (op.input, op.other)]
    if width == (1,) or numbers == [False, False]:
        return None
    if numbers[1]:
        return op.input
    return op.other if isinstance(op, MulOp) else None


def _keeps_rows(op: Operation) -> bool:
    """Whether the last dimension stays as it is, whole and in order."""
    values = [value for value in (*op.operands, *op.results) if isinstance(value.type, TensorType)]
    widths = {shape_of(value)[-1:] for value in values}
    if len(widths) != 1 or not (width := next(iter(widths))) or width[0] in (UNKNOWN, 1):
        return False
    rank = len(shape_of(values[0]))
    match op:
        case TransposeOp():
            return rank - 1 not in {dim.value.data % rank for dim in (op.dim0, op.dim1)}
        case PermuteOp():
            return op.dims.data[-1].value.data % rank == rank - 1
        case SelectOp():
            return op.dim.value.data % rank != rank - 1
        case SumOp() | MeanOp():
            return op.dim is not None and all(dim.value.data % rank != rank - 1 for dim in op.dim)
        case _:
            return True


def _is_float(value: SSAValue) -> bool:
    return isinstance(value.type, TensorType) and torch_dtype(value.type.element_type).is_floating_point


def _name(op: Operation) -> str:
    return next((result.name_hint or "?" for result in op.results), op.name)
