"""FX graph to mx module: one node, one operation; names and places come from the model."""

from __future__ import annotations

import operator
import re
from collections.abc import Iterator
from functools import cache
from typing import TYPE_CHECKING, Any

from xdsl.dialects import builtin
from xdsl.dialects.builtin import DictionaryAttr, FileLineColLoc, IntAttr, ModuleOp, StringAttr, TensorType
from xdsl.dialects.func import FuncOp, ReturnOp
from xdsl.ir import Attribute, SSAValue
from xdsl.utils.exceptions import VerifyException

from ..dialects import torch_operators
from ..dialects.errors import MxloomError
from ..dialects.mx import OPERATIONS
from ..dialects.operations._operation import Operation
from ..dialects.operations._shapes import UNKNOWN
from ..dialects.operations._torch_operation import Argument, Aten, TorchOperation
from ..dialects.operations._values import element_type, encode, hint_of
from ..dialects.operations.attention import AttentionOp
from ..dialects.operations.contraction import Contraction, EmbeddingOp, MatmulOp
from ..dialects.operations.normalization import Normalization, SoftmaxOp
from ..dialects.operations.opaque import AtenOp, SymOp
from ..dialects.operations.parameter import ParameterOp
from .products import is_product

if TYPE_CHECKING:
    from torch import Tensor
    from torch.export import ExportedProgram
    from torch.fx import Node

IGNORED = ("device", "layout", "pin_memory", "memory_format", "non_blocking")
"""Arguments that say where bytes lie, which is not the module's business."""


def import_program(program: ExportedProgram) -> ModuleOp:
    """The module of a captured (and simplified) program: one function `forward`, every tensor wide.

    Parameters are called as the program's signature calls them, operations after the model's modules. Raises
    MxloomError for a node that no operation can hold (control flow with branches of its own).
    """
    torch_operators.register()
    return _Importer(program).module()


def constants(program: ExportedProgram) -> dict[str, Tensor]:
    """Tensors that `mx.parameter` may ask for and no checkpoint holds: lifted constants, non-persistent buffers."""
    import torch

    held = {spec.target for spec in program.graph_signature.input_specs if spec.target is not None}
    return {
        name: value.detach().clone()  # plain tensor attributes of the live model are among them
        for name, value in program.constants.items()
        if name in held and isinstance(value, torch.Tensor)
    }


class _Importer:
    """One program on its way into a module."""

    def __init__(self, program: ExportedProgram) -> None:
        self.nodes: list[Node] = list(program.graph.nodes)
        self.inputs = {spec.arg.name: spec for spec in program.graph_signature.input_specs}
        self.outputs = _user_outputs(program)
        self.values: dict[Node, SSAValue | list[SSAValue]] = {}
        self.names: set[str] = set()

    def module(self) -> ModuleOp:
        results = self.outputs
        given = [node for node in self.nodes if self._is_input(node)]
        function = FuncOp("forward", ([_type(n.meta["val"]) for n in given], [_type(n.meta["val"]) for n in results]))
        block = function.body.block
        for node, argument in zip(given, block.args, strict=True):
            self.values[node] = argument
            argument.name_hint = self._unique(node.name)
        for node in self.nodes:
            operation = self._operation(node)
            if operation is not None:
                block.add_op(operation)
        returned = [value for node in results if isinstance(value := self.values[node], SSAValue)]
        block.add_op(ReturnOp(*returned))
        return ModuleOp([function])

    def _is_input(self, node: Node) -> bool:
        import torch
        from torch.export.graph_signature import InputKind

        is_user = node.op == "placeholder" and self.inputs[node.name].kind == InputKind.USER_INPUT
        return is_user and isinstance(node.meta.get("val"), torch.Tensor)

    def _operation(self, node: Node) -> Operation | None:
        """The operation of a node, its results noted; None for nodes that are none."""
        if node in self.values or node.op == "output" or (node.op == "placeholder" and not node.users):
            return None
        if node.op == "placeholder":
            return self._parameter(node)
        if node.target is operator.getitem:
            several, place = node.args
            held = self.values.get(several)  # pyright: ignore[reportArgumentType]
            if isinstance(held, list) and isinstance(place, int):
                self.values[node] = held[place]
                return None
        if node.op != "call_function":
            raise MxloomError(
                f"{_where(node)}: {node.op} {node.target} cannot be imported; "
                "branches (torch.cond, while_loop) have no operation, write them with torch.where"
            )
        made = self._call(node)
        self._note(node, made)
        return made

    def _parameter(self, node: Node) -> Operation:
        source = self.inputs[node.name].target
        if source is None:
            raise MxloomError(f"input {node.name} is no tensor; give the model tensors, or fix the value inside it")
        made = ParameterOp.build(properties={"source": StringAttr(source)}, result_types=[_type(node.meta["val"])])
        made.result.name_hint = self._unique(source)
        self.values[node] = made.result
        return made

    def _call(self, node: Node) -> Operation:
        result = node.meta["val"]
        types = [_type(part) for part in (result if isinstance(result, list | tuple) else [result])]
        name = _target_name(node)
        arguments = list(self._arguments(node))
        for operation, aten in _declared().get(name, ()):
            made = operation.from_arguments(aten, arguments, types)
            if made is not None and _verifies(made):
                return made
        return self._opaque(node, name, arguments, types)

    def _opaque(self, node: Node, name: str, arguments: list[Argument], types: list[Attribute]) -> Operation:
        operands: list[SSAValue] = []
        kept = {a.name: encode(a.value, operands) for a in arguments if not a.is_default}
        operation = AtenOp if _is_overload(node.target) else SymOp
        return operation.build(
            operands=[operands],
            result_types=[types],
            properties={"target": StringAttr(name), "arguments": DictionaryAttr(kept)},
        )

    def _arguments(self, node: Node) -> Iterator[Argument]:
        """The node's arguments in schema order, nodes replaced by their values, defaults among them."""
        from torch.fx.node import map_arg

        def value_of(value: Any) -> Any:
            held: Any = self.values.__getitem__
            return map_arg(value, held)

        if not _is_overload(node.target):
            for place, value in enumerate(node.args):
                yield Argument(f"a{place}", value_of(value))
            return
        for place, argument in enumerate(_schema(node.target)):
            if argument.name in IGNORED:
                continue
            given = place < len(node.args) or argument.name in node.kwargs
            value = node.args[place] if place < len(node.args) else node.kwargs.get(argument.name)
            value = value_of(value) if given else argument.default_value
            default = argument.has_default_value() and _equal(value, argument.default_value)
            yield Argument(argument.name, value, default)

    def _note(self, node: Node, made: Operation) -> None:
        several = isinstance(node.meta["val"], list | tuple)
        self.values[node] = list(made.results) if several else made.results[0]
        place = _place(node)
        if place is not None:
            made.location = place
        path = module_path(node)
        name = path if path and _is_module(made, node) else f"{path}.{_plain(node.name)}" if path else node.name
        for result in made.results:
            result.name_hint = self._unique(name)

    def _unique(self, path: str) -> str:
        """The path as a name nobody has yet: `.1`, `.2` ... behind it where somebody has."""
        name, count = hint_of(path), 0
        while name in self.names:
            count += 1
            name = hint_of(f"{path}.{count}")
        self.names.add(name)
        return name


def _user_outputs(program: ExportedProgram) -> list[Node]:
    """What the model returns, tensors and numbers alike, constants left out."""
    from torch.export.graph_signature import OutputKind
    from torch.fx import Node

    returned: Any = next(node for node in program.graph.nodes if node.op == "output").args[0]
    kinds = [spec.kind for spec in program.graph_signature.output_specs]
    changed = [spec for spec in program.graph_signature.output_specs if spec.kind != OutputKind.USER_OUTPUT]
    if changed:
        inputs = [str(spec.target) for spec in changed if spec.kind == OutputKind.USER_INPUT_MUTATION]
        state = [str(spec.target) for spec in changed if spec.kind != OutputKind.USER_INPUT_MUTATION]
        raise MxloomError(_changes(state, inputs))
    return [node for node, _ in zip(returned, kinds, strict=True) if isinstance(node, Node)]


def _changes(state: list[str], inputs: list[str]) -> str:
    """What the model writes to, and how to write it otherwise."""
    found, advice = list[str](), list[str]()
    if state:
        found.append(f"its own state ({', '.join(state)})")
        advice.append("make the state an input of forward and return what it becomes, or leave it alone in eval mode")
    if inputs:
        found.append(f"its inputs ({', '.join(inputs)})")
        advice.append("work on a copy (x = x + 1 in place of x += 1 or x.add_(1))")
    return f"the model changes {' and '.join(found)} while it runs, which a module cannot; {'; '.join(advice)}"


@cache
def _declared() -> dict[str, list[tuple[type[TorchOperation], Aten]]]:
    """The declared operations of each torch operator."""
    found: dict[str, list[tuple[type[TorchOperation], Aten]]] = {}
    for operation in OPERATIONS:
        if issubclass(operation, TorchOperation):
            for aten in operation.ATEN:
                found.setdefault(aten.target, []).append((operation, aten))
    return found


def _verifies(operation: Operation) -> bool:
    """Whether a declared operation holds the node; torch takes more (a bias that is a matrix). Erased where not."""
    try:
        operation.verify_()
    except VerifyException:
        operation.erase()
        return False
    return True


def _plain(node_name: str) -> str:
    """A node's name without the number that tells it from nodes of other modules: `attention_1` as `attention`."""
    return re.sub(r"(?<=[a-zA-Z])_\d+$", "", node_name)


def _is_module(operation: Operation, node: Node) -> bool:
    """Whether the operation is what a module of the model does, so that it bears the module's own name."""
    if isinstance(operation, AttentionOp | MatmulOp | SoftmaxOp) or is_product(node):
        return False
    return isinstance(operation, Contraction | EmbeddingOp | Normalization)


def _type(value: Any) -> Attribute:
    """The type of a value in the graph."""
    import torch

    if isinstance(value, torch.Tensor):
        return TensorType(element_type(value.dtype), [_size(size) for size in value.shape])
    kinds = {
        torch.SymInt: builtin.IndexType(),
        int: builtin.IndexType(),
        torch.SymFloat: builtin.f64,
        float: builtin.f64,
        torch.SymBool: builtin.i1,
        bool: builtin.i1,
    }
    if type(value) not in kinds:
        raise MxloomError(f"a value of type {type(value).__name__} has no place in a module")
    return kinds[type(value)]


def _size(size: Any) -> int:
    return size if isinstance(size, int) else int(size) if size.node.expr.is_number else UNKNOWN


def _is_overload(target: Any) -> bool:
    import torch

    return isinstance(target, torch._ops.OpOverload)


def _schema(target: Any) -> Any:
    return target._schema.arguments


def _target_name(node: Node) -> str:
    """`aten.add.Tensor`, `operator.mul`, `math.ceil`, `torch.sym_max`."""
    if _is_overload(node.target):
        return str(node.target)
    target: Any = node.target
    return f"{target.__module__.lstrip('_')}.{target.__name__}"


def _equal(value: Any, default: Any) -> bool:
    """Whether a given argument is its schema's default, types included (1 is not 1.0, True is not 1)."""
    if isinstance(value, list | tuple):
        value = list(value)
        return (
            isinstance(default, list | tuple)
            and not any(isinstance(v, SSAValue) for v in value)
            and value == [*default]
        )
    return not isinstance(value, SSAValue) and type(value) is type(default) and value == default


def module_path(node: Node) -> str:
    """The innermost module that the node was traced in, by its name in the model."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    path = stack[-1][0] if stack else ""
    if path.startswith("_empty_nn_module_stack"):
        return ""
    return re.sub(r"^L__self___?|\(\)", "", path)


def _place(node: Node) -> FileLineColLoc | None:
    """The model's own line: the last frame outside torch."""
    hits = re.findall(r'File "([^"]+)", line (\d+)', node.meta.get("stack_trace") or "")
    own = [hit for hit in hits if "/torch/" not in hit[0]] or hits
    if not own:
        return None
    file, line = own[-1]
    return FileLineColLoc(StringAttr(file.split("site-packages/")[-1]), IntAttr(int(line)), IntAttr(0))


def _where(node: Node) -> str:
    place = _place(node)
    return f"{place.filename.data}:{place.line.data}" if place is not None else module_path(node) or node.name
