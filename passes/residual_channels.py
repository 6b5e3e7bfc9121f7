"""`residual-channels`: what rounding takes from a layer's largest input channels, rounded and multiplied once more."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from xdsl.context import Context
from xdsl.dialects.builtin import (
    DYNAMIC_INDEX,
    DictionaryAttr,
    IntegerAttr,
    ModuleOp,
    StringAttr,
    TensorType,
    UnitAttr,
    f32,
)
from xdsl.ir import Attribute, Operation, SSAValue
from xdsl.passes import ModulePass
from xdsl.rewriter import InsertPoint, Rewriter

from ..dialects.errors import UsageError
from ..dialects.formats import BlockType, MixedType, is_wide
from ..dialects.operations._shapes import element_of, shape_of
from ..dialects.operations._values import hint_of, path_of
from ..dialects.operations.contraction import LinearOp
from ..dialects.operations.movement import SliceOp
from ..dialects.operations.opaque import AtenOp
from ..dialects.operations.pointwise import AddOp, SubOp
from ._context import note, weights_of
from ._new_weights import NewWeights, check_undecided, free_name, parameter, plain_weight, recast, set_operand
from ._sites import Site, module_name, root, sites_of
from ._statistics import Statistics, forget, statistics_of
from .quantize import matches, nearest

if TYPE_CHECKING:
    from torch import Tensor

    from ..backends.weight_store import WeightStore


@dataclass(frozen=True)
class ResidualChannels(ModulePass):
    """y = Q(x) Q(W)' + Q(x_o - Q(x)_o) Q(W_o)', o being the layer's largest input channels.

    ARCQuant (arXiv 2601.07475): the sum is one product over K + S channels, all in the layer's own formats. The S
    channels are those whose largest magnitude exceeds `share` of the largest of all, or `top` of them; S is rounded up
    to whole blocks. With `reorder` (as the paper has it) channels are ordered by their largest magnitude first, x at
    run time and W in the store, so that those channels share blocks.
    `match` chooses linear layers, of those whose input is rounded by a cast. Layers that read one value share its
    residual. UsageError where none is changed. Needs calibration.
    """

    name = "residual-channels"

    match: str = "*"
    share: float = 2.0**-3
    top: int | None = None
    reorder: bool = True

    def __post_init__(self) -> None:
        if not 0 < self.share < 1:
            raise UsageError(f"residual-channels: share lies between 0 and 1, got {self.share}")
        if self.top is not None and self.top < 1:
            raise UsageError(f"residual-channels: top is a number of 1 or more, got {self.top}")

    def apply(self, ctx: Context, op: ModuleOp) -> None:
        weights = weights_of(ctx, self.name)
        layers = [layer for layer in op.walk() if isinstance(layer, LinearOp)]
        matched = [layer for layer in layers if matches(self.match, module_name(layer))]
        if not matched:
            near = nearest(self.match, [module_name(layer) for layer in layers])
            raise UsageError(f"residual-channels: {self.match!r} matches 0 of {len(layers)} linear layers{near}")
        for layer in matched:
            check_undecided(layer, "weight", self.name)
        reasons = {module_name(layer): reason for layer in matched if (reason := _why_not(layer))}
        chosen = [layer for layer in matched if module_name(layer) not in reasons]
        if not chosen:
            name, reason = next(iter(reasons.items()))
            raise UsageError(f"residual-channels has no effect: {name} {reason}")
        statistics = statistics_of(ctx, op, self.name, "ranges")
        augmented = _Augmented(weights, self.reorder)
        counts = [augmented.layer(layer, self._order(layer, statistics)) for layer in chosen]
        augmented.new.apply(op, weights)
        forget(ctx)
        total = sum(shape_of(layer.input)[-1] for layer in chosen)
        note(ctx, f"residual-channels: {sum(counts)} channels beside the {total} of {len(chosen)} layers")
        for name, reason in reasons.items():
            note(ctx, f"residual-channels leaves {name} as it is: it {reason}")

    def _order(self, layer: LinearOp, statistics: Statistics) -> tuple[Tensor, int]:
        """The channels, the largest first, and how many of them get a residual."""
        largest = statistics.inputs(_input_site(layer)).largest.flatten()
        order = largest.argsort(descending=True, stable=True)
        count = self.top or int((largest > self.share * largest.max()).sum())
        block = _block(element_of(layer.input))
        return order, min(-(-max(count, 1) // block) * block, len(order))


@dataclass
class _Augmented:
    """Layers with their residuals; what is made of one value is made once."""

    weights: WeightStore
    reorder: bool
    new: NewWeights = field(default_factory=lambda: NewWeights("ordered"))
    made: dict[SSAValue, tuple[SSAValue, SSAValue]] = field(default_factory=dict)
    """For the input of a layer as it was: the one that takes its place, and the residual's."""

    def layer(self, layer: LinearOp, chosen: tuple[Tensor, int]) -> int:
        """Add the residual to a layer; how many channels it has."""
        order, count = chosen
        held = plain_weight(layer, "weight")
        assert held is not None
        source, along = held.source.data, layer.reduced()["weight"][0]
        places = order[:count] if self.reorder else order[:count].sort().values
        if layer.input not in self.made:
            self.made[layer.input] = self._residual(layer, f"{source}.order", order if self.reorder else places, count)
        columns = self.weights.wide(source).index_select(along, places).contiguous()
        name = free_name(f"{source}.residual_channels", self.weights)
        self.weights.put(name, columns)
        weight = recast(layer.weight, parameter(name, columns, before=layer))
        given, residual = self.made[layer.input]
        set_operand(layer, 0, given)
        if self.reorder:
            self.new.add(layer, "weight", _Ordered(along, tuple(order.tolist())))
        self._add(layer, residual, weight)
        return count

    def _residual(self, layer: LinearOp, name: str, places: Tensor, count: int) -> tuple[SSAValue, SSAValue]:
        """What stands in place of a layer's input, and the rounded residual of its largest channels."""
        name = free_name(name, self.weights)
        self.weights.put(name, places)
        index = parameter(name, places, before=layer)
        wide, rounded = root(layer.input), layer.input
        if self.reorder:
            wide = _picked(wide, index, "ordered", layer)
            rounded = recast(rounded, wide)
            parts = [_begin(value, count, layer) for value in (wide, rounded)]
        else:
            parts = [_picked(value, index, "largest", layer) for value in (wide, rounded)]
        missing = _before(
            layer, SubOp.build(operands=parts, result_types=[parts[0].type]), root(layer.input), "residual"
        )
        return rounded, recast(layer.input, missing)

    def _add(self, layer: LinearOp, residual: SSAValue, weight: SSAValue) -> None:
        """The product of the residual, behind the layer and added to what it yields."""
        properties = {name: value for name, value in layer.properties.items() if name in ("transposed", "acc")}
        product = LinearOp.build(
            operands=[residual, weight, None],
            result_types=[layer.result.type],
            properties=properties,
            attributes=dict(layer.attributes),
        )
        product.result.name_hint = hint_of(f"{module_name(layer)}.residual_channels")
        Rewriter.insert_op(product, InsertPoint.after(layer))
        total = AddOp.build(operands=[layer.result, product.result], result_types=[layer.result.type])
        total.result.name_hint = hint_of(f"{module_name(layer)}.augmented")
        Rewriter.insert_op(total, InsertPoint.after(product))
        for use in list(layer.result.uses):
            if use.operation is not total:
                use.operation.operands[use.index] = total.result


@dataclass(frozen=True)
class _Ordered:
    """A weight whose indices along a dimension lie in another order."""

    dim: int
    order: tuple[int, ...]

    def __call__(self, weight: Tensor, stored: WeightStore) -> Tensor:
        import torch

        return weight.index_select(self.dim, torch.tensor(self.order))


def _picked(value: SSAValue, index: SSAValue, what: str, layer: LinearOp) -> SSAValue:
    """The numbers at some places of the last dimension, before a layer."""
    made = AtenOp.build(
        operands=[[value, index]],
        result_types=[[TensorType(f32, (*shape_of(value)[:-1], *shape_of(index)))]],
        properties={
            "target": StringAttr("aten.index_select.default"),
            "arguments": DictionaryAttr({"self": UnitAttr(), "dim": IntegerAttr(-1, 64), "index": UnitAttr()}),
        },
    )
    return _before(layer, made, value, what)


def _begin(value: SSAValue, count: int, layer: LinearOp) -> SSAValue:
    """The first numbers of the last dimension, before a layer."""
    made = SliceOp.build(
        operands=[value, []],
        result_types=[TensorType(f32, (*shape_of(value)[:-1], count))],
        properties={name: IntegerAttr(number, 64) for name, number in {"dim": -1, "start": 0, "end": count}.items()},
    )
    return _before(layer, made, value, "largest")


def _before(layer: LinearOp, made: Operation, value: SSAValue, what: str) -> SSAValue:
    """The result of a new operation on a value, before a layer and named after the value."""
    made.results[0].name_hint = hint_of(f"{path_of(value)}.{what}") if value.name_hint else None
    Rewriter.insert_op(made, InsertPoint.before(layer))
    return made.results[0]


def _why_not(layer: LinearOp) -> str:
    """Why a layer gets no residual; empty where it does."""
    if is_wide(element_of(layer.input)):
        return "reads its input in no narrow format: residual-channels stands behind the rules that give formats"
    if layer.input is root(layer.input) or not is_wide(element_of(root(layer.input))):
        return "reads an input whose wide values are not there"
    if plain_weight(layer, "weight") is None:
        return "has a weight that the model computes from others"
    return "" if layer.window is None else "sums into a window"


def _input_site(layer: LinearOp) -> Site:
    return next(site for site in sites_of(layer) if site.operand == "input")


def _block(format: Attribute) -> int:
    """How many numbers of the last dimension share a scale; 1 where all of them do, or none."""
    if isinstance(format, MixedType):
        return max(_block(format.low), _block(format.high))
    if not isinstance(format, BlockType) or not format.dims or format.dims[-1] == DYNAMIC_INDEX:
        return 1
    return format.dims[-1]
