"""Statistics of a model on calibration inputs, for passes: ranges, second moments of inputs, squared gradients."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, cast

from xdsl.context import Context
from xdsl.dialects.builtin import ModuleOp
from xdsl.ir import Operation

from ..backends.reference import body
from ..dialects.arguments import one_of, real_number
from ..dialects.errors import MxloomError, UsageError
from ._collection import KINDS, Settings, collected
from ._context import CompileContext, calibration_of, note, weights_of
from ._magnitudes import COARSE, FINE
from ._observed import Asked
from ._samples import Sample, samples_of
from ._shards import Shards, merged, units_of
from ._sites import Site, sites
from ._sums import Sums

if TYPE_CHECKING:
    from torch import Tensor

OUTLIER = 2.0**-3
"""A channel is an outlier where its largest magnitude exceeds this part of the layer's (ARCQuant, arXiv 2601.07475)."""


@dataclass(frozen=True)
class InputStatistics:
    """What a contraction's input was, before any cast: `rows` rows of K channels, padding left out.

    Tensors are f32 [K], K the channels (of a convolution's input, its own); [heads, width] for an operand of attention,
    [1] where the number of channels is dynamic. `largest` is the largest magnitude. `counts` [channels, bins] and
    `signed_counts` [2, bins] are those of `_magnitudes`.
    """

    rows: int
    minimum: Tensor
    maximum: Tensor
    largest: Tensor
    mean: Tensor
    mean_magnitude: Tensor
    mean_square: Tensor
    counts: Tensor = field(repr=False)
    signed_counts: Tensor = field(repr=False)

    @property
    def outliers(self) -> Tensor:
        """The channels whose largest magnitude exceeds 2^-3 of the layer's, the largest first (int64, flat numbers)."""
        largest = self.largest.flatten()
        order = largest.argsort(descending=True, stable=True)
        return order[largest[order] > OUTLIER * largest.max()]

    def percentile(self, share: float) -> Tensor:
        """The magnitude that a share (0 to 1) of each channel's values do not exceed, as `largest` lies.

        From counts in bins of a quarter octave: off by less than a quarter of itself.
        """
        found = COARSE.percentile(self.counts, _share(share), self.largest.flatten())
        return found.reshape(self.largest.shape)

    def tensor_percentile(self, share: float) -> float:
        """The magnitude that a share (0 to 1) of all values do not exceed; off by less than 2^-6 of itself."""
        counts = self.signed_counts.sum(0, keepdim=True)
        return float(FINE.percentile(counts, _share(share), self.largest.max()[None]))

    def tensor_range(self, share: float) -> tuple[float, float]:
        """The range that is left when (1 - share) / 2 of all values are cut off at either end, at most."""
        share = _share(share)
        above, below = self.signed_counts
        total = int(above.sum() + below.sum())
        return -_tail(below, total, share, -self.minimum.min()), _tail(above, total, share, self.maximum.max())


@dataclass(frozen=True)
class Part:
    """The sums of one kind, and what of them each site asks for."""

    shards: Shards
    asked: dict[tuple[Operation, str], Asked]

    def covers(self, module: ModuleOp) -> bool:
        """Whether every site of the module is one of these."""
        wanted = [site for site in sites(module) if not site.is_probabilities]
        return all((site.operation, site.operand) in self.asked for site in wanted)


@dataclass(frozen=True)
class Statistics:
    """Sums over calibration inputs, asked for by site.

    `samples` sequences were seen, of `wanted` inputs at most; `settings` say how, `loss` what `fisher` differentiates.
    """

    parts: dict[str, Part]
    settings: Settings
    samples: int
    wanted: int | None = None
    loss: str | None = None

    @property
    def kinds(self) -> frozenset[str]:
        """What was collected."""
        return frozenset(self.parts)

    def holds(self, module: ModuleOp, kinds: Sequence[str]) -> bool:
        """Whether these are statistics of every site of the module, of all these kinds."""
        return all(kind in self.parts and self.parts[kind].covers(module) for kind in kinds)

    def beside(self, other: Statistics) -> Statistics:
        """These, and the kinds of the other that are missing here."""
        loss = self.loss if "fisher" in self.parts else other.loss
        return replace(self, parts={**other.parts, **self.parts}, loss=loss)

    def inputs(self, site: Site) -> InputStatistics:
        """Of what the site's contraction reads: the input that meets it for a weight, the operand itself otherwise.

        Raises MxloomError where there is none, or where no row of it was data.
        """
        keys = self._asked_of("ranges", site).values
        if not keys:
            raise MxloomError(f"{site.name}: it meets no computed value, so its inputs have no statistics")
        return _inputs(merged([self._sums("ranges", key, site) for key in keys]))

    def hessian(self, site: Site) -> Tensor:
        """2 X^T X / rows in f32, X [rows, K] being the rows that meet a weight (of all its readers), or the operand's.

        [K, K]; [experts, K, K] for experts and [groups, K, K] for a convolution in groups, each over its own rows (0
        where an expert saw none). Columns of a convolution lie as in its weight: channel, then kernel position.
        """
        keys = self._asked_of("hessian", site).products
        if not keys:
            raise MxloomError(f"{site.name}: no weight meets a computed value there, so it has no Hessian")
        sums = merged([self._sums("hessian", key, site) for key in keys])
        total, rows = sums["products"], sums["rows"].clamp(min=1)
        return (2 * total / (rows.reshape(-1, 1, 1) if total.ndim == 3 else rows)).float()

    def hessian_rows(self, site: Site) -> Tensor:
        """How many rows each matrix of `hessian` rests on: [1], [experts] or [groups] int64."""
        return merged([self._sums("hessian", key, site) for key in self._asked_of("hessian", site).products])["rows"]

    def fisher(self, site: Site) -> Tensor:
        """Mean squared gradient of the loss in f32.

        A weight: [its shape], the mean over sequences of (dL/dw)^2, L summed over a sequence and w the weight as all
        contractions that read it see it together. Another operand: [K], the mean over its rows of (dL/dx)^2, x as all
        contractions that read it see it together.
        """
        sums = self._sums("fisher", cast(str, self._asked_of("fisher", site).gradients), site)
        return (sums["squares"] / sums["rows"]).float()

    def rows(self, kind: str, site: Site) -> int:
        """Rows (of a weight's `fisher`: sequences) that a site's statistics of a kind rest on."""
        part = self._part(kind, site)
        return sum(int(part.shards.rows(kind, key).sum()) for key in self._asked_of(kind, site).of(kind))

    def check_reached(self, module: ModuleOp) -> None:
        """Raise MxloomError naming the first site of which no row was data."""
        for site in sites(module):
            for kind in self.parts if not site.is_probabilities else ():
                if self._asked_of(kind, site).of(kind) and self.rows(kind, site) == 0:
                    raise _unreached(site, kind)

    def thin(self) -> list[tuple[str, int, int]]:
        """The Hessians that rest on fewer rows than they have columns: site, rows, columns."""
        if "hessian" not in self.parts:
            return []
        shards = self.parts["hessian"].shards
        units = units_of(shards.plan)["hessian"]
        rows = {key: int(shards.rows("hessian", key).min()) for key in units}
        return [(key, rows[key], unit.size) for key, unit in units.items() if rows[key] < unit.size]

    def _part(self, kind: str, site: Site) -> Part:
        if kind not in self.parts:
            raise MxloomError(f"{site.name}: {kind} was not collected; these were: {', '.join(sorted(self.parts))}")
        return self.parts[kind]

    def _asked_of(self, kind: str, site: Site) -> Asked:
        if site.is_probabilities:
            raise MxloomError(f"{site.name}: probabilities are inside the operation and are not observed")
        asked = self._part(kind, site).asked
        if (site.operation, site.operand) not in asked:
            raise MxloomError(f"{site.name} is no site of the module that these statistics are of: collect them again")
        return asked[site.operation, site.operand]

    def _sums(self, kind: str, key: str, site: Site) -> Sums:
        found = self._part(kind, site).shards.sums(kind, key)
        if not found:
            raise _unreached(site, kind)
        return found


def statistics_of(ctx: Context, module: ModuleOp, pass_name: str, *kinds: str, fisher: str | None = None) -> Statistics:
    """Statistics of a module as it stands, of some kinds (`ranges`, `hessian`, `fisher`) at least.

    Those that `ctx` holds where they will do, or new ones from `ctx.calibration`, which are kept there. `fisher` says
    of which loss the gradients are to be, `loss` or `kl`, where that matters. Raises UsageError, naming the pass, where
    there are no weights or nothing to calibrate with.
    """
    for kind in kinds:
        one_of("kind", kind, KINDS)
    held = getattr(ctx, "statistics", None)
    if not isinstance(held, Statistics):
        return _collected(ctx, module, pass_name, Settings(frozenset(kinds), fisher=fisher))
    missing = {kind for kind in kinds if not held.holds(module, [kind])}
    if fisher is not None and held.loss != fisher:
        missing |= {"fisher"} & {*kinds}
    if not missing:
        return held
    settings = replace(held.settings, kinds=frozenset(missing), fisher=fisher or held.settings.fisher)
    found = _collected(ctx, module, pass_name, settings, samples=held.wanted)
    if held.holds(module, [*(held.kinds - missing)]):
        found = found.beside(held)
        ctx.statistics = found  # pyright: ignore[reportAttributeAccessIssue]
    return found


def _collected(
    ctx: Context, module: ModuleOp, pass_name: str, settings: Settings, samples: int | None = None
) -> Statistics:
    found = collect(ctx, module, pass_name, settings, samples=samples)
    assert found is not None
    return found


def collect(
    ctx: Context,
    module: ModuleOp,
    pass_name: str,
    settings: Settings,
    *,
    samples: int | None = None,
    save: str | None = None,
    only: Sequence[int] = (),
) -> Statistics | None:
    """New statistics of a module from `ctx.calibration`, kept in `ctx`; None where `only` left out some shards.

    See `calibrate`, whose options these are. What is unusual about them becomes a note.
    """
    weights = weights_of(ctx, pass_name)
    sequences = sequences_of(ctx, module, pass_name, samples)
    collection = collected(module, weights, sequences, settings, task=getattr(ctx, "task", None), save=save, only=only)
    if collection.is_partial:
        return None
    part = Part(collection.shards, collection.asked)
    found = Statistics(dict.fromkeys(settings.kinds, part), settings, len(sequences), samples, collection.loss)
    if isinstance(ctx, CompileContext):
        ctx.statistics = found
    if thin := found.thin():
        name, rows, columns = thin[0]
        more = f" and {len(thin) - 1} more" if len(thin) > 1 else ""
        note(
            ctx,
            f"{pass_name}: the Hessian of {name} rests on {rows} rows for {columns} columns{more}: it has no full "
            "rank, and what is solved with it is damped; more calibration samples mend that",
        )
    return found


def sequences_of(ctx: Context, module: ModuleOp, pass_name: str, samples: int | None = None) -> list[Sample]:
    """The sequences that passes calibrate with, of so many inputs at most; `ctx.samples` where it is not said.

    UsageError, naming the pass, where there are none.
    """
    wanted = getattr(ctx, "samples", 128) if samples is None else samples
    return samples_of(body(module).args, calibration_of(ctx, pass_name, wanted))


def forget(ctx: Context) -> None:
    """Values flow otherwise than before: what was collected holds no more."""
    if isinstance(ctx, CompileContext):
        ctx.statistics = None


def _unreached(site: Site, kind: str) -> MxloomError:
    what = "no gradient of the loss reached it" if kind == "fisher" else "nothing is known of it"
    return MxloomError(
        f"{site.name} was reached 0 times in calibration (tokens 0): {what}; give inputs that reach it, or leave it "
        "out of the pass"
    )


def _inputs(sums: Sums) -> InputStatistics:
    import torch

    rows = int(sums["rows"])
    least, most = sums["minimum"].float(), sums["maximum"].float()
    return InputStatistics(
        rows=rows,
        minimum=least,
        maximum=most,
        largest=torch.maximum(least.abs(), most.abs()),
        mean=(sums["sum"] / rows).float(),
        mean_magnitude=(sums["magnitude"] / rows).float(),
        mean_square=(sums["square"] / rows).float(),
        counts=sums["counts"],
        signed_counts=sums["signed_counts"],
    )


def _share(share: float) -> float:
    if not 0 <= real_number("share", share) <= 1:
        raise UsageError(f"a share of values is 0 to 1, got {share}")
    return float(share)


def _tail(counts: Tensor, total: int, share: float, most: Tensor) -> float:
    """The magnitude on one side of 0 beyond which (1 - share) / 2 of all values lie; 0 where that side has fewer."""
    own = int(counts.sum())
    outside = (1 - share) / 2 * total
    if own <= outside or own == 0:
        return 0.0
    return float(FINE.percentile(counts[None], 1 - outside / own, most.clamp(min=0)[None]))
