"""Which layer writes the values that attention mixes for another: a rotation within heads passes between the two."""

from __future__ import annotations

from typing import cast

from xdsl.ir import Operation, SSAValue

from ..dialects.operations._shapes import shape_of
from ..dialects.operations.attention import AttentionOp
from ..dialects.operations.cast import CastOp
from ..dialects.operations.contraction import LinearOp
from ..dialects.operations.movement import FlattenOp, PermuteOp, ReshapeOp, TransposeOp
from ._new_weights import plain_weight, reads_of
from ._sites import operand_names, root


def values_behind(reader: LinearOp) -> tuple[LinearOp, int, int] | None:
    """The layer whose outputs are the values that attention mixes for `reader`, the width of a head, and along which
    dimension of its weight `reader` sums.

    None where anything but the arrangement in heads lies between, or anyone else reads what does. Mixing is linear in
    each head, so that values that are rotated within heads come out rotated within heads.
    """
    attention = _only_moved(root(reader.input), to_heads=False)
    if not isinstance(attention, AttentionOp):
        return None
    readers = list(reads_of(root(attention.value)))
    if {(op, operand_names(op)[place].removeprefix("wide_")) for op, place in readers} != {(attention, "value")}:
        return None
    layer = _only_moved(root(attention.value), to_heads=True)
    if not isinstance(layer, LinearOp) or plain_weight(layer, "weight") is None:
        return None
    if layer.bias is not None and plain_weight(layer, "bias") is None:
        return None
    return layer, shape_of(attention.value)[-1], reader.reduced()["weight"][0]


def _only_moved(value: SSAValue, *, to_heads: bool) -> Operation | None:
    """What made a value before it was arranged: [B, H, S, D] from rows of H x D numbers (`to_heads`), or rows from it.

    None where it was arranged otherwise, or something else reads it on the way.
    """
    kinds: list[str] = []
    while isinstance(value.owner, ReshapeOp | FlattenOp | TransposeOp | PermuteOp):
        op = value.owner
        kinds.append("turn" if _swaps_heads(op) else "shape" if isinstance(op, ReshapeOp | FlattenOp) else "other")
        value = cast(SSAValue, op.operands[0])
        if len(list(reads_of(value))) != 1 or isinstance(value.owner, CastOp):
            return None
    wanted = ["turn", "shape"] if to_heads else ["shape", "turn"]
    found = [kind for place, kind in enumerate(kinds) if place == 0 or kind != kinds[place - 1]]
    return value.owner if found == wanted and isinstance(value.owner, Operation) else None


def _swaps_heads(op: Operation) -> bool:
    """Whether positions and heads change places, and nothing else."""
    if isinstance(op, TransposeOp):
        rank = len(shape_of(op.input))
        return rank == 4 and {op.dim0.value.data % 4, op.dim1.value.data % 4} == {1, 2}
    return isinstance(op, PermuteOp) and [dim.value.data % 4 for dim in op.dims] == [0, 2, 1, 3]
