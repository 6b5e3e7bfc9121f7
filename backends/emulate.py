"""The `emulate` backend: a typed module as an FX graph that runs on torch tensors with the numerics of its types."""

from __future__ import annotations

from dataclasses import dataclass
from typing import IO, TYPE_CHECKING, Any

from xdsl.context import Context
from xdsl.dialects.builtin import ModuleOp, TensorType, f64
from xdsl.dialects.func import ReturnOp
from xdsl.ir import Attribute, Block, SSAValue
from xdsl.utils.target import Target

from ..dialects import formats
from ..dialects.instances import name_of
from ..dialects.names import attribute, identifier, unique
from ..dialects.operations._operation import AsCodes, Call, Operation
from ..dialects.operations._shapes import element_of, shape_of
from ..dialects.operations._values import path_of, torch_dtype
from ..dialects.operations.cast import CastOp
from ..dialects.operations.contraction import ExpertLinearOp, LinearOp
from ..dialects.operations.parameter import ParameterOp
from ..dialects.torch_operators import operator, quantize_call
from ._code_nodes import on_codes
from ._exact_nodes import ExactNodes
from .kernels import fake_quantization
from .reference import Weights, body, constants

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.fx import Graph, GraphModule, Node


@dataclass(frozen=True)
class Emulate(Target):
    """Prints the Python code of the graph that emulates the module."""

    name = "emulate"

    def emit(self, ctx: Context, module: ModuleOp, output: IO[str]) -> None:
        constants: dict[Any, Any] = {v: _unknown(v) for op in body(module).ops for v in op.results if _is_constant(v)}
        output.write(_emulation(module, constants).code)


def build(module: ModuleOp, weights: Weights) -> GraphModule:
    """A GraphModule with the module's inputs in order and a tuple of its outputs; equals `Interpreter` bit for bit.

    Rounded parameters are computed now and held as buffers; every other cast is a call of `mxloom::quantize`,
    which native kernels carry out on a CPU.
    """
    fake_quantization.register()
    return _emulation(module, constants(body(module), weights)[0])


def _emulation(module: ModuleOp, constants: dict[Any, Any]) -> GraphModule:
    from torch.fx import GraphModule

    emitter = _Emitter(body(module), constants)
    graph = emitter.graph_of()
    emulation = GraphModule(emitter.buffers.root, graph, class_name="Emulation")
    return emulation.eval()


class _Emitter:
    """Walks the block and writes one FX node for each operation, and one for each conversion it implies."""

    def __init__(self, block: Block, constants: dict[Any, Any]) -> None:
        from torch.fx import Graph

        self.block, self.constants = block, constants
        self.buffers = _Held()
        self.graph: Graph = Graph()
        self.nodes: dict[SSAValue, Node] = {}
        self.held: dict[tuple[SSAValue, Any], Node] = {}
        self.exact = ExactNodes(self.graph, self.buffers, constants)

    def graph_of(self) -> Graph:
        from torch.fx.graph import _Namespace

        legal = _Namespace()  # torch's own: it keeps clear of builtins and of what the code itself refers to
        for names in (legal, self.graph._graph_namespace):
            names.create_name("self", None)
        for argument in self.block.args:
            name = legal.create_name(identifier(path_of(argument) or f"input_{argument.index}"), None)
            self.nodes[argument] = self.graph.placeholder(name)
        for argument in self.block.args:
            self.nodes[argument] = self._input(self.nodes[argument], argument.type)
        for op in self.block.ops:
            if isinstance(op, ReturnOp):
                self.graph.output(tuple(self._node(value) for value in op.operands))
            elif isinstance(op, Operation) and not self._has_no_node(op):
                self._emit(op)
        self.graph.lint()
        return self.graph

    def _input(self, node: Node, type: Attribute) -> Node:
        """An input of fixed-point format is rounded into it."""
        if not isinstance(type, TensorType) or not isinstance(type.element_type, formats.FixedType):
            return node
        target, args, kwargs = quantize_call(node, type.element_type, formats.Rounding())
        return self._to(self.graph.call_function(target, args, kwargs), torch_dtype(type.element_type))

    def _has_no_node(self, op: Operation) -> bool:
        return _is_constant(op.results[0]) or self.exact.is_absorbed(op)

    def _emit(self, op: Operation) -> None:
        call = op.call()
        if isinstance(op, LinearOp) and op.acc is not None:
            found = self.exact.node(op, tuple(self._operand(value, call.dtype) for value in self.exact.inputs(op)))
        elif isinstance(op, ExpertLinearOp) and op.acc is not None:
            (value,) = self.exact.inputs(op)
            found = self.exact.experts(op, self._operand(value, call.dtype), self._node(op.index))
        elif any(isinstance(argument, AsCodes) for argument in call.args):
            module, values = on_codes(call, self.constants)
            place = self.buffers.hold_module(path_of(op.results[0]) or op.name, module)
            found = self.graph.create_node("call_module", place, tuple(self._node(value) for value in values))
        else:
            found = self._call(call)
        results = (
            [found] if len(op.results) == 1 and not _returns_several(call) else self._parts(found, len(op.results))
        )
        for result, node in zip(op.results, results, strict=True):
            node.name = self.graph._graph_namespace.create_name(identifier(path_of(result) or op.name), None)
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
            found = self.graph.call_function(target, args, kwargs)
            wide = isinstance(element, formats.FixedType) and call.dtype == f64
            return self._to(found, torch_dtype(element)) if wide else found
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
            tensor = self.constants[value]
            suffix = _format_suffix(value) + (f"_as_{dtype}".replace("torch.", "") if dtype else "")
            path = self.buffers.hold(_source(value), suffix, tensor.to(dtype) if dtype else tensor)
            self.held[value, dtype] = self.graph.create_node("get_attr", path)
        return self.held[value, dtype]


def _source(value: SSAValue) -> str:
    """The name in the checkpoint of the parameter that a constant comes from."""
    while isinstance(value.owner, CastOp):
        value = value.owner.input
    assert isinstance(value.owner, ParameterOp)
    return value.owner.source.data


def _is_constant(value: SSAValue) -> bool:
    """Whether the interpreter computes the value once: a parameter, or a cast of one."""
    while isinstance(value.owner, CastOp):
        value = value.owner.input
    return isinstance(value.owner, ParameterOp)


def _returns_several(call: Call) -> bool:
    schema = getattr(call.target, "_schema", None)
    return schema is not None and (len(schema.returns) > 1 or str(schema.returns[0].type).startswith("List["))


def _format_suffix(value: SSAValue) -> str:
    """What stands behind a parameter's name where casts have rounded it: the names of the formats."""
    parts: list[str] = []
    while isinstance(value.owner, CastOp):
        parts.insert(0, name_of(element_of(value)))
        value = value.owner.input
    return "".join(f"_{part}" for part in parts)


class _Held:
    """The graph's module and what it holds: every tensor under a name of its own, near its name in the checkpoint.

    A path of the checkpoint becomes one of plain modules. Names that code cannot say (keywords, quotes), that torch has
    given away (`training`), or that another path has taken, are changed: one place never means two tensors.
    """

    def __init__(self) -> None:
        from torch import nn

        self.root: nn.Module = nn.Module()
        self._places: dict[tuple[str, ...], str] = {}

    def hold(self, source: str, suffix: str, tensor: Tensor) -> str:
        """Hold the tensor that comes from `source`; the dotted path where it lies."""
        *parents, last = source.split(".")
        place, module = self._module(tuple(parents))
        name = unique(attribute(f"{last}{suffix}"), lambda name: hasattr(module, name))
        _register(module, name, tensor)
        return f"{place}.{name}" if place else name

    def hold_module(self, source: str, module: nn.Module) -> str:
        """Hold a module under the name of the one that it stands for; the dotted path where it lies."""
        *parents, last = source.split(".")
        place, parent = self._module(tuple(parents))
        name = unique(attribute(last), lambda name: hasattr(parent, name))
        parent.add_module(name, module)
        return f"{place}.{name}" if place else name

    def _module(self, path: tuple[str, ...]) -> tuple[str, nn.Module]:
        """The module that stands for a path of the checkpoint, and where it lies."""
        from torch import nn

        if not path:
            return "", self.root
        if path not in self._places:
            place, parent = self._module(path[:-1])
            name = unique(attribute(path[-1]), lambda name: hasattr(parent, name))
            parent.add_module(name, nn.Module())
            self._places[path] = f"{place}.{name}" if place else name
        return self._places[path], self.root.get_submodule(self._places[path])


def _register(module: nn.Module, name: str, tensor: Tensor) -> None:
    """Hold a tensor as a buffer. Raises KeyError where the name is taken."""
    if hasattr(module, name):
        raise KeyError(f"the emulation holds something named {name!r} already")
    module.register_buffer(name, tensor)


def _unknown(value: SSAValue) -> Tensor:
    """Stands for a constant where only the code of the graph is wanted."""
    import torch

    return torch.empty(shape_of(value), dtype=torch_dtype(element_of(value)), device="meta")
