"""FX to FX: drop what has no meaning on values, spell products with weights alike, recognise rms_norm and rope.

The graph stays runnable, so that torch itself remains the oracle for every step of it.
"""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING, Any

from ..dialects import torch_operators
from .products import fold_transposes, same_size

if TYPE_CHECKING:
    from torch.export import ExportedProgram
    from torch.fx import Graph

Node = Any
"""A node of the graph; torch types its arguments as a union of twenty types, too wide for patterns to walk through."""


def simplify(program: ExportedProgram) -> ExportedProgram:
    """The program, its graph changed in place: the same values from fewer nodes. Returns the program."""
    torch_operators.register()
    graph = program.graph
    _drop_valueless(graph)
    _spell_alike(graph)
    fold_transposes(program)
    graph.eliminate_dead_code()
    _fuse_rms_norm(graph)
    _fuse_rope(graph)
    graph.eliminate_dead_code()
    graph.lint()
    return program


def _aten() -> Any:
    import torch

    return torch.ops.aten


def _is(node: Any, *targets: Any) -> bool:
    from torch.fx import Node

    return isinstance(node, Node) and node.target in targets


def _is_plain(node: Any, *targets: Any) -> bool:
    """The same without keywords: `alpha`, `dtype` and others would change what the operator means."""
    return _is(node, *targets) and not node.kwargs


def _drop_valueless(graph: Graph) -> None:
    """Assertions go, copies that keep the type become their input: layout is free."""
    aten = _aten()
    assertions = (
        aten._assert_tensor_metadata.default,
        aten._assert_scalar.default,
        aten.sym_constrain_range.default,
        aten.sym_constrain_range_for_size.default,
    )
    copies = (
        aten.clone.default,
        aten.alias.default,
        aten.contiguous.default,
        aten.detach.default,
        aten.detach_.default,
        aten.lift_fresh_copy.default,
    )
    conversions = (aten._to_copy.default, aten.type_as.default, aten.to.dtype)
    for node in list(graph.nodes):
        if _is(node, *assertions):
            graph.erase_node(node)
            continue
        valueless = _is(node, *copies) or (_is(node, *conversions) and _dtype(node) == _dtype(node.args[0]))
        if valueless or (_is_plain(node, aten.dropout.default) and not node.args[2]):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)


def _spell_alike(graph: Graph) -> None:
    """One operator for what torch has several for; the values are the same to the bit."""
    aten = _aten()
    for node in list(graph.nodes):
        if _is(node, aten.view.default, aten._unsafe_view.default):
            node.target = aten.reshape.default
        elif _is(node, aten.bmm.default, aten.mm.default, aten.mv.default, aten.dot.default):
            node.target = aten.matmul.default
        elif _is(node, aten.chunk.default) and isinstance(size := _chunk_size(node), int) and size > 0:
            node.target, node.args = aten.split.Tensor, (node.args[0], size, *node.args[2:])
        elif _is(node, aten._native_batch_norm_legit_no_training.default):
            _plain_batch_norm(graph, node)
        elif _is(node, aten.rms_norm.default):
            _own_rms_norm(graph, node)


def _chunk_size(node: Node) -> Any:
    """Size of the chunks along the chunked dimension: an int where it is static."""
    x, chunks, *dim = node.args
    size = x.meta["val"].shape[dim[0] if dim else 0]  # pyright: ignore[reportAttributeAccessIssue, reportOptionalMemberAccess]
    return -(-size // chunks) if isinstance(size, int) else size


def _plain_batch_norm(graph: Graph, node: Node) -> None:
    """Batch norm at inference has three results, two of them empty; use the operator with one where only it is read."""
    tensors, (momentum, eps) = node.args[:5], node.args[5:]
    if any(user.target is not operator.getitem or user.args[1] != 0 for user in node.users):
        return
    for user in list(node.users):
        user.meta = {**node.meta, "val": user.meta["val"]}
        _replace(graph, user, _aten().batch_norm.default, (*tensors, False, momentum, eps, False))


def _own_rms_norm(graph: Graph, node: Node) -> None:
    """torch's rms_norm over the last dimension in f32 computes what ours does; in other types it may compute wider."""
    import torch

    x, shape, *rest = node.args
    weight, eps = (*rest, None, None)[:2]
    if node.kwargs or len(shape) != 1 or _dtype(x) != torch.float32:
        return
    eps = torch.finfo(torch.float32).eps if eps is None else float(eps)
    _replace(graph, node, torch.ops.mxloom.rms_norm.default, (x, weight, eps, False))


def _dtype(node: Any) -> Any:
    return node.meta["val"].dtype


def _orders(node: Node) -> tuple[tuple[Any, Any], ...]:
    """Both orders of the operands of a commutative node."""
    one, other = node.args[:2]
    return ((one, other), (other, one))


def _replace(graph: Graph, node: Node, target: Any, args: tuple[Any, ...]) -> None:
    with graph.inserting_before(node):
        new = graph.call_function(target, args)
    new.meta = dict(node.meta)
    node.replace_all_uses_with(new)
    graph.erase_node(node)


def _fuse_rms_norm(graph: Graph) -> None:
    """x · rsqrt(mean(x²) + eps), and the product with the weight or with weight + 1 (gemma) that follows."""
    import torch

    for node in list(graph.nodes):
        found = _match_rms_norm(node)
        if found is None:
            continue
        x, eps = found
        end, weight, offset = _norm_weight(node, x)
        _replace(graph, end, torch.ops.mxloom.rms_norm.default, (x, weight, eps, offset))


def _match_rms_norm(node: Node) -> tuple[Node, float] | None:
    aten = _aten()
    if not _is(node, aten.mul.Tensor):
        return None
    for x, root in _orders(node):
        if not _is(root, aten.rsqrt.default) or not _is_plain(total := root.args[0], aten.add.Tensor):
            continue
        mean, eps = total.args[:2]
        if not isinstance(eps, float) or not _is(mean, aten.mean.dim) or mean.kwargs or len(mean.args) < 3:
            continue
        square, dims, keepdim = mean.args[:3]
        squared = _is_plain(square, aten.pow.Tensor_Scalar) and square.args == (x, 2)
        if list(dims) == [-1] and keepdim and squared and _alike(node, x):
            return x, eps
    return None


def _norm_weight(node: Node, x: Node) -> tuple[Node, Node | None, bool]:
    """(last node of the norm, weight, whether 1 is added to it) when the normalized value is multiplied by a weight.

    The weight is one number for each column, in the type of `x`: another would broadcast, or widen the product.
    """
    aten = _aten()
    users = list(node.users)
    if len(users) != 1 or not _is_plain(users[0], aten.mul.Tensor) or not _alike(users[0], x):
        return node, None, False
    one, other = users[0].args
    weight, offset = (other if one is node else one), False
    if _is_plain(weight, aten.add.Tensor) and weight.args[1] == 1.0:
        weight, offset = weight.args[0], True
    if getattr(weight, "op", None) != "placeholder" or _dtype(weight) != _dtype(x):
        return node, None, False
    columns = _shape(weight)
    fits = len(columns) == 1 and isinstance(columns[0], int) and columns[0] == _shape(x)[-1]
    return (users[0], weight, offset) if fits else (node, None, False)


def _shape(node: Node) -> tuple[Any, ...]:
    return tuple(node.meta["val"].shape)


def _alike(node: Node, x: Any) -> bool:
    """Whether a node has the type and shape of `x`: nothing was widened or broadcast on the way."""
    if not hasattr(x, "meta") or _dtype(node) != _dtype(x):
        return False
    return len(_shape(node)) == len(_shape(x)) and all(map(same_size, _shape(node), _shape(x)))


def _fuse_rope(graph: Graph) -> None:
    """x · cos + rotate_half(x) · sin, and the form with cos and sin of half the width (gpt_oss)."""
    import torch

    for node in list(graph.nodes):
        if (found := _match_rope(node)) is not None:
            _replace(graph, node, torch.ops.mxloom.rope.default, (*found, False))
        elif (found := _match_half_rope(node)) is not None:
            _replace(graph, node, torch.ops.mxloom.rope.default, (*found, True))


def _match_rope(node: Node) -> tuple[Node, Node, Node] | None:
    aten = _aten()
    if not _is_plain(node, aten.add.Tensor) or not all(_is_plain(part, aten.mul.Tensor) for part in node.args[:2]):
        return None
    for plain, turned in _orders(node):
        for rotated, sin in _orders(turned):
            for x, cos in _orders(plain):
                if _is_rotated(rotated, x) and _alike(node, x) and _are_tensors(cos, sin):
                    return x, cos, sin
    return None


def _is_rotated(node: Any, x: Any) -> bool:
    """Whether the node is concat(-second half of x, first half of x)."""
    aten = _aten()
    if not _is(node, aten.cat.default) or len(node.args[0]) != 2 or list(node.args[1:]) != [-1]:
        return False
    negated, first = node.args[0]
    width = x.meta["val"].shape[-1] if hasattr(x, "meta") else None
    return (
        isinstance(width, int)
        and width % 2 == 0
        and _is(negated, aten.neg.default)
        and _is_half(negated.args[0], x, width // 2, width)
        and _is_half(first, x, 0, width // 2)
    )


def _is_half(node: Any, x: Any, start: int, end: int) -> bool:
    """Whether the node is x[..., start:end]."""
    if not _is_plain(node, _aten().slice.Tensor) or node.args[0] is not x or len(node.args) < 4:
        return False
    _, dim, first, last, *step = node.args
    if step and step != [1]:
        return False
    rank, width = x.meta["val"].ndim, x.meta["val"].shape[-1]
    return dim % rank == rank - 1 and first == start and isinstance(last, int) and min(last, width) == end


def _match_half_rope(node: Node) -> tuple[Node, Node, Node] | None:
    """concat(a · cos - b · sin, b · cos + a · sin) for the halves a, b of x."""
    aten = _aten()
    if not _is(node, aten.cat.default) or len(node.args[0]) != 2 or list(node.args[1:]) != [-1]:
        return None
    difference, total = node.args[0]
    if not _is_plain(difference, aten.sub.Tensor) or not _is_plain(total, aten.add.Tensor):
        return None
    if not all(_is_plain(part, aten.mul.Tensor) for part in (*difference.args, *total.args)):
        return None
    (a, cos), (b, sin) = difference.args[0].args, difference.args[1].args
    if total.args[0].args != (b, cos) or total.args[1].args != (a, sin) or not _are_tensors(a, b, cos, sin):
        return None
    halves = a.args[1:] == (0,) and b.args[1:] == (1,) and a.args[0] is b.args[0]
    if not halves or not _is_halving(a.args[0]) or not _alike(node, a.args[0].args[0]):
        return None
    return a.args[0].args[0], cos, sin


def _is_halving(node: Any) -> bool:
    """Whether the node is x cut into two equal halves along the last dimension."""
    if not _is_plain(node, _aten().split.Tensor):
        return False
    x, size, *dim = node.args
    rank, width = len(_shape(x)), _shape(x)[-1]
    return isinstance(width, int) and (dim[0] if dim else 0) % rank == rank - 1 and 2 * size == width


def _are_tensors(*values: Any) -> bool:
    return all(hasattr(value, "meta") for value in values)
