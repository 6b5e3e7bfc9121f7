"""The metrics in which errors of rounding are measured, and the statistics that each is computed from."""

from __future__ import annotations

from typing import TYPE_CHECKING

from xdsl.context import Context
from xdsl.dialects.builtin import ModuleOp

from ..dialects.errors import MxloomError
from ..dialects.formats import BlockType
from ._block_errors import BlockError
from ._columns import columns_of, from_end, hessian_of
from ._sites import Site
from ._statistics import Statistics, statistics_of

if TYPE_CHECKING:
    from torch import Tensor

METRICS: dict[str, tuple[str, ...]] = {
    "mse": (),
    "fisher": ("fisher",),
    "kl": ("fisher",),
    "output": ("ranges",),
    "hessian": ("hessian",),
}
"""The metrics by name, each with the kinds of statistics that it is computed from."""


def statistics_for(metric: str, ctx: Context, module: ModuleOp, name: str) -> Statistics | None:
    """The statistics that a metric is computed from, collected where they are missing; None where it needs none."""
    kinds = METRICS.get(metric, ())
    if not kinds:
        return None
    return statistics_of(ctx, module, f"{name}{{metric={metric}}}", *kinds, fisher="kl" if metric == "kl" else None)


def error_of(site: Site, format: BlockType, metric: str, statistics: Statistics | None) -> BlockError:
    """The error of rounding a weight into blocks of `format`, in a metric."""
    if metric == "mse":
        return BlockError(format)
    assert statistics is not None
    if metric == "hessian":
        return BlockError(
            format, hessian=hessian_of(site, statistics), columns=columns_of(site), reduced=from_end(site)
        )
    return BlockError(format, importance(site, metric, statistics))


def importance(site: Site, metric: str, statistics: Statistics) -> Tensor:
    """What each element's squared error is weighed with, broadcast to the weight."""
    if metric in ("fisher", "kl"):
        found = statistics.fisher(site)
    else:
        found = statistics.inputs(site).mean_square[columns_of(site, channels=True)]
    if not bool(found.isfinite().all()) or bool((found < 0).any()):
        raise MxloomError(f"{site.name}: the {metric} sensitivities hold NaN, infinite or negative numbers")
    return found
