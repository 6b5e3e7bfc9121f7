"""Statistics of a model on calibration inputs, for passes: ranges, second moments of inputs, squared gradients."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from xdsl.context import Context
from xdsl.dialects.builtin import ModuleOp
from xdsl.ir import Operation

from ..backends.reference import Weights, body
from ..dialects.arguments import one_of
from ..dialects.errors import MxloomError
from ._bare import bare
from ._context import CompileContext, calibration_of, weights_of
from ._losses import Fisher, loss_of
from ._observed import Asked, Plan, plan_of
from ._samples import Sample, samples_of
from ._sites import Site, sites
from ._sums import Sums
from ._sweep import Sweep

if TYPE_CHECKING:
    from torch import Tensor

KINDS = ("ranges", "hessian", "fisher")
"""What can be collected."""

NUMERICS = ("float", "emulated")
"""Whether casts are taken off the module first."""

SHARD = 16
"""Sequences whose sums are formed in f32; from shard to shard they are added in f64."""


@dataclass(frozen=True)
class InputStatistics:
    """What a contraction's input was, before any cast: `rows` rows of K channels, padding left out.

    Tensors are f32 [K], K the channels (of a convolution's input, its own); [heads, width] for an operand of attention,
    [1] where the number of channels is dynamic. `largest` is the largest magnitude.
    """

    rows: int
    minimum: Tensor
    maximum: Tensor
    largest: Tensor
    mean: Tensor
    mean_magnitude: Tensor
    mean_square: Tensor


class Statistics:
    """Sums over calibration inputs, asked for by site. `samples` sequences were seen."""

    def __init__(self, plan: Plan, asked: dict[tuple[Operation, str], Asked], kinds: frozenset[str], samples: int):
        self.kinds, self.samples = kinds, samples
        self._plan, self._asked = plan, asked
        self._sums: dict[str, Sums] = {}

    def holds(self, module: ModuleOp, kinds: Sequence[str]) -> bool:
        """Whether these are statistics of every site of the module, of all these kinds."""
        wanted = [site for site in sites(module) if site.role != "cache" and not site.is_probabilities]
        return set(kinds) <= self.kinds and all((site.operation, site.operand) in self._asked for site in wanted)

    def inputs(self, site: Site) -> InputStatistics:
        """Of what the site's contraction reads: the input that meets it for a weight, the operand itself otherwise.

        Raises MxloomError where there is none, or where no row of it was data.
        """
        found = [self._of("ranges", key, site) for key in self._asked_of(site).values]
        if not found:
            raise MxloomError(f"{site.name}: it meets no computed value, so its inputs have no statistics")
        return _inputs(found, site)

    def hessian(self, site: Site) -> Tensor:
        """2 X^T X / rows in f32, X [rows, K] being the rows that meet a weight (of all its readers), or the operand's.

        [K, K]; [experts, K, K] for experts and [groups, K, K] for a convolution in groups, each over its own rows (0
        where an expert saw none). Columns of a convolution lie as in its weight: channel, then kernel position.
        """
        found = [self._of("hessian", key, site) for key in self._asked_of(site).products]
        if not found:
            raise MxloomError(f"{site.name}: no weight meets a computed value there, so it has no Hessian")
        rows, total = _total(found, "rows"), _total(found, "products")
        self._check_rows(int(rows.sum()), site)
        count = rows.clamp(min=1).reshape(-1, 1, 1) if total.ndim == 3 else rows
        return (2 * total / count).float()

    def fisher(self, site: Site) -> Tensor:
        """Mean squared gradient of the loss in f32.

        A weight: [its shape], the mean over sequences of (dL/dw)^2, L summed over a sequence and w the weight as all
        contractions that read it see it together. Another operand: [K], the mean over its rows of (dL/dx)^2, x as all
        contractions that read it see it together.
        """
        sums = self._of("fisher", cast(str, self._asked_of(site).gradients), site)
        rows = int(sums["rows"])
        self._check_rows(rows, site)
        found = (sums["squares"].double() / rows).float()
        if not bool(found.isfinite().all()):
            raise MxloomError(
                f"{site.name}: {int((~found.isfinite()).sum())} of {found.numel()} squared gradients are NaN or "
                "infinite; look at the values that the model computes there"
            )
        return found

    def _asked_of(self, site: Site) -> Asked:
        if site.is_probabilities:
            raise MxloomError(f"{site.name}: probabilities are inside the operation and are not observed")
        return self._asked[site.operation, site.operand]

    def _of(self, kind: str, key: str, site: Site) -> Sums:
        if kind not in self.kinds:
            raise MxloomError(f"{site.name}: {kind} was not collected; these were: {', '.join(sorted(self.kinds))}")
        found = self._sums.get(f"{kind} {key}")
        if not found:
            self._check_rows(0, site)
        return cast(Sums, found)

    def _check_rows(self, rows: int, site: Site) -> None:
        if rows == 0:
            raise MxloomError(
                f"{site.name} was reached 0 times in calibration (tokens 0): nothing is known of it; give inputs that "
                "reach it, or leave it out of the pass"
            )

    def add(self, shard: dict[str, Sums]) -> None:
        """Add the sums of the next shard, in f64."""
        for name, sums in shard.items():
            held = self._sums.setdefault(name, {})
            for part, tensor in sums.items():
                held[part] = _merged(part, held.get(part), tensor)


def _merged(part: str, held: Tensor | None, new: Tensor) -> Tensor:
    import torch

    if part in ("minimum", "maximum"):
        return new if held is None else (torch.minimum if part == "minimum" else torch.maximum)(held, new)
    wide = new.double() if new.is_floating_point() else new
    return wide if held is None else held + wide


def _total(found: list[Sums], part: str) -> Tensor:
    import torch

    return torch.stack([sums[part] for sums in found]).sum(0)


def _inputs(found: list[Sums], site: Site) -> InputStatistics:
    import torch

    rows = sum(int(sums["rows"]) for sums in found)
    if rows == 0:
        raise MxloomError(
            f"{site.name} was reached 0 times in calibration (tokens 0): nothing is known of it; give inputs that "
            "reach it, or leave it out of the pass"
        )
    least = torch.stack([sums["minimum"] for sums in found]).amin(0)
    most = torch.stack([sums["maximum"] for sums in found]).amax(0)

    def mean(part: str) -> Tensor:
        return (_total(found, part) / rows).float()

    return InputStatistics(
        rows=rows,
        minimum=least,
        maximum=most,
        largest=torch.maximum(least.abs(), most.abs()),
        mean=mean("sum"),
        mean_magnitude=mean("magnitude"),
        mean_square=mean("square"),
    )


def statistics_of(ctx: Context, module: ModuleOp, pass_name: str, *kinds: str) -> Statistics:
    """Statistics of a module as it stands, of some kinds (`ranges`, `hessian`, `fisher`) at least.

    Those that `ctx` holds where they will do, or new ones from `ctx.calibration`, which are kept there. Raises
    UsageError, naming the pass, where there are no weights or nothing to calibrate with.
    """
    for kind in kinds:
        one_of("kind", kind, KINDS)
    held = getattr(ctx, "statistics", None)
    if isinstance(held, Statistics) and held.holds(module, kinds):
        return held
    wanted = frozenset(kinds) | (held.kinds if isinstance(held, Statistics) else frozenset())
    weights = weights_of(ctx, pass_name)
    inputs = calibration_of(ctx, pass_name, getattr(ctx, "samples", 128))
    samples = samples_of(body(module).args, inputs)
    found = collected(module, weights, samples, wanted, task=getattr(ctx, "task", None))
    if isinstance(ctx, CompileContext):
        ctx.statistics = found
    return found


def forget(ctx: Context) -> None:
    """Values flow otherwise than before: what was collected holds no more."""
    if isinstance(ctx, CompileContext):
        ctx.statistics = None


def collected(
    module: ModuleOp,
    weights: Weights,
    samples: Sequence[Sample],
    kinds: frozenset[str],
    *,
    numerics: str = "float",
    fisher: Fisher | None = None,
    task: str | None = None,
    seed: int = 0,
    shard: int = SHARD,
) -> Statistics:
    """Statistics of a module over some samples, shard by shard."""
    one_of("numerics", numerics, NUMERICS)
    run, twins = bare(module) if numerics == "float" else (module, {op: op for op in module.walk()})
    plan = plan_of(run)
    loss = loss_of(run, fisher, task, seed) if "fisher" in kinds else None
    names = plan.operands
    asked = {(one, name): plan.asked[other, name] for one, other in twins.items() for name in names.get(other, ())}
    found = Statistics(plan, asked, kinds, len(samples))
    sweep = Sweep(plan, weights, kinds, loss)
    for first in range(0, len(samples), shard):
        found.add(sweep.shard(samples[first : first + shard], first))
    return found
