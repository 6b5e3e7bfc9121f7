"""The `emulate` backend: a typed module as an FX graph that runs on torch tensors with the numerics of its types."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING, Any

from xdsl.context import Context
from xdsl.dialects.builtin import ModuleOp, TensorType
from xdsl.dialects.func import ReturnOp
from xdsl.ir import Attribute, Block, SSAValue
from xdsl.utils.target import Target

from ..dialects import formats
from ..dialects.operations._operation import Call, Operation
from ..dialects.operations._shapes import element_of, shape_of
from ..dialects.operations._values import path_of, torch_dtype
from ..dialects.operations.cast import CastOp
from ..dialects.operations.parameter import ParameterOp
from ..dialects.torch_operators import operator, quantize_call
from .reference import Interpreter, Weights, body

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.fx import Graph, GraphModule, Node


@dataclass(frozen=True)
class Emulate(Target):
    """Prints the Python code of the graph that emulates the module."""

    name = "emulate"

    def emit(self, ctx: Context, module: ModuleOp, output: IO[str]) -> None:
        constants: dict[SSAValue, Tensor] = {
            v: _unknown(v) for op in body(module).ops for v in op.results if _is_constant(v)
        }
        output.write(_emulation(module, constants).code)


def build(module: ModuleOp, weights: Weights) -> GraphModule:
    """A GraphModule with the module's inputs in order and a tuple of its outputs; equals `Interpreter` bit for bit.

    Rounded parameters are computed now and held as buffers; every other cast is a call of `mxloom::quantize`.
    """
    return _emulation(module, Interpreter(module, weights).constants)


def _emulation(module: ModuleOp, constants: dict[SSAValue, Tensor]) -> GraphModule:
    from torch.fx import GraphModule

    emitter = _Emitter(body(module), constants)
    graph = emitter.graph_of()
    emulation = GraphModule(emitter.root, graph, class_name="Emulation")
    return emulation.eval()


class _Emitter:
    """Walks the block and writes one FX node for each operation, and one for each conversion it implies."""

    def __init__(self, block: Block, constants: dict[SSAValue, Tensor]) -> None:
        from torch import nn
        from torch.fx import Graph

        self.block, self.constants = block, constants
        self.root: nn.Module = nn.Module()
        self.graph: Graph = Graph()
        self.nodes: dict[SSAValue, Node] = {}
        self.held: dict[tuple[SSAValue, Any], Node] = {}

    def graph_of(self) -> Graph:
        for argument in self.block.args:
            self.nodes[argument] = self.graph.placeholder(_identifier(argument.name_hint or f"input_{argument.index}"))
        for op in self.block.ops:
            if isinstance(op, ReturnOp):
                self.graph.output(tuple(self._node(value) for value in op.operands))
            elif isinstance(op, Operation) and not _is_constant(op.results[0]):
                self._emit(op)
        self.graph.lint()
        return self.graph

    def _emit(self, op: Operation) -> None:
        call = op.call()
        found = self._call(call)
        results = (
            [found] if len(op.results) == 1 and not _returns_several(call) else self._parts(found, len(op.results))
        )
        for result, node in zip(op.results, results, strict=True):
            node.name = self.graph._graph_namespace.create_name(_identifier(path_of(result) or op.name), None)
            self.nodes[result] = self._rounded(node, result.type, call)

    def _call(self, call: Call) -> Node:
        return self.graph.call_function(
            call.target, self._fill(call.args, call.dtype), self._fill(call.kwargs, call.dtype)
        )

    def _parts(self, node: Node, count: int) -> list[Node]:
        import operator as python

        return [self.graph.call_function(python.getitem, (node, place)) for place in range(count)]

    def _fill(self, template: Any, dtype: Attribute | None) -> Any:
        match template:
            case SSAValue():
                return self._operand(template, dtype)
            case tuple() | list():
                return type(template)(self._fill(item, dtype) for item in template)
            case dict():
                return {name: self._fill(item, dtype) for name, item in template.items()}
        return template

    def _operand(self, value: SSAValue, dtype: Attribute | None) -> Node:
        """A value as the call reads it: as `dtype` where that is given and the value is a float tensor of another."""
        if dtype is None or not isinstance(value.type, TensorType):
            return self._node(value)
        held, wanted = torch_dtype(element_of(value)), torch_dtype(dtype)
        if not held.is_floating_point or held == wanted:
            return self._node(value)
        return self._node(value, wanted) if value in self.constants else self._to(self._node(value), wanted)

    def _rounded(self, node: Node, type: Attribute, call: Call) -> Node:
        """The interpreter's rule: a result is rounded once into its type."""
        if not isinstance(type, TensorType):
            return node
        element = type.element_type
        if not formats.is_wide(element):
            if call.target is operator("mxloom.quantize.default"):
                return node
            target, args, kwargs = quantize_call(node, element, formats.Rounding())
            return self.graph.call_function(target, args, kwargs)
        wanted = torch_dtype(element)
        differs = call.dtype is not None and wanted.is_floating_point and torch_dtype(call.dtype) != wanted
        return self._to(node, wanted) if differs else node

    def _to(self, node: Node, dtype: Any) -> Node:
        return self.graph.call_function(operator("aten._to_copy.default"), (node,), {"dtype": dtype})

    def _node(self, value: SSAValue, dtype: Any = None) -> Node:
        """The node of a value; that of a constant is made when it is first read, in `dtype` where that is given."""
        if value not in self.constants:
            return self.nodes[value]
        if (value, dtype) not in self.held:
            name = _attribute_path(value) + (f"_as_{dtype}".replace("torch.", "") if dtype else "")
            _register(self.root, name, self.constants[value].to(dtype) if dtype else self.constants[value])
            self.held[value, dtype] = self.graph.get_attr(name)
        return self.held[value, dtype]


def _is_constant(value: SSAValue) -> bool:
    """Whether the interpreter computes the value once: a parameter, or a cast of one."""
    while isinstance(value.owner, CastOp):
        value = value.owner.input
    return isinstance(value.owner, ParameterOp)


def _returns_several(call: Call) -> bool:
    schema = getattr(call.target, "_schema", None)
    return schema is not None and (len(schema.returns) > 1 or "[]" in str(schema.returns[0].type))


def _identifier(name: str) -> str:
    """A module path as a Python name."""
    plain = re.sub(r"\W", "_", name)
    return plain if plain.isidentifier() else f"_{plain}"


def _attribute_path(value: SSAValue) -> str:
    """Where a constant lies in the graph's module: by its parameter, with the format behind it where it is rounded."""
    parts: list[str] = []
    while isinstance(value.owner, CastOp):
        parts.insert(0, _identifier(_short(value)))
        value = value.owner.input
    assert isinstance(value.owner, ParameterOp)
    source = [_identifier(p) if not p.isdigit() else p for p in value.owner.source.data.split(".") if p]
    return ".".join([*source[:-1], "_".join([*source[-1:], *parts])])


def _short(value: SSAValue) -> str:
    from ..dialects.instances import name_of

    return name_of(element_of(value))


def _register(root: nn.Module, path: str, tensor: Tensor) -> None:
    """Hold a tensor as a buffer under a dotted path, with plain modules on the way."""
    from torch import nn

    *parents, name = path.split(".")
    module = root
    for parent in parents:
        if not hasattr(module, parent):
            module.add_module(parent, nn.Module())
        module = getattr(module, parent)
        if not isinstance(module, nn.Module):  # a tensor and a module of one name: the tensor keeps it
            raise TypeError(f"{path}: {parent} is a tensor")
    module.register_buffer(name, tensor)


def _unknown(value: SSAValue) -> Tensor:
    """Stands for a constant where only the code of the graph is wanted."""
    import torch

    return torch.empty(shape_of(value), dtype=torch_dtype(element_of(value)), device="meta")
