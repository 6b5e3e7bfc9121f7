"""A module run forward over segments, its values observed, and backward again with the gradients of a loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from xdsl.dialects.builtin import TensorType
from xdsl.dialects.func import ReturnOp
from xdsl.ir import SSAValue, TypeAttribute

from ..backends.reference import Weights, body, results
from ..backends.weight_store import WeightStore
from ..dialects import formats
from ..dialects.errors import MxloomError
from ..dialects.operations._operation import Call, Operation
from ..dialects.operations._shapes import element_of, shape_of, text
from ..dialects.operations._values import torch_dtype
from ..dialects.operations.attention import AttentionOp
from ..dialects.operations.cast import CastOp
from ..dialects.operations.contraction import Contraction, EmbeddingOp, ExpertLinearOp
from ..dialects.operations.parameter import ParameterOp
from ..dialects.torch_operators import attention
from ._losses import Loss
from ._observed import Gradients, Plan, Reader
from ._samples import Sample
from ._segments import Segment, fixed_values, segments_of
from ._shelf import Shelf
from ._sites import module_name
from ._sums import Sums, add_gradient, add_products, add_table_gradient, add_values, no_rows

if TYPE_CHECKING:
    from torch import Tensor

Done = Callable[[str, str, Sums], None]
"""Told the kind, the key and the sums of what no later segment adds to."""


KEPT = 16 << 20
"""Bytes of probabilities of attention that are kept until they are differentiated."""


class Sweep:
    """Collects the statistics of a plan, a shard of samples at a time.

    The weights of one segment are in memory at a time. What goes from one to the next is kept for all samples of the
    shard, on a shelf that spills into files. With a loss, each segment runs a second time, from the last to the first,
    to be differentiated sample by sample.
    """

    def __init__(self, plan: Plan, weights: Weights, kinds: frozenset[str], loss: Loss | None) -> None:
        self.plan, self.weights, self.kinds, self.loss = plan, weights, kinds, loss
        self.block = body(plan.module)
        self.fixed = fixed_values(self.block)
        self.segments = segments_of(self.block, plan, self.fixed)
        self.outputs = [value for op in self.block.ops if isinstance(op, ReturnOp) for value in op.operands]
        self._calls: dict[Operation, Call] = {}
        self._constants: dict[SSAValue, Any] = {}
        self._readers: dict[Reader, Gradients] = {}
        self._follows: set[SSAValue] = set()
        self._first_reader: dict[str, Segment] = {}
        if loss is not None:
            _check_differentiable(self.block.ops)
            self._prepare_gradients()

    def shard(self, samples: Sequence[Sample], first: int, done: Done | None = None) -> None:
        """Run some samples; `first` is the number of the first of them. `done` is told the sums, key by key."""
        import torch

        done = done or (lambda kind, key, sums: None)
        shelf = Shelf()
        for number, sample in enumerate(samples):
            self._put_inputs(shelf, number, sample)
        ends = len(self.segments) - (1 if self.loss is not None else 0)
        with torch.no_grad():
            for segment in self.segments[:ends]:
                sums = _Sums(self)
                for number, sample in enumerate(samples):
                    self._forward(segment, number, sample, shelf, sums)
                self._end_segment(sums, done)
        if self.loss is not None:
            for segment in reversed(self.segments):
                sums = _Sums(self)
                for number, sample in enumerate(samples):
                    self._backward(segment, number, first, sample, shelf, sums)
                self._end_segment(sums, done)

    def _end_segment(self, sums: _Sums, done: Done) -> None:
        self._constants.clear()
        self._release()
        for (kind, key), found in sums.found.items():
            done(kind, key, found)

    def _release(self) -> None:
        """Files need not lie in memory beside what was made of them."""
        if isinstance(self.weights, WeightStore):
            self.weights.release()

    def _put_inputs(self, shelf: Shelf, number: int, sample: Sample) -> None:
        if len(sample.inputs) != len(self.block.args):
            raise MxloomError(f"the module takes {len(self.block.args)} inputs, got {len(sample.inputs)}")
        for argument, tensor in zip(self.block.args, sample.inputs, strict=True):
            shelf.put((number, argument), tensor)

    def _forward(self, segment: Segment, number: int, sample: Sample, shelf: Shelf, sums: _Sums) -> None:
        values = {value: shelf.get((number, value)) for value in segment.imports}
        for op, dead in zip(segment.operations, segment.dead, strict=True):
            self._observe(op, values, sample, sums)
            values |= zip(op.results, self._run(op, values), strict=True)
            for value in dead:
                values.pop(value, None)
        for value in segment.exports:
            shelf.put((number, value), values[value])
        if self.loss is None:
            for value in segment.last_read:
                shelf.drop((number, value))

    def _backward(self, segment: Segment, number: int, first: int, sample: Sample, shelf: Shelf, sums: _Sums) -> None:
        import torch

        is_last = segment is self.segments[-1]
        leaves = {value: self._leaf(value, shelf.get((number, value))) for value in segment.imports}
        run = _Differentiated(self, segment, sample, sums, dict(leaves), observes=is_last)
        with torch.enable_grad():
            run()
        seeds = [(run.values[v], self._seed(v, run.values[v], shelf, number, first, sample)) for v in segment.exports]
        for value in segment.exports:
            shelf.drop((number, value))
        seeds = [(tensor, seed) for tensor, seed in seeds if seed is not None and tensor.requires_grad]
        run.values.clear()
        if seeds:
            torch.autograd.backward([tensor for tensor, _ in seeds], [seed for _, seed in seeds])
        run.release()
        for value, leaf in leaves.items():
            if getattr(leaf, "grad", None) is not None and value not in self.block.args:
                _add(shelf, (number, "gradient", value), leaf.grad)
                leaf.grad = None
        for key, gradient in run.partial.items():
            _add(shelf, (number, "partial", key), gradient)
        for key, reader in self._first_reader.items():
            if reader is segment and (total := shelf.take((number, "partial", key))) is not None:
                add_gradient(sums.of("fisher", key), self.plan.gradients[key], total, sample)

    def _seed(
        self, value: SSAValue, tensor: Tensor, shelf: Shelf, number: int, first: int, sample: Sample
    ) -> Tensor | None:
        """The gradient of the loss at a value that a segment yields: what later segments told, and the loss itself."""
        assert self.loss is not None
        found = shelf.take((number, "gradient", value))
        for place in self.loss.outputs:
            if value is self.outputs[place]:
                own = self.loss.gradient(place, tensor.detach(), sample, first + number)
                found = own if found is None else found.add_(own)
        return found

    def _leaf(self, value: SSAValue, held: Any) -> Any:
        return held.detach().requires_grad_() if value in self._follows else held

    def _observe(self, op: Operation, values: dict[SSAValue, Any], sample: Sample, sums: _Sums) -> None:
        seen, products = self.plan.at(op)
        if "ranges" in self.kinds:
            for each in seen:
                add_values(sums.of("ranges", each.key), each, self._value(each.value, values), sample)
        if "hessian" in self.kinds:
            for each in products:
                index = values[op.index] if isinstance(op, ExpertLinearOp) else None
                add_products(sums.of("hessian", each.key), each, self._value(each.value, values), index, sample)

    def _run(
        self,
        op: Operation,
        values: dict[SSAValue, Any],
        read: Mapping[SSAValue, Any] = MappingProxyType({}),
        call: Call | None = None,
    ) -> list[Any]:
        """The results of an operation for operands from `read`, else from `values`."""
        if op not in self._calls:
            self._calls[op] = op.shape_call() if isinstance(op, Contraction) else op.call()
        given = {o: read[o] if o in read else self._value(o, values) for o in op.operands}
        return results(op, call or self._calls[op], given)

    def _value(self, value: SSAValue, values: dict[SSAValue, Any]) -> Any:
        if value in values:
            return values[value]
        if value not in self._constants:
            self._constants[value] = self._constant(value)
        return self._constants[value]

    def _constant(self, value: SSAValue) -> Any:
        """What follows from parameters alone; kept while its segment runs."""
        import torch

        owner = value.owner
        assert isinstance(owner, Operation), value
        if isinstance(owner, ParameterOp):
            values = parameter_values(owner, self.weights)
            self._release()
            return values
        with torch.no_grad():
            found = self._run(owner, {})
        self._constants |= zip(owner.results, found, strict=True)
        return self._constants[value]

    def _prepare_gradients(self) -> None:
        """Who reads what is differentiated, which values follow from it, and where one of several segments is first."""
        units = self.plan.gradients.values()
        self._readers = {reader: unit for unit in units for reader in unit.readers}
        follows: set[SSAValue] = set(filter(_is_number, self.block.args))
        for op in self.block.ops:
            tapped = any((op, place) in self._readers for place in range(len(op.operands)))
            if tapped or any(operand in follows for operand in op.operands):
                follows.update(filter(_is_number, op.results))
        self._follows = follows - self.fixed
        places = {op: segment for segment in self.segments for op in segment.operations}
        for unit in units:
            readers = [places[op] for op, _ in unit.readers if isinstance(op, Operation) and op in places]
            if any(segment is not readers[0] for segment in readers):
                self._first_reader[unit.key] = min(readers, key=self.segments.index)


class _Sums:
    """The sums of one segment, by kind and key; begun when they are first asked for."""

    def __init__(self, sweep: Sweep) -> None:
        plan = sweep.plan
        self._units: dict[str, dict[str, Any]] = {
            "ranges": plan.values,
            "hessian": plan.products,
            "fisher": plan.gradients,
        }
        self.found: dict[tuple[str, str], Sums] = {}

    def of(self, kind: str, key: str) -> Sums:
        if (kind, key) not in self.found:
            self.found[kind, key] = no_rows(self._units[kind][key])
        return self.found[kind, key]


class _Differentiated:
    """One run of a segment with a graph behind it: hooks square the gradients that come back.

    `partial` holds those of values that other segments read too.
    """

    def __init__(
        self,
        sweep: Sweep,
        segment: Segment,
        sample: Sample,
        sums: _Sums,
        values: dict[SSAValue, Any],
        *,
        observes: bool,
    ) -> None:
        self.sweep, self.segment, self.sample, self.sums, self.values = sweep, segment, sample, sums, values
        self.observes = observes
        self.partial: dict[str, Tensor] = {}
        self._taps: dict[str, Tensor] = {}
        self._hooks: list[Any] = []

    def release(self) -> None:
        """Let go of the tensors: they hold hooks, and these hold them."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self._taps.clear()

    def __call__(self) -> None:
        import torch

        for op, dead in zip(self.segment.operations, self.segment.dead, strict=True):
            if self.observes:
                with torch.no_grad():
                    self.sweep._observe(op, self.values, self.sample, self.sums)
            found = self.sweep._run(op, self.values, self._read(op), self._call(op))
            if isinstance(op, EmbeddingOp):
                found = [self._looked_up(op, found[0])]
            self.values |= zip(op.results, found, strict=True)
            for value in dead:
                self.values.pop(value, None)

    def _call(self, op: Operation) -> Call | None:
        """Attention whose probabilities are small keeps them for the way back, rather than to compute them again."""
        if not isinstance(op, AttentionOp):
            return None
        query, key = (self.sweep._value(value, self.values) for value in (op.query, op.key))
        if query[..., 0].numel() * key.shape[2] * query.element_size() > KEPT:
            return None
        call = op.shape_call()
        return Call(attention, call.args, call.kwargs, call.dtype)

    def _read(self, op: Operation) -> dict[SSAValue, Any]:
        """The operands at which the loss is differentiated, as leaves or with hooks."""
        found: dict[SSAValue, Any] = {}
        for place, operand in enumerate(op.operands):
            unit = self.sweep._readers.get((op, place))
            if unit is not None and not unit.is_table:
                if unit.key not in self._taps:
                    self._taps[unit.key] = self._tap(unit)
                found[operand] = self._taps[unit.key]
        return found

    def _tap(self, unit: Gradients) -> Tensor:
        tensor = self.sweep._value(unit.value, self.values)
        if not tensor.requires_grad:
            leaf = tensor.detach().requires_grad_()
            self._hooks.append(leaf.register_post_accumulate_grad_hook(lambda leaf: self._come_to_leaf(unit, leaf)))
            return leaf
        tap = tensor.view_as(tensor)
        self._hooks.append(tap.register_hook(lambda gradient: self._come(unit, gradient)))
        return tap

    def _come_to_leaf(self, unit: Gradients, leaf: Tensor) -> None:
        assert leaf.grad is not None
        self._come(unit, leaf.grad)
        leaf.grad = None

    def _come(self, unit: Gradients, gradient: Tensor) -> None:
        if unit.key in self.sweep._first_reader:
            self.partial[unit.key] = gradient
        else:
            add_gradient(self.sums.of("fisher", unit.key), unit, gradient, self.sample)

    def _looked_up(self, op: EmbeddingOp, found: Tensor) -> Tensor:
        """What was found in a table as a leaf: rows that nobody looked up have no gradient."""
        unit, indices = self.sweep._readers[op, 0], self.sweep._value(op.indices, self.values)

        def come(leaf: Tensor) -> None:
            assert leaf.grad is not None
            add_table_gradient(self.sums.of("fisher", unit.key), indices, leaf.grad)
            leaf.grad = None

        leaf = found.detach().requires_grad_()
        self._hooks.append(leaf.register_post_accumulate_grad_hook(come))
        return leaf


def _add(shelf: Shelf, key: Any, gradient: Tensor) -> None:
    before = shelf.take(key)
    shelf.put(key, gradient if before is None else before + gradient)


def _check_differentiable(operations: Any) -> None:
    """Raise MxloomError for a module that computes in formats: rounding that is no cast has no gradient."""
    for op in operations:
        if isinstance(op, CastOp | ParameterOp) or not isinstance(op, Operation):
            continue
        narrow = next((v for v in op.results if isinstance(v.type, TensorType) and not _is_wide(v)), None)
        if narrow is not None:
            raise MxloomError(
                f"{module_name(op)} computes values of {element_of(narrow)}, and what rounds inside an operation has "
                "no gradient: fisher is collected before legalize-hardware"
            )


def _is_wide(value: SSAValue) -> bool:
    return formats.is_wide(element_of(value))


def _is_number(value: SSAValue) -> bool:
    """Whether a value is a tensor of floats."""
    if not isinstance(value.type, TensorType):
        return False
    return not _is_wide(value) or torch_dtype(element_of(value)).is_floating_point


def parameter_values(op: ParameterOp, weights: Weights) -> Tensor:
    name, element, shape = op.source.data, element_of(op.result), shape_of(op.result)
    if formats.is_wide(element):
        tensor = weights.wide(name).to("cpu", torch_dtype(element))
    else:
        assert isinstance(element, TypeAttribute)
        tensor = weights.encoded(name, element, shape).decode()
    if tuple(tensor.shape) != shape:
        raise MxloomError(f'parameter "{name}" has shape {text(tensor.shape)}, the module says {text(shape)}')
    return tensor
