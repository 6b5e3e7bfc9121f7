"""The cost model's ground: bits, bytes, MACs and memory traffic, for each operation and in total."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from math import prod
from typing import Any, cast

from xdsl.dialects.builtin import IntegerAttr, ModuleOp, TensorType
from xdsl.ir import Attribute, Operation, SSAValue

from ..dialects.formats import is_wide, storage_bits
from ..dialects.instances import name_of
from ..dialects.operations._values import element_type, path_of
from ..dialects.operations.attention import AttentionOp
from ..dialects.operations.cast import CastOp
from ..dialects.operations.contraction import Contraction
from ..dialects.operations.parameter import ParameterOp
from ._shapes import Shapes, shapes_of
from .weight_store import WeightStore

NO_RULE = "no rule matches it"


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


@dataclass(frozen=True)
class Contracted:
    """One contraction at stated sizes. Traffic counts each operand and the result once, in bytes of their formats."""

    name: str
    kind: str
    macs: int
    operands: dict[str, str]
    wide: tuple[str, ...]
    why: str
    activation_elements: int
    activation_bits: int
    traffic_bytes: int

    @property
    def formats(self) -> str:
        """`mxfp4 x mxint8`: weights first."""
        order = sorted(self.operands, key=lambda n: (n not in ("weight", "b", "value"), n))
        return " x ".join(dict.fromkeys(self.operands[n] for n in order))


@dataclass(frozen=True)
class Cost:
    """Sizes are those of one forward over `inputs` (the shape of each input)."""

    inputs: tuple[tuple[int, ...], ...]
    tensors: tuple[Tensor, ...]
    contractions: tuple[Contracted, ...]

    @property
    def parameters(self) -> int:
        return sum(t.elements for t in self.tensors)

    @property
    def weight_bits(self) -> float:
        """Average bits of a stored parameter: scales, zero points, metadata and padding included, wide ones too."""
        return ratio(sum(t.bits for t in self.tensors), self.parameters)

    @property
    def quantized_weight_bits(self) -> float:
        """The same average over the parameters that are stored in a narrow format alone; 0 where there is none."""
        narrow = [t for t in self.tensors if t.format not in _WIDE]
        return ratio(sum(t.bits for t in narrow), sum(t.elements for t in narrow))

    @property
    def activation_bits(self) -> float:
        """Average bits of an element that a contraction reads and that is no weight."""
        return ratio(
            sum(c.activation_bits for c in self.contractions), sum(c.activation_elements for c in self.contractions)
        )

    @property
    def bytes(self) -> int:
        """Bytes of all stored tensors, without the file's header."""
        return sum(t.bytes for t in self.tensors)

    @property
    def macs(self) -> int:
        return sum(c.macs for c in self.contractions)

    @property
    def traffic_bytes(self) -> int:
        return sum(c.traffic_bytes for c in self.contractions)

    def table(self, top: int | None = None) -> str:
        """The contractions by MACs, the largest first, and the totals below."""
        rows = sorted(self.contractions, key=lambda c: -c.macs)[:top]
        width = max([len(c.name) for c in rows] + [5])
        lines = [f"{'name':{width}}  {'formats':28} {'MACs':>14} {'traffic bytes':>14}"]
        lines += [f"{c.name:{width}}  {c.formats:28} {c.macs:14,} {c.traffic_bytes:14,}" for c in rows]
        return "\n".join([*lines, self.summary()])

    def summary(self) -> str:
        return (
            f"{self.weight_bits:.4f} bits a parameter ({self.quantized_weight_bits:.4f} where quantized), "
            f"{self.activation_bits:.4f} bits an activation, {self.bytes:,} bytes, {self.macs:,} MACs, "
            f"{self.traffic_bytes:,} bytes of traffic"
        )

    def to_json(self) -> dict[str, Any]:
        totals = (
            "parameters",
            "weight_bits",
            "quantized_weight_bits",
            "activation_bits",
            "bytes",
            "macs",
            "traffic_bytes",
        )
        return {
            "inputs": [list(s) for s in self.inputs],
            **{name: getattr(self, name) for name in totals},
            "tensors": [asdict(t) for t in self.tensors],
            "contractions": [asdict(c) for c in self.contractions],
        }


_WIDE = ("f64", "f32", "f16", "bf16", "i64", "i32", "i16", "i8", "i1", "index")


def cost(module: ModuleOp, weights: WeightStore, sizes: Sequence[tuple[int, ...]]) -> Cost:
    """What one forward over inputs of the given shapes costs, from types alone: nothing is run on data."""
    shapes = shapes_of(module, sizes)
    contractions = [_contracted(op, shapes) for op in module.walk() if isinstance(op, Contraction)]
    return Cost(tuple(sizes), tuple(stored_tensors(module, weights)), tuple(contractions))


def stored_tensors(module: ModuleOp, weights: WeightStore) -> Iterator[Tensor]:
    """Every tensor that the artefact holds: one for each parameter and format in which it is read."""
    seen: set[tuple[str, Attribute | None]] = set()
    for op in module.walk():
        if not isinstance(op, ParameterOp):
            continue
        for format in _stored_formats(op):
            if (op.source.data, format) in seen:
                continue
            seen.add((op.source.data, format))
            yield _tensor(op, format, weights)


def _stored_formats(op: ParameterOp) -> list[Attribute | None]:
    """The formats in which a parameter is read; None stands for the wide tensor as the checkpoint stores it."""
    own = op.result.type.element_type
    if not is_wide(own):
        return [own]
    formats = list[Attribute | None]()
    for use in op.result.uses:
        reader = use.operation
        format = cast(TensorType, reader.result.type).element_type if isinstance(reader, CastOp) else None
        # A cast into another wide type rounds when the weight is read; what is stored is the checkpoint's tensor.
        formats.append(None if format is None or is_wide(format) else format)
    return list(dict.fromkeys(formats))


def _tensor(op: ParameterOp, format: Attribute | None, weights: WeightStore) -> Tensor:
    name, shape = op.source.data, op.result.type.get_shape()
    if format is None:
        bits = weights.stored_bits(name)
        return Tensor(name, name_of(element_type(weights.dtype(name))), prod(shape), bits)
    return Tensor(name, name_of(format), prod(shape), storage_bits(format, shape))


def _contracted(op: Contraction, shapes: Shapes) -> Contracted:
    operands: dict[str, str] = {}
    wide: list[str] = []
    elements = bits = traffic = 0
    for name in op.reduced():
        format, shape, is_weight = _operand(op, name, shapes)
        operands[name] = name_of(format)
        size = storage_bits(format, shape)
        if is_wide(format):
            wide.append(name)
        if not is_weight:
            elements, bits = elements + prod(shape), bits + size
        if name != "probabilities":
            traffic += -(-size // 8)
    for result in op.results:
        traffic += -(-storage_bits(cast(TensorType, result.type).element_type, shapes[result]) // 8)
    rule = op.attributes.get("rule")
    why = f"rule {rule.value.data} gives it no format" if isinstance(rule, IntegerAttr) else NO_RULE
    why = why if wide else ""
    name = path_of(op.results[0]) or op.name
    macs = op.macs(lambda v: shapes[v])
    return Contracted(name, op.name.removeprefix("mx."), macs, operands, tuple(wide), why, elements, bits, traffic)


def _operand(op: Contraction, name: str, shapes: Shapes) -> tuple[Attribute, tuple[int, ...], bool]:
    if name == "probabilities" and isinstance(op, AttentionOp):
        query, key = shapes[op.query], shapes[op.key]
        query_type = cast(TensorType, op.query.type).element_type
        format = op.probabilities or (
            query_type if is_wide(query_type) else cast(TensorType, op.results[0].type).element_type
        )
        return format, (*query[:-1], key[-2]), False
    value = cast(SSAValue, getattr(op, name))
    return cast(TensorType, value.type).element_type, shapes[value], _is_weight(value)


def _is_weight(value: SSAValue) -> bool:
    while isinstance(value.owner, CastOp):
        value = value.owner.input
    return isinstance(value.owner, Operation) and isinstance(value.owner, ParameterOp)


def ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0
