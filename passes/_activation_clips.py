"""How much of the range of activations their scales are made for: the part of least error, or a percentile."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

from xdsl.context import Context
from xdsl.dialects.builtin import FloatAttr, ModuleOp
from xdsl.ir import SSAValue

from ..dialects.errors import UsageError
from ..dialects.formats import BlockType, quantize
from ..dialects.formats._format import SEARCHED_RULES
from ..dialects.operations._operation import Operation
from ..dialects.operations.cast import CastOp
from ._bare import bare
from ._impacts import weights_met
from ._observed import plan_of
from ._samples import Sample
from ._sites import Site, root
from ._statistics import sequences_of
from ._sweep import Sweep

if TYPE_CHECKING:
    from torch import Tensor

    from ..backends.weight_store import WeightStore

PARTS = tuple(1 - step / 20 for step in range(13))
"""Parts of the largest magnitude that are tried: 1 to 0.4."""


class _Errors(Sweep):
    """Runs the module without its casts and adds up what each part of the range would cost."""

    def __init__(self, module: ModuleOp, weights: WeightStore, read: dict[Operation, list[tuple[Any, SSAValue]]]):
        super().__init__(plan_of(module), weights, frozenset(), None)
        self._read = read

    def _observe(self, op: Operation, values: Any, sample: Sample, sums: Any) -> None:
        for add, value in self._read.get(op, ()):
            add(self._value(value, values), sample)


def clip_activations(
    ctx: Context, module: ModuleOp, chosen: Sequence[Site], weights: WeightStore, metric: str, percentile: float | None
) -> str:
    """Give the casts of some activations the part of the range that their scales are made for; says what was chosen.

    The error is that of the value (`mse`), or of the outputs of what reads it, by the squares of the weights that each
    channel meets (`output`), over the calibration inputs. A percentile, of the magnitudes of each input, is taken as
    the part of the input's largest, averaged.
    """
    casts = _casts(chosen)
    run, twins = bare(module, weights)
    errors: dict[CastOp, list[float]] = {op: [0.0] * len(PARTS) for op in casts}
    shares: dict[CastOp, list[float]] = {op: [] for op in casts}
    read: dict[Operation, list[tuple[Any, SSAValue]]] = {}
    for op, site in casts.items():
        twin = cast(Operation, twins[site.operation])
        if percentile is not None:
            add = _share(shares[op], percentile, site)
        else:
            add = _error(op, errors[op], weights_met(site, weights) if metric == "output" else None, site)
        read.setdefault(twin, []).append((add, root(getattr(twin, site.operand))))
    _Errors(run, weights, read).shard(sequences_of(ctx, module, "clip"), 0)
    changed = 0
    for op in casts:
        if percentile is not None:
            part = sum(shares[op]) / len(shares[op])
        else:
            part = PARTS[min(range(len(PARTS)), key=errors[op].__getitem__)]
        if 0 < part < 1:
            op.properties["clip"] = FloatAttr(part, 64)
            changed += 1
    how = f"{percentile} %" if percentile is not None else f"metric={metric}"
    return f"clip{{role=activations}}: {changed} of {len(casts)} activations are clipped ({how})"


def _casts(chosen: Sequence[Site]) -> dict[CastOp, Site]:
    """The cast of each activation, once, with a site that reads it; UsageError for rules that clip themselves."""
    found: dict[CastOp, Site] = {}
    for site in chosen:
        owner = site.value.owner
        if not isinstance(owner, CastOp) or not isinstance(site.format, BlockType):
            continue
        if owner.how().scale_rule in SEARCHED_RULES:
            rule = owner.how().scale_rule
            raise UsageError(f"clip: {site.name} has the scale rule {rule}, which clips by itself: use one of the two")
        found.setdefault(owner, site)
    return found


def _rows(value: Tensor, sample: Sample, site: Site) -> Tensor | None:
    return sample.rows(value.shape[:-1], site.name)


def _error(op: CastOp, totals: list[float], weights: Tensor | None, site: Site) -> Any:
    how, format = replace(op.how(), clip=None), op.result.type.element_type

    def add(value: Tensor, sample: Sample) -> None:
        rows = _rows(value, sample, site)
        for place, part in enumerate(PARTS):
            clipped = how if part == 1 else replace(how, clip=part)
            off = (quantize(value, format, clipped).double() - value.double()).square_()
            off = off if weights is None else off * weights
            off = off.reshape(-1, off.shape[-1])
            totals[place] += float((off if rows is None else off[rows]).sum())

    return add


def _share(found: list[float], percentile: float, site: Site) -> Any:
    def add(value: Tensor, sample: Sample) -> None:
        import torch

        rows = _rows(value, sample, site)
        magnitudes = value.abs().reshape(-1, value.shape[-1])
        magnitudes = (magnitudes if rows is None else magnitudes[rows]).flatten().double()
        rank = min(len(magnitudes) - 1, int(percentile / 100 * len(magnitudes)))
        largest = float(magnitudes.max())
        if largest > 0:
            found.append(float(torch.kthvalue(magnitudes, rank + 1).values) / largest)

    return add
