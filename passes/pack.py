"""`pack`: a parameter and the cast behind it become one parameter that is stored in the format."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

from xdsl.context import Context
from xdsl.dialects.builtin import ModuleOp, StringAttr
from xdsl.ir import TypeAttribute
from xdsl.passes import ModulePass
from xdsl.rewriter import InsertPoint, Rewriter

from ..backends.weight_store import WeightStore
from ..dialects.formats import Encoded, MixedType, block_impact, encode_tensor, is_wide
from ..dialects.operations._origin import stored_readers
from ..dialects.operations.cast import CastOp
from ..dialects.operations.parameter import ParameterOp
from ._context import weights_of
from ._given import erase_unused, laid_out


@dataclass(frozen=True)
class Pack(ModulePass):
    """Encode every parameter that is only read through casts, so that the module names what the file holds.

    The first cast of a parameter that has no other reader takes over the parameter's name; a further one, or one
    beside readers of the wide tensor, gets the name with `.as.<reader>` behind it, so that a tied weight in two
    formats is stored as the two tensors it then is. A weight that is cast in another layout is stored in that layout.
    Needs the weights.
    """

    name = "pack"

    def apply(self, ctx: Context, op: ModuleOp) -> None:
        weights = weights_of(ctx, self.name)
        for parameter in [o for o in op.walk() if isinstance(o, ParameterOp)]:
            _fold(parameter, weights)


def _fold(parameter: ParameterOp, weights: WeightStore) -> None:
    readers = stored_readers(parameter) if is_wide(parameter.result.type.element_type) else []
    casts = [c for c in readers if c is not None]
    source = parameter.source.data
    free = {source} if len(casts) == len(readers) else set[str]()
    # Encoded before anything is put into the store: the first encoding may take the wide tensor's name.
    encoded = [_encoded(c, weights) for c in casts]
    for position, (op, value) in enumerate(zip(casts, encoded, strict=True)):
        name = free.pop() if free else _second_name(source, op, position)
        weights.put_encoded(name, value)
        stored = ParameterOp.build(result_types=[op.result.type], properties={"source": StringAttr(name)})
        stored.result.name_hint = parameter.result.name_hint if name == source else op.result.name_hint
        Rewriter.insert_op(stored, InsertPoint.before(op))
        op.result.replace_all_uses_with(stored.result)
        erase_unused(op)


def _encoded(op: CastOp, weights: WeightStore) -> Encoded:
    """What a cast of a parameter makes of it."""
    wide, format, how = laid_out(op.input, weights), cast(TypeAttribute, op.result.type.element_type), op.how()
    if op.sensitivity is None or not isinstance(format, MixedType) or how.threshold is None:
        return encode_tensor(wide, format, how)
    impact = block_impact(wide, format, laid_out(op.sensitivity, weights), how)
    return encode_tensor(wide, format, how, choice=impact > how.threshold)


def _second_name(source: str, op: CastOp, position: int) -> str:
    """A stored name for a further encoding of a parameter: that of the module which reads it."""
    reader = next((u.operation.results[0].name_hint for u in op.result.uses if u.operation.results), None)
    return f"{reader}.weight" if reader and f"{reader}.weight" != source else f"{source}.as.{position}"
