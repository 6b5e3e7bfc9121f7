"""`calibrate`: what a model's values and gradients are on calibration inputs, for the passes behind it."""

from __future__ import annotations

from dataclasses import dataclass

from xdsl.context import Context
from xdsl.dialects.builtin import ModuleOp
from xdsl.passes import ModulePass

from ..dialects.arguments import whole_number
from ..dialects.errors import UsageError
from ._collection import KINDS, SHARD, Settings
from ._context import note
from ._statistics import collect


@dataclass(frozen=True)
class Calibrate(ModulePass):
    """Collect statistics of the module as it stands; the passes behind it read them.

    Passes that need statistics collect what is missing themselves, with the same defaults; this pass says how, and
    keeps the sums. `kinds` are ranges (extremes, moments and percentiles of inputs), hessian (2 X^T X / rows of what
    meets a weight) and fisher (squared gradients of a loss, sequence by sequence). `samples` inputs are used at most,
    those of the recipe's `calibration` (or 128) where it is left out. `numerics` is float (without the module's casts)
    or emulated (with them; accumulators sum as torch does).
    `fisher` is loss (next-token cross entropy summed over a sequence, the data being the labels) or kl (labels drawn
    from the model's own distribution, which makes it the curvature of the KL divergence to the model; random signs for
    outputs that are no logits; drawn from `seed`); loss for causal language models, kl for others where it is left out.
    Sums of `shard` sequences are formed in f32 and added in f64. With `save`, a folder, each shard is a file there,
    and a shard that is there is not computed again; `only` names the shards (from 0) that this run computes, so that
    several can share the work: statistics are read once all shards are there.
    Raises MxloomError naming the site whose values or gradients are NaN or infinite, or which no input reaches.
    """

    name = "calibrate"

    samples: int | None = None
    kinds: tuple[str, ...] = KINDS
    numerics: str = "float"
    fisher: str | None = None
    seed: int = 0
    shard: int = SHARD
    save: str | None = None
    only: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        self._settings()  # a wrong one is told before anything runs
        if self.samples is not None:
            whole_number("samples", self.samples, 1)
        if self.only and self.save is None:
            raise UsageError("only has no effect without save, the folder in which the shards of other runs lie")
        if self.fisher is not None and "fisher" not in self.kinds:
            raise UsageError("fisher= has no effect: kinds does not name fisher")

    def apply(self, ctx: Context, op: ModuleOp) -> None:
        found = collect(ctx, op, self.name, self._settings(), samples=self.samples, save=self.save, only=self.only)
        if found is None:
            note(ctx, f"calibrate: shards {', '.join(map(str, self.only))} are in {self.save}; others are missing yet")
            return
        found.check_reached(op)

    def _settings(self) -> Settings:
        return Settings(frozenset(self.kinds), self.numerics, self.fisher, self.seed, self.shard)
