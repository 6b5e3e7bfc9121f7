"""The many spellings of a product with a weight, made one: `x @ w`, `x @ w.t()`, `torch.mm`, `addmm`, `F.linear`.

Every step keeps the very call that torch makes in the end, so that results stay the same to the bit: `linear(x, w)`
is `matmul(x, w.t())`, and with a bias and a matrix `x` it is `addmm(bias, x, w.t())`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch.export import ExportedProgram
    from torch.fx import Graph

Node = Any

_PRODUCT = "mxloom_product"
"""Marks in a node's meta that the model wrote a product and no module of its own (`nn.Linear`)."""


def composites() -> dict[Any, Any]:
    """Operators that torch computes by laying out its arguments around one matrix product, each with that rewriting.

    As a table of decompositions: what comes out is what torch runs.
    """
    import torch

    aten, implicit = torch.ops.aten, torch._C.DispatchKey.CompositeImplicitAutograd
    operators = (aten.einsum.default, aten.tensordot.default, aten.inner.default)

    def rewriting(operator: Any) -> Any:
        return lambda *args, **kwargs: operator._op_dk(implicit, *args, **kwargs)

    return {operator: rewriting(operator) for operator in operators}


def is_product(node: Node) -> bool:
    """Whether the model wrote the node as a matrix product."""
    import torch

    return node.target is torch.ops.aten.matmul.default or _PRODUCT in node.meta


def fold_transposes(program: ExportedProgram) -> None:
    """Take the transposition of a weight into the product that reads it, in place; what nobody reads stays dead."""
    graph = program.graph
    _drop_same_layouts(graph)
    _spell_transposes(graph)
    weights = _weights(program)
    for node in list(graph.nodes):
        if node in weights and (inner := _transposed(node)) is not None and (own := _transposed(inner)) is not None:
            node.replace_all_uses_with(own)
    for node in list(graph.nodes):
        _fold(node, weights)


def _weights(program: ExportedProgram) -> set[Node]:
    """Nodes that follow from parameters, buffers and constants alone."""
    from torch.export.graph_signature import InputKind

    kinds = {spec.arg.name: spec.kind for spec in program.graph_signature.input_specs}
    found: set[Node] = set()
    for node in program.graph.nodes:
        if node.op == "placeholder":
            held = kinds[node.name] in (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR)
        else:
            held = node.op == "call_function" and bool(inputs := node.all_input_nodes) and found.issuperset(inputs)
        if held:
            found.add(node)
    return found


def _drop_same_layouts(graph: Graph) -> None:
    """Permutations and reshapes to what their input is already become their input: torch makes views of both."""
    import torch

    aten = torch.ops.aten
    for node in list(graph.nodes):
        if node.op != "call_function" or node.target not in (aten.permute.default, aten.reshape.default):
            continue
        given, rank = node.args[0], _rank(node)
        if node.target is aten.permute.default:
            same = [dim % rank for dim in node.args[1]] == list(range(rank))
        else:
            same = rank == _rank(given) and all(map(same_size, node.meta["val"].shape, given.meta["val"].shape))
        if same:
            node.replace_all_uses_with(given)
            graph.erase_node(node)


def same_size(one: Any, other: Any) -> bool:
    """Whether two sizes are written alike; asks nothing of symbolic ones."""
    if isinstance(one, int) and isinstance(other, int):
        return one == other
    return not isinstance(one, int) and not isinstance(other, int) and one.node.expr == other.node.expr


def _spell_transposes(graph: Graph) -> None:
    """`t` of a matrix, and `permute` that swaps its dimensions, as `transpose`."""
    import torch

    aten = torch.ops.aten
    for node in list(graph.nodes):
        if node.op != "call_function" or node.target not in (aten.t.default, aten.permute.default):
            continue
        swapped = node.target is aten.t.default or [dim % 2 for dim in node.args[1]] == [1, 0]
        if _rank(node.args[0]) == 2 and swapped:
            node.target, node.args = aten.transpose.int, (node.args[0], 0, 1)


def _rank(node: Node) -> int:
    return node.meta["val"].ndim


def _transposed(node: Node) -> Node | None:
    """The matrix whose transposition the node is."""
    import torch

    if getattr(node, "target", None) is not torch.ops.aten.transpose.int or _rank(node) != 2:
        return None
    first, second = (dim % 2 for dim in node.args[1:3])
    return node.args[0] if first != second else None


def _fold(node: Node, weights: set[Node]) -> None:
    import torch

    aten = torch.ops.aten
    if node.target is aten.matmul.default:
        given, weight = node.args
        if given not in weights and weight in weights and (inner := _transposed(weight)) is not None:
            node.target, node.args = aten.linear.default, (given, inner)
            node.meta[_PRODUCT] = True
    elif node.target is aten.linear.default:
        given, weight, *bias = node.args
        inner = _transposed(weight) if weight in weights else None
        if inner is None or node.kwargs:
            return
        if not bias or bias[0] is None:
            node.target, node.args = aten.matmul.default, (given, inner)
        elif _rank(given) == 2 and _rank(bias[0]) == 1:
            node.target, node.args = aten.addmm.default, (bias[0], given, inner)
    elif node.target is aten.addmm.default and not node.kwargs and len(node.args) == 3:
        bias, given, weight = node.args
        inner = _transposed(weight) if weight in weights else None
        if inner is not None and _rank(bias) == 1 and bias.meta["val"].shape[0] == node.meta["val"].shape[-1]:
            node.target, node.args = aten.linear.default, (given, inner, bias)
