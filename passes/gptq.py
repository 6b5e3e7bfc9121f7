"""`gptq`: codes that make up for each other's errors in what a layer puts out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from xdsl.context import Context
from xdsl.dialects.builtin import ModuleOp
from xdsl.passes import ModulePass

from ..dialects.errors import MxloomError, UsageError
from ..dialects.formats import Encoded
from ._brain_surgeon import Surgeon, output_errors
from ._column_rounding import ColumnRounding, column_rounding
from ._columns import from_matrix, matrix
from ._context import note, weights_of
from ._given import given_encoding, rounding_of, set_given, wide_weight
from ._sites import Site
from ._statistics import statistics_of
from .clip import scaled_weights

if TYPE_CHECKING:
    from torch import Tensor

    from ..backends.weight_store import WeightStore

SCALES = ("auto", "frozen", "updated")


@dataclass(frozen=True)
class Gptq(ModulePass):
    """Round the columns of every weight in turn, each making up for what those before it lost (arXiv 2210.17323).

    The error is that of the layer's output over the calibration inputs; `damping` times the mean of the Hessian's
    diagonal is added to it. Scales are `frozen` before the first column (those that `clip` chose, else those of the
    cast's rule), or `updated` from what the group's columns have become when it is reached; `auto` freezes those that
    `clip` chose, that blocks share with others of one tensor, and powers of two, and updates float scales of groups.
    `act_order` begins with the columns that inputs move most; scales are frozen then. A row keeps plain rounding where
    that is better. Any format with scales, mixed ones included; only weights that `match` names change.
    """

    name = "gptq"

    damping: float = 0.01
    act_order: bool = False
    scales: str = "auto"
    match: str = "*"

    def apply(self, ctx: Context, op: ModuleOp) -> None:
        if self.scales not in SCALES:
            raise UsageError(f"gptq: unknown scales {self.scales!r}; known: {', '.join(SCALES)}")
        if not 0 <= self.damping < float("inf"):
            raise UsageError(f"gptq: damping is 0 or more, got {self.damping}")
        weights = weights_of(ctx, self.name)
        chosen = scaled_weights(op, self.match, self.name)
        statistics = statistics_of(ctx, op, self.name, "hessian")
        before = after = 0.0
        better = 0
        for site in chosen:
            try:
                old, new = self._round(site, weights, statistics.hessian(site))
            except MxloomError as error:
                raise MxloomError(f"gptq: {site.name}: {error}") from None
            before, after, better = before + old, after + new, better + (new < old)
        note(ctx, f"gptq: output error {after:.4g}, {before:.4g} by plain rounding; lower in {better} of "
                  f"{len(chosen)} weights")  # fmt: skip

    def _round(self, site: Site, weights: WeightStore, hessian: Tensor) -> tuple[float, float]:
        """Give the weight its codes; the output error of plain rounding under the same scales, and of these."""
        import torch

        wide, given = wide_weight(site, weights), given_encoding(site, weights)
        rows, start = matrix(site, wide), 0
        parts = hessian if hessian.dim() == 3 else hessian[None]
        own = column_rounding(site, wide, given, rounding_of(site), updated=self._updates(given, site))
        old = new = 0.0
        found = []
        for part in parts:
            end = start + len(rows) // len(parts)
            surgeon = Surgeon.of(part, self.damping, by_activation=self.act_order)
            piece = rows[start:end].contiguous()
            rounded, plain = own.solved(surgeon, piece, slice(start, end))
            errors = [output_errors(each - piece, part) for each in (plain, rounded)]
            worse = errors[1] > errors[0]
            found.append(own.keep_plain(worse, rounded, plain, slice(start, end)))
            old, new = old + float(errors[0].sum()), new + float(torch.minimum(*errors).sum())
            start = end
        encoded: Encoded = own.encoded(from_matrix(site, torch.cat(found)))
        set_given(site, weights, encoded)
        return old, new

    def _updates(self, given: Encoded | None, site: Site) -> bool:
        if self.scales != "auto":
            if self.scales == "updated" and self.act_order:
                raise UsageError("gptq: act_order visits a group's columns at different times: its scales are frozen")
            return self.scales == "updated"
        return given is None and not self.act_order and ColumnRounding.follows(site.format)
