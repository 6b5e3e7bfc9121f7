"""Nodes of an emulation for linear layers with accumulators: one for all layers that read the codes of one value."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

from xdsl.dialects.builtin import TensorType, f32
from xdsl.ir import SSAValue

from ..dialects.contractions import rows_of
from ..dialects.errors import MxloomError
from ..dialects.formats import Rounding
from ..dialects.operations._operation import AsCodes, Operation
from ..dialects.operations._shapes import element_of
from ..dialects.operations._values import path_of
from ..dialects.operations.cast import CastOp
from ..dialects.operations.contraction import ExpertLinearOp, LinearOp
from ..dialects.operations.normalization import RMSNormOp
from ..dialects.operations.pointwise import MulOp

if TYPE_CHECKING:
    from torch import nn
    from torch.fx import Graph, Node

    from ..dialects.contractions import Coded


class Modules(Protocol):
    """Where the emulation's modules are held."""

    def hold_module(self, source: str, module: nn.Module) -> str: ...


class ExactNodes:
    """Writes the nodes of the layers of one block."""

    def __init__(self, graph: Graph, modules: Modules, constants: dict[Any, Any]) -> None:
        self.graph, self.modules, self.constants = graph, modules, constants
        self._nodes: dict[SSAValue, Node] = {}

    def is_absorbed(self, op: Operation) -> bool:
        """Whether an operation has no node of its own: nobody reads its values, but layers their codes."""
        if isinstance(op, CastOp):
            return is_read_as_codes(op)
        cast = _only_reader(op)
        if (
            cast is None
            or not is_read_as_codes(cast)
            or any(isinstance(u.operation, ExpertLinearOp) for u in cast.result.uses)
        ):
            return False
        return self._absorbs(op)

    def inputs(self, op: LinearOp | ExpertLinearOp) -> tuple[SSAValue, ...]:
        """The values that the node of a layer reads."""
        value = _source(op.input)
        owner = value.owner
        if isinstance(owner, Operation) and value is not op.input and self.is_absorbed(owner):
            return (owner.input,) if isinstance(owner, RMSNormOp) else tuple(owner.operands)
        return (value,)

    def node(self, op: LinearOp, inputs: tuple[Node, ...]) -> Node:
        """The node of a layer's result."""
        if op.result not in self._nodes:
            layers = readers_as_codes(op.input)
            place = self._module(layers)
            every = self.graph.create_node("call_module", place, inputs)
            for number, layer in enumerate(layers):
                self._nodes[layer.result] = self.graph.call_function(operator.getitem, (every, number))
        return self._nodes[op.result]

    def experts(self, op: ExpertLinearOp, input: Node, index: Node) -> Node:
        """The node of a layer of experts."""
        from torch import nn

        name, weight = _name([op]), self._weight(op)
        if weight is None or op.acc is None:
            return self.graph.create_node("call_module", self.modules.hold_module(name, nn.Module()), (input, index))
        from .kernels.contraction.exact_layers import ExactExperts, register
        from .kernels.contraction.exact_linear import ExactLinear

        register()
        biases = None if op.bias is None else self.constants[op.bias]
        held = [
            ExactLinear(rows_of(weight, e), None if biases is None else biases[e], op.acc, element_of(op.input))
            for e in range(weight.codes.shape[0])
        ]
        how = op.input.owner.how() if isinstance(op.input.owner, CastOp) else Rounding()
        module = ExactExperts(held, str(element_of(op.input)), how)
        return self.graph.create_node("call_module", self.modules.hold_module(name, module), (input, index))

    def _module(self, layers: list[LinearOp]) -> str:
        from torch import nn

        name = _name(layers)
        weights = [self._weight(layer) for layer in layers]
        if any(weight is None for weight in weights):  # only the code of the graph is wanted
            return self.modules.hold_module(name, nn.Module())
        from .kernels.contraction.exact_layers import ExactLayers, register
        from .kernels.contraction.exact_linear import ExactLinear

        register()
        first = layers[0].input
        held = [
            ExactLinear(weight, None if op.bias is None else self.constants[op.bias], op.acc, element_of(op.input))
            for op, weight in zip(layers, weights, strict=True)
            if weight is not None and op.acc is not None
        ]
        how = first.owner.how() if isinstance(first.owner, CastOp) else Rounding()
        module = ExactLayers(held, str(element_of(first)), how, self._what(first))
        return self.modules.hold_module(name, module)

    def _what(self, value: SSAValue) -> Any:
        """What the module does to its inputs before they are rounded."""
        from .kernels.contraction.exact_layers import Norm, Product

        owner = _source(value).owner
        if value is _source(value) or not isinstance(owner, Operation) or not self.is_absorbed(owner):
            return None
        if isinstance(owner, MulOp):
            return Product()
        assert isinstance(owner, RMSNormOp)
        weight = None if owner.weight is None else self.constants[owner.weight]
        return Norm(weight, owner.eps.value.data, owner.unit_offset is not None)

    def _absorbs(self, op: Operation) -> bool:
        """Whether layers carry out an operation on the way to their codes: all in f32, of one shape."""
        if not isinstance(op, MulOp | RMSNormOp) or any(not _is_f32(v) for v in (*op.operands, *op.results)):
            return False
        if isinstance(op, MulOp):
            return all(value.type == op.results[0].type and value not in self.constants for value in op.operands)
        return op.weight is None or op.weight in self.constants

    def _weight(self, op: LinearOp | ExpertLinearOp) -> Coded | None:
        weight: Coded | None = self.constants.get(AsCodes(op.weight, op.transposed is not None))
        if weight is None and op.weight in self.constants:
            return None
        if weight is None or (op.bias is not None and op.bias not in self.constants):
            raise MxloomError(
                f'"{path_of(op.result)}": a linear layer with an accumulator needs weights and a bias that follow from '
                "parameters by a cast alone; leave the accumulator out here"
            )
        return weight


def is_read_as_codes(op: CastOp) -> bool:
    """Whether nobody reads the values of a cast, but its codes."""
    readers = [use.operation for use in op.result.uses]
    return bool(readers) and all(isinstance(r, LinearOp | ExpertLinearOp) and r.acc is not None for r in readers)


def readers_as_codes(value: SSAValue) -> list[LinearOp]:
    """The layers that read a value as codes, in the order of the block."""
    found = {use.operation for use in value.uses}
    block = value.owner if not isinstance(value.owner, Operation) else value.owner.parent
    every = list(block.ops) if block is not None else []  # pyright: ignore[reportAttributeAccessIssue]
    return [op for op in every if isinstance(op, LinearOp) and op.acc is not None and op in found and op.input is value]


def _source(value: SSAValue) -> SSAValue:
    """The value under a cast."""
    return value.owner.input if isinstance(value.owner, CastOp) else value


def _is_f32(value: SSAValue) -> bool:
    return isinstance(value.type, TensorType) and value.type.element_type == f32


def _only_reader(op: Operation) -> CastOp | None:
    """The cast that is the only reader of an operation's result."""
    readers = {use.operation for result in op.results for use in result.uses}
    only = next(iter(readers), None)
    return only if len(readers) == 1 and isinstance(only, CastOp) else None


def _name(layers: Sequence[LinearOp | ExpertLinearOp]) -> str:
    """The name of one layer, or those of several under the module that holds the first."""
    paths = [path_of(layer.result) or layer.name for layer in layers]
    if len(paths) == 1:
        return paths[0]
    parent, dot, _ = paths[0].rpartition(".")
    return parent + dot + "_".join(path.rpartition(".")[2] for path in paths)
