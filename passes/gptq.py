"""`gptq`: codes that make up for each other's errors in what a layer puts out."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, cast

from xdsl.context import Context
from xdsl.dialects.builtin import ModuleOp
from xdsl.passes import ModulePass

from ..dialects.errors import MxloomError, UsageError
from ..dialects.formats import BlockType, Encoded
from ..dialects.operations._operation import Operation
from ._block_errors import BlockError
from ._brain_surgeon import Surgeon, output_errors, retargeted
from ._column_rounding import ColumnRounding, column_rounding
from ._columns import columns_of, from_end, from_matrix, matrix
from ._context import note, weights_of
from ._given import UNDECIDED, given_encoding, rounding_of, set_given, wide_weight
from ._lockstep import Lockstep, Moments
from ._scale_search import search_scales
from ._sites import Site
from ._statistics import sequences_of, statistics_of
from .clip import scaled_weights

if TYPE_CHECKING:
    from torch import Tensor

    from ..backends.weight_store import WeightStore

SCALES = ("auto", "frozen", "updated")
INPUTS = ("float", "emulated", "matched")
SEARCHES = ("none", "mse", "output", "hessian")


@dataclass(frozen=True)
class Gptq(ModulePass):
    """Round the columns of every weight in turn, each making up for what those before it lost (arXiv 2210.17323).

    `inputs`: with `float` the error is that of the layer's output for inputs that nothing has rounded. With `emulated`
    layers are taken in order, and the inputs Y are those that the module has by then, behind weights that are rounded
    already and casts. With `matched` the target is, in addition, the output W X of the float model, so that W (2 X^T Y
    / n + d) (2 Y^T Y / n + d)^-1 is what is rounded (asymmetric calibration, arXiv 2504.02692), d being the damping;
    it makes up for errors of activations by weaker weights, which may cost more than it brings: measure it.

    `damping` times the mean of the Hessian's diagonal is added to it. Scales are `frozen` before the first column
    (those that `clip` chose, else the cast's rule, or of least error in `search`), or `updated` from what the group's
    columns have become when it is reached; `auto` updates float scales of groups that nobody has chosen, and freezes
    all others. `act_order` begins with the columns that inputs move most; scales are frozen then. A row keeps plain
    rounding where that is better. Any format with scales, mixed ones included; `match` names the weights that change.
    """

    name = "gptq"

    damping: float = 0.01
    act_order: bool = False
    scales: str = "auto"
    search: str = "none"
    inputs: str = "float"
    match: str = "*"

    def apply(self, ctx: Context, op: ModuleOp) -> None:
        self._check()
        weights = weights_of(ctx, self.name)
        chosen = scaled_weights(op, self.match, self.name)
        work = _Work(self, weights)
        if self.inputs == "float":
            statistics = statistics_of(ctx, op, self.name, "hessian")
            for site in chosen:
                hessian = statistics.hessian(site)
                work.round(site, hessian if hessian.dim() == 3 else hessian[None], None)
        else:
            by_operation: dict[Operation, list[Site]] = {}
            for site in chosen:
                by_operation.setdefault(cast(Operation, site.operation), []).append(site)
            Lockstep(op, weights, sequences_of(ctx, op, self.name), by_operation).run(work.take)
        note(ctx, work.line())

    def _check(self) -> None:
        for option, value, known in (
            ("scales", self.scales, SCALES),
            ("inputs", self.inputs, INPUTS),
            ("search", self.search, SEARCHES),
        ):
            if value not in known:
                raise UsageError(f"gptq: unknown {option} {value!r}; known: {', '.join(known)}")
        if not 0 <= self.damping < float("inf"):
            raise UsageError(f"gptq: damping is 0 or more, got {self.damping}")
        if self.scales == "updated" and self.act_order:
            raise UsageError("gptq: act_order visits a group's columns at different times: its scales are frozen")
        if self.scales == "updated" and self.search != "none":
            raise UsageError(f"gptq: search={self.search} chooses scales once, so they cannot be updated")


@dataclass
class _Work:
    """Rounds weights as the options say, and keeps count."""

    options: Gptq
    weights: WeightStore
    before: float = 0.0
    after: float = 0.0
    better: int = 0
    count: int = 0
    few: list[str] = field(default_factory=list)

    def take(self, sites: list[Site], moments: Moments) -> None:
        """Round the weights of an operation for the rows that it meets."""
        for site in sites:
            if int(moments.rows.max()) < moments.own.shape[-1]:
                self.few.append(site.name)
            self.round(site, moments.own, moments.cross if self.options.inputs == "matched" else None)

    def round(self, site: Site, hessian: Tensor, cross: Tensor | None) -> None:
        """Give a weight its codes. hessian, cross: [parts, K, K]."""
        try:
            self._round(site, hessian, cross)
        except MxloomError as error:
            raise type(error)(f"gptq: {site.name}: {error}") from None

    def _round(self, site: Site, hessian: Tensor, cross: Tensor | None) -> None:
        import torch

        wide, damping = wide_weight(site, self.weights), self.options.damping
        rows = matrix(site, wide)
        pieces = rows.split(len(rows) // len(hessian))
        targets = [
            piece if cross is None else retargeted(piece, part, other, damping)
            for piece, part, other in zip(pieces, hessian, hessian if cross is None else cross, strict=True)
        ]
        target = from_matrix(site, torch.cat(targets)) if cross is not None else wide
        own = self._rounding(site, target, hessian)
        found, old, new, start = [], 0.0, 0.0, 0
        for piece, part in zip(targets, hessian, strict=True):
            at = slice(start, start + len(piece))
            surgeon = Surgeon.of(part, damping, by_activation=self.options.act_order)
            rounded, plain = own.solved(surgeon, piece.contiguous(), at)
            errors = [output_errors(each - piece, part) for each in (plain, rounded)]
            found.append(own.keep_plain(errors[1] > errors[0], rounded, plain, at))
            old, new = old + float(errors[0].sum()), new + float(torch.minimum(*errors).sum())
            start = at.stop
        set_given(site, self.weights, own.encoded(from_matrix(site, torch.cat(found))))
        self.before, self.after = self.before + old, self.after + new
        self.better, self.count = self.better + (new < old), self.count + 1

    def _rounding(self, site: Site, target: Tensor, hessian: Tensor) -> ColumnRounding:
        options, how = self.options, rounding_of(site)
        if UNDECIDED in getattr(site.value.owner, "attributes", ()):
            raise UsageError("its blocks have no format yet: run `mix` before")
        given = given_encoding(site, self.weights)
        if options.search != "none" and isinstance(site.format, BlockType):
            given = self._searched(site, target, hessian)
        updated = options.scales == "updated" or (
            options.scales == "auto" and given is None and not options.act_order and ColumnRounding.follows(site.format)
        )
        return column_rounding(site, target, given, how, updated=updated)

    def _searched(self, site: Site, target: Tensor, hessian: Tensor) -> Encoded:
        """The scales of least error in the rows that the weight meets."""
        format = cast(BlockType, site.format)
        columns, along = columns_of(site), from_end(site)
        if self.options.search == "hessian" and len(hessian) > 1:
            raise UsageError("search=hessian wants one Hessian for all rows, and experts and groups have their own: "
                             "take search=output")  # fmt: skip
        mean = hessian.mean(0)
        error = {
            "mse": lambda: BlockError(format),
            "output": lambda: BlockError(format, mean.diagonal().float()[columns]),
            "hessian": lambda: BlockError(format, hessian=mean.float(), columns=columns, reduced=along),
        }[self.options.search]()
        return search_scales(target, format, rounding_of(site), error).encoded

    def line(self) -> str:
        """What was reached, for the report."""
        found = (
            f"gptq: output error {self.after:.4g}, {self.before:.4g} by plain rounding under the same scales; lower in "
            f"{self.better} of {self.count} weights"
        )
        if self.few:
            found += (
                f"; {len(self.few)} weights met fewer rows than they have columns, damping alone decides about the "
                f"rest: {', '.join(self.few[:3])}"
            )
        return found
