"""A module run forward over segments, its values observed, and backward again with the gradients of a loss."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from xdsl.dialects.builtin import TensorType
from xdsl.dialects.func import ReturnOp
from xdsl.ir import SSAValue

from ..backends.reference import Weights, body, results
from ..backends.weight_store import WeightStore
from ..dialects import formats
from ..dialects.errors import MxloomError
from ..dialects.operations._operation import Call, Operation
from ..dialects.operations._shapes import element_of, shape_of, text
from ..dialects.operations._values import torch_dtype
from ..dialects.operations.contraction import Contraction, EmbeddingOp, ExpertLinearOp
from ..dialects.operations.parameter import ParameterOp
from ._given import WIDE
from ._losses import Loss
from ._observed import Gradients, Plan
from ._samples import Sample
from ._segments import Segment, fixed_values, segments_of
from ._sums import Sums, add_gradient, add_products, add_table_gradient, add_values

if TYPE_CHECKING:
    from torch import Tensor

Kinds = frozenset[str]


class Sweep:
    """Collects the statistics of a plan, a shard of samples at a time."""

    def __init__(self, plan: Plan, weights: Weights, kinds: Kinds, loss: Loss | None) -> None:
        self.plan, self.weights, self.kinds, self.loss = plan, weights, kinds, loss
        self.block = body(plan.module)
        self.fixed = fixed_values(self.block)
        self.segments = segments_of(self.block, plan, self.fixed)
        self.outputs = [value for op in self.block.ops if isinstance(op, ReturnOp) for value in op.operands]
        self._calls: dict[Operation, Call] = {}
        self._readers = {
            (operation, operand): unit for unit in plan.gradients.values() for operation, operand in unit.readers
        }
        self._follows = self._differentiated() if loss is not None else set[SSAValue]()
        self._constants: dict[SSAValue, Any] = {}

    def shard(self, samples: Sequence[Sample], first: int) -> dict[str, Sums]:
        """The sums over some samples, by kind and key (`hessian model.layers.0...`); `first` is the first's number."""
        import torch

        sums: dict[str, Sums] = {}
        held: list[dict[SSAValue, Any]] = [self._inputs(sample) for sample in samples]
        ends = len(self.segments) - (1 if self.loss is not None else 0)
        with torch.no_grad():
            for segment in self.segments[:ends]:
                for sample, values in zip(samples, held, strict=True):
                    self._forward(segment, sample, values, sums)
                self._constants.clear()
        if self.loss is not None:
            self._backward(samples, held, first, sums)
        return sums

    def _inputs(self, sample: Sample) -> dict[SSAValue, Any]:
        if len(sample.inputs) != len(self.block.args):
            raise MxloomError(f"the module takes {len(self.block.args)} inputs, got {len(sample.inputs)}")
        return dict(zip(self.block.args, sample.inputs, strict=True))

    def _forward(self, segment: Segment, sample: Sample, held: dict[SSAValue, Any], sums: dict[str, Sums]) -> None:
        values = {value: held[value] for value in segment.imports}
        for op, dead in zip(segment.operations, segment.dead, strict=True):
            self._observe(op, values, sample, sums)
            values |= zip(op.results, self._run(op, values, {}), strict=True)
            self._drop(dead, values, segment)
        held |= {value: values[value] for value in segment.exports}

    def _drop(self, dead: Sequence[SSAValue], values: dict[SSAValue, Any], segment: Segment) -> None:
        for value in dead:
            values.pop(value, None)

    def _backward(
        self, samples: Sequence[Sample], held: list[dict[SSAValue, Any]], first: int, sums: dict[str, Sums]
    ) -> None:
        assert self.loss is not None
        gradients: list[dict[SSAValue, Tensor]] = [{} for _ in samples]
        for segment in reversed(self.segments):
            last = segment is self.segments[-1]
            for number, (sample, values) in enumerate(zip(samples, held, strict=True)):
                self._back(segment, sample, values, gradients[number], sums, first + number if last else None)
            self._constants.clear()

    def _back(
        self,
        segment: Segment,
        sample: Sample,
        held: dict[SSAValue, Any],
        gradients: dict[SSAValue, Tensor],
        sums: dict[str, Sums],
        number: int | None,
    ) -> None:
        """One segment with gradients; `number` is the sample's where the segment is the last, and observed here."""
        import torch

        leaves = {value: self._leaf(value, held[value]) for value in segment.imports}
        values: dict[SSAValue, Any] = dict(leaves)
        taps: dict[str, Tensor] = {}
        with torch.enable_grad():
            for op in segment.operations:
                if number is not None:
                    self._observe(op, values, sample, sums)
                read = self._tapped(op, values, taps, sample, sums)
                found = self._run(op, values, read)
                if isinstance(op, EmbeddingOp):
                    found = [self._look_up(op, found[0], values, sums)]
                values |= zip(op.results, found, strict=True)
        if number is not None:
            held |= {value: values[value] for value in self.outputs if value in values}
            self._seed(held, gradients, sample, number)
        given = [(values[v], gradients.pop(v)) for v in segment.exports if v in gradients]
        given = [(tensor, gradient) for tensor, gradient in given if tensor.requires_grad]
        if given:
            torch.autograd.backward([t for t, _ in given], [g for _, g in given])
        for value, leaf in leaves.items():
            if getattr(leaf, "grad", None) is not None:
                gradients[value] = leaf.grad if value not in gradients else gradients[value] + leaf.grad
                leaf.grad = None

    def _seed(self, held: dict[SSAValue, Any], gradients: dict[SSAValue, Tensor], sample: Sample, number: int) -> None:
        assert self.loss is not None
        output = self.outputs[self.loss.output]
        found = self.loss.gradient(held[output].detach(), sample, number)
        gradients[output] = found

    def _leaf(self, value: SSAValue, held: Any) -> Any:
        if value not in self._follows:
            return held
        return held.detach().requires_grad_()

    def _tapped(
        self, op: Operation, values: dict[SSAValue, Any], taps: dict[str, Tensor], sample: Sample, sums: dict[str, Sums]
    ) -> dict[SSAValue, Any]:
        """The operands of an operation at which the loss is differentiated, as leaves or with hooks."""
        found: dict[SSAValue, Any] = {}
        for place, operand in enumerate(op.operands):
            unit = self._readers.get((op, place))
            if unit is None or unit.is_table:
                continue
            if unit.key not in taps:
                taps[unit.key] = self._tap(unit, values, sample, sums.setdefault(f"fisher {unit.key}", {}))
            found[operand] = taps[unit.key]
        return found

    def _tap(self, unit: Gradients, values: dict[SSAValue, Any], sample: Sample, sums: Sums) -> Tensor:
        tensor = self._value(unit.value, values)

        if not tensor.requires_grad:
            leaf = tensor.detach().requires_grad_()

            def added(leaf: Tensor) -> None:
                assert leaf.grad is not None
                add_gradient(sums, unit, leaf.grad, sample)
                leaf.grad = None

            leaf.register_post_accumulate_grad_hook(added)
            return leaf
        tap = tensor.view_as(tensor)

        def hook(gradient: Tensor) -> None:
            add_gradient(sums, unit, gradient, sample)

        tap.register_hook(hook)
        return tap

    def _look_up(self, op: EmbeddingOp, found: Tensor, values: dict[SSAValue, Any], sums: dict[str, Sums]) -> Tensor:
        unit = self._readers.get((op, 0))
        if unit is None or self.loss is None:
            return found
        table, indices = sums.setdefault(f"fisher {unit.key}", {}), values[op.indices]

        def added(leaf: Tensor) -> None:
            assert leaf.grad is not None
            add_table_gradient(table, unit, indices, leaf.grad)
            leaf.grad = None

        leaf = found.detach().requires_grad_()
        leaf.register_post_accumulate_grad_hook(added)
        return leaf

    def _observe(self, op: Operation, values: dict[SSAValue, Any], sample: Sample, sums: dict[str, Sums]) -> None:
        seen, products = self.plan.at(op)
        if "ranges" in self.kinds:
            for each in seen:
                add_values(sums.setdefault(f"ranges {each.key}", {}), each, self._value(each.value, values), sample)
        if "hessian" in self.kinds:
            for each in products:
                index = values[op.index] if isinstance(op, ExpertLinearOp) else None
                held = sums.setdefault(f"hessian {each.key}", {})
                add_products(held, each, self._value(each.value, values), index, sample)

    def _run(self, op: Operation, values: dict[SSAValue, Any], read: dict[SSAValue, Any]) -> list[Any]:
        if op not in self._calls:
            self._calls[op] = op.shape_call() if isinstance(op, Contraction) else op.call()
        given = {operand: read.get(operand) for operand in op.operands}
        given = {
            operand: self._value(operand, values) if tensor is None else tensor for operand, tensor in given.items()
        }
        return results(op, self._calls[op], given)

    def _value(self, value: SSAValue, values: dict[SSAValue, Any]) -> Any:
        if value in values:
            return values[value]
        if value not in self._constants:
            self._constants[value] = self._constant(value)
        return self._constants[value]

    def _constant(self, value: SSAValue) -> Any:
        import torch

        owner = value.owner
        assert isinstance(owner, Operation), value
        if isinstance(owner, ParameterOp):
            return _parameter(owner, self.weights)
        with torch.no_grad():
            found = self._run(owner, {}, {})
        self._constants |= zip(owner.results, found, strict=True)
        return self._constants[value]

    def _differentiated(self) -> set[SSAValue]:
        """The values that follow from something at which the loss is differentiated."""
        found: set[SSAValue] = set(filter(_is_number, self.block.args))
        for op in self.block.ops:
            taps = any((op, place) in self._readers for place in range(len(op.operands)))
            if taps or any(operand in found for operand in op.operands):
                found.update(filter(_is_number, op.results))
        return found - self.fixed


def _is_number(value: SSAValue) -> bool:
    if not isinstance(value.type, TensorType):
        return False
    element = element_of(value)
    return not formats.is_wide(element) or torch_dtype(element).is_floating_point


def _parameter(op: ParameterOp, weights: Weights) -> Tensor:
    """The values of a parameter; those it was rounded from where a pass has decided its codes and they are there."""
    name, element, shape = op.source.data, element_of(op.result), shape_of(op.result)
    if formats.is_wide(element):
        tensor = weights.wide(name).to(torch_dtype(element))
    elif isinstance(weights, WeightStore) and name + WIDE in weights:
        tensor = weights.wide(name + WIDE)
    else:
        tensor = weights.encoded(name, element, shape).decode()
    if tuple(tensor.shape) != shape:
        raise MxloomError(f'parameter "{name}" has shape {text(tensor.shape)}, the module says {text(shape)}')
    return tensor
