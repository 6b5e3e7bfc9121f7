"""`rotate`: what contractions sum over times a Hadamard matrix, which spreads outliers over a block."""

from __future__ import annotations

from dataclasses import dataclass

from xdsl.context import Context
from xdsl.dialects.builtin import IntegerAttr, ModuleOp
from xdsl.ir import Block, Operation, SSAValue
from xdsl.passes import ModulePass
from xdsl.rewriter import InsertPoint, Rewriter

from ..backends.reference import body
from ..dialects.errors import UsageError
from ..dialects.formats import is_wide
from ..dialects.hadamard import factor, sizes
from ..dialects.operations._shapes import UNKNOWN, element_of, shape_of
from ..dialects.operations._values import hint_of, path_of
from ..dialects.operations.attention import AttentionOp
from ..dialects.operations.cast import CastOp
from ..dialects.operations.contraction import Contraction, LinearOp
from ..dialects.operations.hadamard import SHOWN, HadamardOp
from ._context import note, weights_of
from ._heads import values_behind
from ._new_weights import NewWeights, Rotation, check_undecided, plain_weight, recast, set_operand
from ._sites import module_name, operand_names, root, sites_of
from ._statistics import forget
from ._streams import rotate_outputs, rotate_stream, streams
from .quantize import CONTRACTIONS, matches, nearest

ROTATED = "rotated"
"""The attribute of a contraction that says in which size its operands were rotated."""

FULL = "full"


@dataclass(frozen=True)
class Rotate(ModulePass):
    """Rotate what layers sum over by Hadamard matrices, in blocks of `size` along the blocks of formats.

    (x R')(W R')' = x W': in float nothing changes, and an outlier is shared by the numbers of its block. Block by block
    as arXiv 2511.04214 and MR-GPTQ (arXiv 2509.23202) do; `size` 0 or `full` takes the whole width (QuaRot, arXiv
    2404.00456). `random` is the seed of random signs (without it there are none).
    The activation is rotated at run time, before its cast (`mx.hadamard`, once for all layers that read it so), the
    weight in the store. `fuse` spares the run time where it can: the residual stream of models with root mean square
    norms is kept rotated, the norms' gains folded into the layers behind them, and values are rotated within heads
    before attention mixes them; all layers of such a stream are then rotated, matched or not. `attention` rotates
    queries and keys too, behind their position embedding. `match` chooses modules as in `quantize`, and `kind`
    operations: linear, expert_linear; conv and matmul only where they are named.
    A width that has no such blocks is a UsageError that names those it has, and so is a pass without effect.
    """

    name = "rotate"

    match: str = "*"
    kind: tuple[str, ...] = ("linear", "expert_linear")
    size: int | str = 32
    random: int | None = None
    fuse: bool = False
    attention: bool = False

    def __post_init__(self) -> None:
        if self.size != FULL and not (isinstance(self.size, int) and self.size >= 0):
            raise UsageError(
                f"rotate: size is a number of 2 or more, or 0 or full for the whole width; got {self.size}"
            )
        if self.random is not None and self.random < 0:
            raise UsageError(f"rotate: random is a seed of 0 or more, got {self.random}")
        for kind in self.kind:
            if kind not in CONTRACTIONS or kind == "attention":
                known = ", ".join(kind for kind in CONTRACTIONS if kind != "attention")
                raise UsageError(f"rotate: unknown kind {kind!r}; known: {known}. Attention: attention=true")

    def apply(self, ctx: Context, op: ModuleOp) -> None:
        weights = weights_of(ctx, self.name)
        new, online = NewWeights(ROTATED), _Online(self.random)
        chosen, left = self._chosen(op)
        fused = self._fused(op, chosen, new) if self.fuse else set[Operation]()
        for sums in chosen:
            if sums.operation in fused:
                continue
            size = self._size(sums)
            for operand, along in sums.activations.items():
                online.rotate(sums.operation, operand, along, size)
            if sums.weight is not None:
                operand, along = sums.weight
                new.add(sums.operation, operand, Rotation(along, size, self.random))
            sums.operation.attributes[ROTATED] = IntegerAttr(size, 64)
        new.apply(op, weights)
        forget(ctx)
        for reason in left:
            note(ctx, f"rotate leaves {reason}")
        made = len(online.made)
        note(ctx, f"rotate: {made} values are rotated at run time; {len(fused)} layers read what is rotated already")

    def _chosen(self, module: ModuleOp) -> tuple[list[_Sums], list[str]]:
        """What is to be rotated, and what is left though it matches, with the reason."""
        every = [sums for op in module.walk() if isinstance(op, Contraction) and (sums := _Sums.of(op))]
        every = [sums for sums in every if (self.attention if sums.weight is None else sums.kind in self.kind)]
        matched = [sums for sums in every if matches(self.match, sums.name)]
        if not matched:
            names = [sums.name for sums in every]
            raise UsageError(f"rotate: {self.match!r} matches 0 of {len(names)} modules{nearest(self.match, names)}")
        for sums in matched:
            sums.check_order()
        left = {sums.name: reason for sums in matched if (reason := sums.why_not())}
        chosen = [sums for sums in matched if sums.name not in left]
        if not chosen:
            name, reason = next(iter(left.items()))
            raise UsageError(f"rotate has no effect: {name} {reason}")
        return chosen, [f"{name} as it is: it {reason}" for name, reason in left.items()]

    def _size(self, sums: _Sums) -> int:
        """The size of blocks; UsageError where the operands do not consist of such blocks."""
        size = self._blocks or sums.width
        if size > 1 and sums.width % size == 0 and factor(size):
            return size
        fitting = sizes(sums.width)
        named = ", ".join(map(str, fitting[-SHOWN:])) or "none; match other modules"
        what = "of which there is no Hadamard matrix" if size == sums.width else f"which are no blocks of {size}"
        raise UsageError(f"rotate: {sums.name} sums over {sums.width} numbers, {what}; sizes that work: {named}")

    def _fused(self, module: ModuleOp, chosen: list[_Sums], new: NewWeights) -> set[Operation]:
        """Plan the rotations that cost nothing at run time; the operations whose operands they rotate."""
        wanted = {sums.operation: sums for sums in chosen}
        found = [stream for stream in streams(body(module)) if wanted.keys() & set(stream.readers)]
        fused = dict[Operation, int]()
        for stream in found:
            if not stream.reason:
                size = self._size(next(wanted[op] for op in stream.readers if op in wanted))
                rotate_stream(stream, new, size, self.random)
                fused.update(dict.fromkeys(stream.readers, size))
        for op in wanted:
            if op not in fused and (size := self._fuse_heads(op, new)):
                fused[op] = size
        if not fused:
            widest = max(found, key=lambda stream: len(stream.readers), default=None)
            reason = f"what {module_name(widest.readers[0])} reads {widest.reason}" if widest else "no layer matches"
            raise UsageError(f"rotate: fuse has no effect: {reason}; leave fuse out to rotate at run time")
        for op, size in fused.items():
            op.attributes[ROTATED] = IntegerAttr(size, 64)
        return set(fused)

    def _fuse_heads(self, op: Operation, new: NewWeights) -> int:
        """Let the layer that writes what attention mixes for `op` write it rotated; the size, 0 where it cannot."""
        size = self._blocks
        found = values_behind(op) if size and factor(size) and isinstance(op, LinearOp) else None
        if found is None or found[1] % size:
            return 0
        rotate_outputs(found[0], new, size, self.random)
        new.add(op, "weight", Rotation(found[2], size, self.random))
        return size

    @property
    def _blocks(self) -> int:
        """The size as a number, 0 for the whole width."""
        return 0 if isinstance(self.size, str) else self.size


@dataclass(frozen=True)
class _Sums:
    """A contraction: the operands that are no weights and the weight, each with the dimension that is summed over."""

    operation: Contraction
    activations: dict[str, int]
    weight: tuple[str, int] | None
    width: int

    @classmethod
    def of(cls, op: Contraction) -> _Sums | None:
        """None where fewer than two operands are multiplied along a known number of elements."""
        along = {name: dims[0] for name, dims in op.reduced().items()}
        roles = {site.operand: site.role for site in sites_of(op) if site.role != "cache"}
        if isinstance(op, AttentionOp):
            roles = dict.fromkeys(("query", "key"), "attention")
        weights = [name for name, role in roles.items() if role == "weight"]
        others = {name: along[name] for name, role in roles.items() if role != "weight"}
        if len(roles) != 2 or len(weights) > 1:
            return None
        first = weights[0] if weights else next(iter(others))
        width = shape_of(getattr(op, first))[along[first]]
        if width == UNKNOWN:
            return None
        return cls(op, others, (weights[0], along[weights[0]]) if weights else None, width)

    @property
    def name(self) -> str:
        return module_name(self.operation)

    @property
    def kind(self) -> str:
        return self.operation.name.removeprefix("mx.")

    def check_order(self) -> None:
        """UsageError where a pass has run that rotations would undo: codes are decided, or residuals are made."""
        if self.weight is not None:
            check_undecided(self.operation, self.weight[0], "rotate")
        for operand in self.activations:
            value = getattr(self.operation, operand)
            while isinstance(value.owner, CastOp):
                other = next(
                    (u.operation for u in value.uses if not isinstance(u.operation, CastOp | Contraction)), None
                )
                if other is not None:
                    raise UsageError(
                        f"rotate: {self.name} reads what {other.name} reads rounded too, as a residual does: "
                        "rotate stands before residual-channels"
                    )
                value = value.owner.input

    def why_not(self) -> str:
        """Why its operands cannot be rotated; empty where they can."""
        if ROTATED in self.operation.attributes:
            return "was rotated by an earlier rotate"
        if self.weight is not None and plain_weight(self.operation, self.weight[0]) is None:
            return "has a weight that the model computes from others"
        narrow = next((n for n in self.activations if not is_wide(element_of(root(getattr(self.operation, n))))), None)
        return f"reads its {narrow} in a format that no cast makes" if narrow else ""


class _Online:
    """The values that are rotated at run time, each once."""

    def __init__(self, seed: int | None) -> None:
        self.seed = seed
        self.made: dict[tuple[SSAValue, int, int], SSAValue] = {}

    def rotate(self, operation: Operation, operand: str, along: int, size: int) -> None:
        """Let an operation read an operand rotated, under the casts that stand over it."""
        for place, name in enumerate(operand_names(operation)):
            if name not in (operand, f"wide_{operand}"):  # a cache's newest positions are those of the same value
                continue
            value = operation.operands[place]
            key = (root(value), along, size)
            if key not in self.made:
                self.made[key] = self._rotated(*key)
            set_operand(operation, place, recast(value, self.made[key]))

    def _rotated(self, value: SSAValue, along: int, size: int) -> SSAValue:
        numbers = {"size": size, "dim": None if along == -1 else along, "seed": self.seed}
        made = HadamardOp.build(
            operands=[value],
            result_types=[value.type],
            properties={name: IntegerAttr(number, 64) for name, number in numbers.items() if number is not None},
        )
        made.result.name_hint = hint_of(f"{path_of(value)}.{ROTATED}") if value.name_hint else None
        owner = value.owner
        Rewriter.insert_op(made, InsertPoint.at_start(owner) if isinstance(owner, Block) else InsertPoint.after(owner))
        return made.result
