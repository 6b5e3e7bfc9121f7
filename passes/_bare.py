"""A module without its roundings: what the model computes before any format is chosen."""

from __future__ import annotations

from xdsl.dialects.builtin import ModuleOp
from xdsl.ir import Operation
from xdsl.rewriter import Rewriter

from ..dialects.operations.attention import AttentionOp
from ..dialects.operations.cast import CastOp

Twins = dict[Operation, Operation]
"""For each operation of a module its twin in a copy."""


def bare(module: ModuleOp) -> tuple[ModuleOp, Twins]:
    """A copy whose values no cast rounds, and the twin there of every operation that is no cast."""
    copy = module.clone()
    twins = dict(zip(module.walk(), copy.walk(), strict=True))
    for op in list(copy.walk()):
        if isinstance(op, CastOp):
            op.result.replace_all_uses_with(op.input)
            Rewriter.erase_op(op)
        elif isinstance(op, AttentionOp):
            for name in ("probabilities", "scale_rule", "rounding"):
                op.properties.pop(name, None)
    return copy, {one: other for one, other in twins.items() if not isinstance(one, CastOp)}
