"""Operations that yield as many parts as a size says, where that size stays dynamic: capture fixes the number."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from traceback import FrameSummary
from typing import TYPE_CHECKING, Any

from .dynamic_sizes import Dims, Frozen, first_frame, input_sizes, is_foreign, shape_environment

if TYPE_CHECKING:
    from torch.export import ExportedProgram

Node = Any

SMALL = range(2, 258)
"""Sizes for which the number of parts is computed one by one; beyond them, those around powers of two."""


def uncovered(program: ExportedProgram, wanted: Dims, export_again: Callable[[], object]) -> Frozen | None:
    """The first split along a dynamic dimension whose parts, as captured, do not make up every size of it.

    An operator that yields a list tells by its count; `tensor_split` and its like, which torch writes as slices, by the
    branch that they take on a remainder. `export_again` is run to listen where that branch is.
    """
    inputs = {node.name: node.meta.get("val") for node in program.graph.nodes if node.op == "placeholder"}
    sizes = input_sizes(inputs)
    for node in program.graph.nodes:
        if (size := _split_size(node)) is not None and not _covers(*size, len(node.meta["val"])):
            whole, _ = size
            name, dim = _source(whole, sizes, wanted)
            rule = (
                f"{_name(node)} made {len(node.meta['val'])} parts of a dimension that may change, "
                f"{_worded(whole, sizes)}; other sizes have more parts or fewer"
            )
            return Frozen(rule, _frame(node), name, dim, _hint(inputs, name, dim))
    environment = shape_environment(inputs)
    for guard in environment.guards if environment is not None else ():
        if guard.expr.is_Relational and not _is_equation(guard.expr) and "Mod(" in str(guard.expr):
            frame = first_frame(export_again, r"eval .*Mod\(")
            name, dim = _source(guard.expr, sizes, wanted)
            rule = (
                "tensor_split (or its like) made parts whose sizes hold only where "
                f"{_worded(guard.expr, sizes).replace('Mod(', 'remainder(')}"
            )
            return Frozen(rule, frame, name, dim, _hint(inputs, name, dim))
    return None


def _is_equation(relation: Any) -> bool:
    return type(relation).__name__ in ("Equality", "Unequality")


def _name(node: Node) -> str:
    return str(node.target).removeprefix("aten.").partition(".")[0].removeprefix("unsafe_")


def _split_size(node: Node) -> tuple[Any, Any] | None:
    """(size of the dimension, size of a part) of an operator that yields parts along a dynamic dimension.

    The size of a part is None where the operator is none that is known to make parts of one size.
    """
    import torch

    target, parts = node.target, node.meta.get("val")
    if not isinstance(target, torch._ops.OpOverload) or not isinstance(parts, list | tuple):
        return None
    schema = target._schema
    given = {argument.name: _given(node, place, argument) for place, argument in enumerate(schema.arguments)}
    if str(schema.returns[0].type) != "List[Tensor]" or not {"self", "dim"} <= given.keys():
        return None
    if any(isinstance(value, list | tuple) for value in given.values()):
        return None  # the list says how many parts there are, and torch checks that they make up the whole
    whole = given["self"].shape[given["dim"]]
    if isinstance(whole, int) or whole.node.expr.is_number:
        return None
    size = given.get("split_size")
    if size is None and "chunks" in given:
        size = -(-whole // given["chunks"])
    return _expression(whole), None if size is None else _expression(size)


def _given(node: Node, place: int, argument: Any) -> Any:
    from torch.fx import Node as FxNode

    value = node.args[place] if place < len(node.args) else node.kwargs.get(argument.name, argument.default_value)
    return value.meta["val"] if isinstance(value, FxNode) else value


def _expression(size: Any) -> Any:
    import sympy

    return sympy.Integer(size) if isinstance(size, int) else size.node.expr


def _covers(whole: Any, part: Any, count: int) -> bool:
    """Whether `whole` is made up of `count` parts for every value of its symbols."""
    import sympy

    if part is None:
        return False
    if sympy.expand(whole - count * part) == 0:
        return True
    symbols = whole.free_symbols | part.free_symbols
    if len(symbols) != 1:
        return False
    (symbol,) = symbols
    return all(_count(whole, part, {symbol: value}) == count for value in _values())


def _values() -> Iterator[int]:
    yield from SMALL
    for power in range(9, 41):
        yield from (2**power - 1, 2**power, 2**power + 1)


def _count(whole: Any, part: Any, values: Mapping[Any, int]) -> int:
    size, step = int(whole.xreplace(values)), int(part.xreplace(values))
    return -(-size // step) if step > 0 else -1


def _source(expression: Any, sizes: Mapping[str, tuple[str, int]], wanted: Dims) -> tuple[str | None, int]:
    """The input and the dimension that the expression is about."""
    names = {str(symbol) for symbol in expression.free_symbols}
    found = [place for symbol, place in sizes.items() if symbol in names and place[1] in wanted.get(place[0], ())]
    return found[0] if found else (None, 0)


def _worded(expression: Any, sizes: Mapping[str, tuple[str, int]]) -> str:
    """The expression in the words of the inputs."""

    def word(found: re.Match[str]) -> str:
        name, dim = sizes.get(found[0], ("", 0))
        return f"{name}.shape[{dim}]" if name else found[0]

    return re.sub(r"\bs\d+\b", word, str(expression))


def _hint(inputs: Mapping[str, Any], name: str | None, dim: int) -> int:
    """The example's size."""
    return 0 if name is None else int(inputs[name].shape[dim].node.hint)


def _frame(node: Node) -> FrameSummary | None:
    """The innermost frame of the model's own code that the node was traced in."""
    found = re.findall(r'File "([^"]+)", line (\d+), in (\S+)', node.meta.get("stack_trace") or "")
    own = [FrameSummary(file, int(line), name) for file, line, name in found if not is_foreign(file)]
    return own[-1] if own else None
