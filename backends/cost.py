"""The cost model's ground: bits, bytes, MACs and memory traffic, for each operation and in total."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, cast

from xdsl.dialects.builtin import IntegerAttr, ModuleOp, TensorType
from xdsl.ir import Attribute, Operation, SSAValue

from ..dialects.accumulator import AccumulatorAttr
from ..dialects.formats import is_wide, storage_bits
from ..dialects.instances import name_of
from ..dialects.operations._origin import is_weight
from ..dialects.operations._values import path_of, torch_dtype
from ..dialects.operations.attention import AttentionOp
from ..dialects.operations.contraction import Contraction, is_outer_product, weights_of
from ..dialects.operations.hadamard import HadamardOp
from ..dialects.operations.opaque import AtenOp
from ..dialects.windows import WindowAttr
from ._opaque_macs import opaque_macs
from ._shapes import Shapes, shapes_in, values_of
from .cached import Cached, cached, rounded_positions, split_bits
from .stored_tensors import Tensor, high_blocks, sized, stored_tensors
from .weight_store import WeightStore

NO_RULE = "no rule matches it"
OUTER = "its product sums over one value"
OPAQUE = "kept as a torch operator: no structured operation for it"
PADDED_SHOWN = 5
TORCH = "torch"
UNKNOWN = "kept as a torch operator, MACs not known, or not all of them"


@dataclass(frozen=True)
class Contracted:
    """One contraction at stated sizes, or an opaque operator that multiplies and sums (`kind` is then torch's name).

    `operands` gives the format of each operand that is multiplied, `weights` those of them that follow from parameters
    alone, `wide` those that stayed wide, and `why` they did. Traffic counts each operand and the result once, in bytes
    of their formats. Of an opaque operator the MACs that are known are counted; `why` says where others are not.
    """

    name: str
    kind: str
    macs: int
    operands: dict[str, str]
    weights: tuple[str, ...]
    wide: tuple[str, ...]
    why: str
    activation_elements: int
    activation_bits: int
    traffic_bytes: int
    padded: tuple[Tensor, ...] = ()
    """Those operands, no weights, of which padding and scales are more than half."""
    accumulator: str = TORCH
    """`f32`, `e8m13 rtz x 4` ...: how products are summed; `torch` is the order of torch's f32 operator."""

    @property
    def formats(self) -> str:
        """`mxfp4 x mxint8`: weights first."""
        order = sorted(self.operands, key=lambda n: (n not in self.weights, n != "value", n))
        return " x ".join(dict.fromkeys(self.operands[n] for n in order))


@dataclass(frozen=True)
class Cost:
    """Sizes are those of one forward over `inputs` (the shape of each input)."""

    inputs: tuple[tuple[int, ...], ...]
    tensors: tuple[Tensor, ...]
    contractions: tuple[Contracted, ...]
    additions: int = 0
    """Additions and subtractions of the rotations (`mx.hadamard`) at run time."""
    caches: tuple[Cached, ...] = ()
    """Keys and values of causal attention, as a cache holds them after all positions of the inputs."""

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
    def sums(self) -> dict[str, float]:
        """Shares of MACs by how products are summed: an accumulator's name, or `torch` for its f32 product."""
        found = dict[str, float]()
        for c in self.contractions:
            found[c.accumulator] = found.get(c.accumulator, 0.0) + ratio(c.macs, self.macs)
        return found

    @property
    def traffic_bytes(self) -> int:
        return sum(c.traffic_bytes for c in self.contractions)

    @property
    def cache_bits(self) -> float:
        """Average bits of an element in the cache, its wide newest positions included."""
        return ratio(sum(c.bits for c in self.caches), sum(c.elements for c in self.caches))

    @property
    def cache_bytes(self) -> int:
        """Bytes of the cache after the inputs' positions."""
        return sum(-(-c.bits // 8) for c in self.caches)

    @property
    def cache_bytes_per_token(self) -> float:
        """Bytes of the cache for each token of the inputs: an average at that length, for the newest may be wide."""
        return sum(c.bytes_per_token for c in self.caches)

    @property
    def padded(self) -> tuple[Tensor, ...]:
        """The tensors, stored or read by a contraction, of which padding and scales are more than half."""
        stored = [tensor for tensor in self.tensors if tensor.is_padded]
        return (*stored, *(tensor for each in self.contractions for tensor in each.padded))

    def table(self, top: int | None = None) -> str:
        """The contractions by MACs, the largest first, and the totals below."""
        rows = sorted(self.contractions, key=lambda c: -c.macs)[:top]
        width = max([len(c.name) for c in rows] + [5])
        lines = [f"{'name':{width}}  {'formats':28} {'MACs':>14} {'traffic bytes':>14}"]
        lines += [f"{c.name:{width}}  {c.formats:28} {c.macs:14,} {c.traffic_bytes:14,}" for c in rows]
        return "\n".join([*lines, self.summary()])

    def summary(self) -> str:
        """A line of totals, one of the cache where it is narrow, and one of tensors that padding more than doubles."""
        totals = (
            f"{self.weight_bits:.4f} bits a parameter ({self.quantized_weight_bits:.4f} where quantized), "
            f"{self.activation_bits:.4f} bits an activation, {self.bytes:,} bytes, {self.macs:,} MACs, "
            f"{self.traffic_bytes:,} bytes of traffic"
            f"{f', {self.additions:,} additions of rotations' if self.additions else ''}"
        )
        if any(c.narrow for c in self.caches):
            length = max(c.positions for c in self.caches)
            each = f"{self.cache_bytes_per_token:,.1f} bytes of cache a token at {length} tokens"
            totals += f"\n{self.cache_bits:.4f} bits a cached element, {each}"
        if not self.padded:
            return totals
        named = ", ".join(map(str, sorted(self.padded, key=lambda tensor: -tensor.bits)[:PADDED_SHOWN]))
        rest = f", and {len(self.padded) - PADDED_SHOWN} more" if len(self.padded) > PADDED_SHOWN else ""
        return f"{totals}\nmore than doubled by padding of blocks and by scales: {named}{rest}"

    def to_json(self) -> dict[str, Any]:
        totals = (
            "parameters",
            "weight_bits",
            "quantized_weight_bits",
            "activation_bits",
            "bytes",
            "macs",
            "traffic_bytes",
            "additions",
            "cache_bits",
            "cache_bytes",
            "cache_bytes_per_token",
        )
        return {
            "inputs": [list(s) for s in self.inputs],
            **{name: getattr(self, name) for name in totals},
            "tensors": [asdict(t) for t in self.tensors],
            "contractions": [asdict(c) for c in self.contractions],
            "caches": [asdict(c) for c in self.caches],
        }


_WIDE = ("f64", "f32", "f16", "bf16", "i64", "i32", "i16", "i8", "i1", "index")


def cost(
    module: ModuleOp, weights: WeightStore, sizes: Sequence[tuple[int, ...]], *, state: Iterable[str] = ()
) -> Cost:
    """What one forward over inputs of the given shapes costs, from types alone: nothing is run on data.

    `state` names what else belongs to the model and is stored with it, though no operation may read it.
    """
    values = values_of(module, sizes)
    shapes = shapes_in(values)
    contractions = list[Contracted]()
    additions = 0
    for op in module.walk():
        if isinstance(op, Contraction):
            contractions.append(_contracted(op, shapes, weights))
        elif isinstance(op, HadamardOp):
            additions += op.additions(lambda v: shapes[v])
        elif isinstance(op, AtenOp) and (found := _opaque(op, shapes, values, weights)) is not None:
            contractions.append(found)
    stored = tuple(stored_tensors(module, weights, state))
    return Cost(tuple(sizes), stored, tuple(contractions), additions, tuple(cached(module, shapes)))


def _contracted(op: Contraction, shapes: Shapes, store: WeightStore) -> Contracted:
    weights = weights_of(op)
    counted = _Counted()
    for name in op.reduced():
        tensor = _operand(op, name, shapes, store)
        bits = _split(op, name, shapes) if isinstance(op, AttentionOp) else None
        counted.add(name, *tensor, is_weight=name in weights, is_moved=name != "probabilities", bits=bits)
    counted.add_results(op, shapes)
    macs = op.macs(lambda v: shapes[v])
    found = counted.contracted(path_of(op.results[0]) or op.name, op.name.removeprefix("mx."), macs, _why(op))
    stated = (op.properties.get(name) for name in ("acc", "window", "score_window"))
    sums = next((sum for sum in stated if isinstance(sum, AccumulatorAttr | WindowAttr)), None)
    return found if sums is None else replace(found, accumulator=sums.label)


def _why(op: Contraction) -> str:
    """Why an operand of the operation has no format."""
    if is_outer_product(op):
        return OUTER
    rule = op.attributes.get("rule")
    return f"rule {rule.value.data} gives it no format" if isinstance(rule, IntegerAttr) else NO_RULE


def _opaque(op: AtenOp, shapes: Shapes, values: Mapping[SSAValue, Any], store: WeightStore) -> Contracted | None:
    """The operator, if it multiplies and sums floats or may do so; None for any other."""
    floats = {value for value in op.operands if _is_float(value)}
    macs, complete = opaque_macs(op, values) if floats else (0, True)
    if macs == 0 and complete:
        return None
    weights = {value for value in floats if is_weight(value)}
    counted = _Counted()
    for name, value in op.named_operands():
        if value in floats:
            tensor = _element(value), shapes[value], high_blocks(value, store)
            counted.add(name, *tensor, is_weight=value in weights)
    counted.add_results(op, shapes)
    name = path_of(op.results[0]) or op.target.data
    return counted.contracted(name, op.target.data, macs, OPAQUE if complete else UNKNOWN)


class _Counted:
    """What the operands and results of one operation add up to."""

    def __init__(self) -> None:
        self.formats: dict[str, str] = {}
        self.weights: dict[str, None] = {}
        self.wide: dict[str, None] = {}
        self.padded: list[Tensor] = []
        self.elements = self.bits = self.traffic = 0

    def add(
        self,
        name: str,
        format: Attribute,
        shape: tuple[int, ...],
        high_blocks: int | None,
        *,
        is_weight: bool,
        is_moved: bool = True,
        bits: int | None = None,
    ) -> None:
        """Count an operand, which may take other `bits` than its format has; what the operation makes is not moved."""
        self.formats[name] = name_of(format)
        tensor = sized(name, format, shape, high_blocks)
        tensor = tensor if bits is None else replace(tensor, bits=bits, own_bits=bits)
        if is_wide(format):
            self.wide[name] = None
        if is_weight:
            self.weights[name] = None
        else:
            self.elements, self.bits = self.elements + tensor.elements, self.bits + tensor.bits
            self.padded += [tensor] if tensor.is_padded else []
        self.traffic += tensor.bytes if is_moved else 0

    def add_results(self, op: Operation, shapes: Shapes) -> None:
        """Count what the operation writes."""
        for result in op.results:
            if isinstance(result.type, TensorType):
                self.traffic += -(-storage_bits(_element(result), shapes[result]) // 8)

    def contracted(self, name: str, kind: str, macs: int, why: str) -> Contracted:
        """The sums under the operation's name; `why` is left out where nothing stayed wide."""
        return Contracted(
            name=name,
            kind=kind,
            macs=macs,
            operands=self.formats,
            weights=tuple(self.weights),
            wide=tuple(self.wide),
            why=why if self.wide else "",
            activation_elements=self.elements,
            activation_bits=self.bits,
            traffic_bytes=self.traffic,
            padded=tuple(replace(tensor, name=f"{name}.{tensor.name}") for tensor in self.padded),
        )


def _operand(
    op: Contraction, name: str, shapes: Shapes, store: WeightStore
) -> tuple[Attribute, tuple[int, ...], int | None]:
    """The format, the shape and, where it is stored in a mixed format, the number of high blocks of an operand."""
    if name == "probabilities" and isinstance(op, AttentionOp):
        query, key = shapes[op.query], shapes[op.key]
        of_query = _element(op.query)
        format = op.probabilities or (of_query if is_wide(of_query) else _element(op.results[0]))
        return format, (*query[:-1], key[-2]), None
    value = cast(SSAValue, getattr(op, name))
    return _element(value), shapes[value], high_blocks(value, store)


def _split(op: AttentionOp, name: str, shapes: Shapes) -> int | None:
    """Bits of key or value where its newest positions are read wide, as the last query finds them; else None."""
    if name not in ("key", "value") or (wide := getattr(op, f"wide_{name}")) is None:
        return None
    batch, heads, positions, width = shapes[value := getattr(op, name)]
    rounded = rounded_positions(op, name, positions)
    return split_bits((batch, heads, positions, width), rounded, _element(value), _element(wide))


def _element(value: SSAValue) -> Attribute:
    return cast(TensorType, value.type).element_type


def _is_float(value: SSAValue) -> bool:
    return isinstance(value.type, TensorType) and torch_dtype(_element(value)).is_floating_point


def ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0
