"""What a rule is told that asks for operations which a module does not have."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from xdsl.dialects.builtin import ModuleOp

from ..dialects.operations._origin import is_weight
from ..dialects.operations.opaque import AtenOp
from ._sites import Site, module_name

_LISTED = 8

_SPELLINGS: dict[str, tuple[str, ...]] = {
    "attention": ("attention",),
    "conv": ("conv",),
    "embedding": ("embedding",),
    "expert_linear": ("grouped_mm",),
    "linear": ("linear", "lstm", "gru", "rnn"),
    "matmul": ("mm",),
}
"""Parts of the names of torch operators that do what a kind of operation does, but are none of that kind."""


def absent(kinds: Sequence[str], every: Iterable[Site], module: ModuleOp) -> str:
    """Why a rule for these kinds matches nothing: the module has none of them; which it has, and what torch keeps."""
    found: dict[str, dict[str, None]] = {}
    for site in every:
        found.setdefault(site.kind, {})[site.module] = None
    has = ", ".join(f"{kind} ({len(names)})" for kind, names in sorted(found.items()))
    return f"the model has no module of kind {' or '.join(kinds)}; its kinds are {has}{opaque(module, kinds)}"


def opaque(module: ModuleOp, kinds: Iterable[str]) -> str:
    """That operators like these kinds stay as torch has them, each by its name; nothing where there is none."""
    parts = [part for kind in kinds for part in _SPELLINGS.get(kind, ())]
    ops = [op for op in module.walk() if isinstance(op, AtenOp) and any(part in op.target.data for part in parts)]
    return f"; {_listed(ops)}: kept as torch has it, an operator that carries no format" if ops else ""


def without_sites(module: ModuleOp) -> str:
    """Why there is nothing to quantize: no contraction, or weights that only torch operators read."""
    readers = [op for op in module.walk() if isinstance(op, AtenOp) and any(map(is_weight, op.operands))]
    if not readers:
        return f"the model has no contraction (linear, conv, matmul, attention){opaque(module, _SPELLINGS)}"
    return (
        "the model's weights are read by torch operators that have no structured operation and stay wide: "
        f"{_listed(readers)}; write them with linear, conv or matmul to give them formats"
    )


def _listed(ops: Iterable[AtenOp]) -> str:
    named = list(dict.fromkeys(f"{module_name(op)} ({op.target.data})" for op in ops))
    more = f" and {len(named) - _LISTED} more" if len(named) > _LISTED else ""
    return f"{', '.join(named[:_LISTED])}{more}"
