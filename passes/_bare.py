"""A module without its roundings: what the model computes before any format is chosen."""

from __future__ import annotations

from xdsl.dialects.builtin import ModuleOp, StringAttr, TensorType, f32
from xdsl.ir import Operation
from xdsl.rewriter import Rewriter

from ..backends.reference import Weights
from ..backends.weight_store import WeightStore
from ..dialects.operations.attention import AttentionOp
from ..dialects.operations.cast import CastOp
from ..dialects.operations.parameter import ParameterOp
from ._cache import set_newest
from ._given import WIDE

Twins = dict[Operation, Operation]
"""For each operation of a module its twin in a copy."""


def bare(module: ModuleOp, weights: Weights | None = None) -> tuple[ModuleOp, Twins]:
    """A copy whose values no cast rounds, and the twin there of every operation that is no cast.

    Weights that a pass has encoded are what they were before, where `weights` still holds that.
    """
    copy = module.clone()
    twins = dict(zip(module.walk(), copy.walk(), strict=True))
    for op in list(copy.walk()):
        if isinstance(op, CastOp):
            op.result.replace_all_uses_with(op.input)
            Rewriter.erase_op(op)
        elif isinstance(op, ParameterOp) and isinstance(weights, WeightStore) and op.source.data + WIDE in weights:
            _widen(op)
        elif isinstance(op, AttentionOp):
            for name in ("probabilities", "scale_rule", "rounding"):
                op.properties.pop(name, None)
            for name in ("key", "value"):
                set_newest(op, name, None)
    return copy, {one: other for one, other in twins.items() if not isinstance(one, CastOp)}


def _widen(op: ParameterOp) -> None:
    """Read the values from which an encoded weight was made in its place."""
    type = TensorType(f32, op.result.type.get_shape())
    made = ParameterOp.build(result_types=[type], properties={"source": StringAttr(op.source.data + WIDE)})
    made.result.name_hint = op.result.name_hint
    Rewriter.replace_op(op, made)
