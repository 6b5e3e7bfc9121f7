"""Statistics collected: what is observed of which module, by which settings, shard by shard."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from xdsl.dialects.builtin import ModuleOp
from xdsl.ir import Operation

from ..backends.reference import Weights
from ..dialects.arguments import one_of, whole_number
from ..dialects.errors import MxloomError, UsageError
from ._bare import bare
from ._losses import Loss, loss_of
from ._observed import Asked, Plan, plan_of
from ._samples import Sample
from ._shards import Fingerprint, Shards, fingerprint_of, inputs_digest
from ._sweep import Sweep

KINDS = ("ranges", "hessian", "fisher")
"""What can be collected."""

NUMERICS = ("float", "emulated")
"""Whether the module is run without its casts, or with them."""

FISHERS = ("loss", "kl")
"""Which loss is differentiated: see `_losses`."""

SHARD = 16
"""Sequences whose sums are formed in f32; from shard to shard they are added in f64."""


@dataclass(frozen=True)
class Settings:
    """What statistics hang on beside module, weights and inputs."""

    kinds: frozenset[str]
    numerics: str = "float"
    fisher: str | None = None
    seed: int = 0
    shard: int = SHARD

    def __post_init__(self) -> None:
        """Raises UsageError for what is not known."""
        if not self.kinds:
            raise UsageError(f"kinds is empty: name some of {', '.join(KINDS)}")
        for kind in sorted(self.kinds):
            one_of("kind", kind, KINDS)
        one_of("numerics", self.numerics, NUMERICS)
        if self.fisher is not None:
            one_of("fisher", self.fisher, FISHERS)
        whole_number("seed", self.seed, 0)
        whole_number("shard", self.shard, 1)

    def to_json(self, loss: Loss | None) -> dict[str, Any]:
        """As a fingerprint states them; the loss and its seed where there is one."""
        own = asdict(self) | {"kinds": sorted(self.kinds), "fisher": None if loss is None else loss.kind}
        if loss is None or loss.kind == "loss":
            del own["seed"]
        return own


@dataclass(frozen=True)
class Collection:
    """The sums of a module and what its sites ask of them; `is_partial` where shards are missing yet."""

    shards: Shards
    asked: dict[tuple[Operation, str], Asked]
    loss: str | None
    is_partial: bool


def collected(
    module: ModuleOp,
    weights: Weights,
    samples: Sequence[Sample],
    settings: Settings,
    *,
    task: str | None = None,
    save: str | None = None,
    only: Sequence[int] = (),
) -> Collection:
    """The sums of a module over samples, in the folder `save` where one is given.

    With `only`, no other shards are computed. Raises MxloomError for shards in `save` that were computed from something
    else, and for values or gradients that are NaN or infinite.
    """
    run, twins = bare(module, weights) if settings.numerics == "float" else (module, {op: op for op in module.walk()})
    plan = plan_of(run)
    if not plan.asked:
        raise MxloomError("the module has no contraction, and so no value that statistics are of")
    loss = loss_of(run, settings.fisher, task, settings.seed) if "fisher" in settings.kinds else None
    parts = [samples[first : first + settings.shard] for first in range(0, len(samples), settings.shard)]
    for number in only:
        whole_number("only", number, 0, len(parts) - 1, why=f": there are {len(parts)} shards")
    if only and save is None:
        raise UsageError("only needs save: the shards must lie where the others are added")
    shards = Shards(plan, settings.kinds, None if save is None else Path(save))
    prints = _fingerprints(plan, weights, settings.to_json(loss), parts) if save is not None else None
    _collect(shards, Sweep(plan, weights, settings.kinds, loss), parts, settings.shard, prints, only)
    names = plan.operands
    asked = {(one, name): plan.asked[other, name] for one, other in twins.items() for name in names.get(other, ())}
    return Collection(shards, asked, None if loss is None else loss.kind, len(shards.numbers) < len(parts))


def _collect(
    shards: Shards,
    sweep: Sweep,
    parts: Sequence[Sequence[Sample]],
    size: int,
    prints: list[Fingerprint] | None,
    only: Sequence[int],
) -> None:
    for number, part in enumerate(parts):
        own = prints[number] if prints is not None else None
        if only and number not in only and not shards.is_there(number, own):
            continue
        shards.collect(number, own, lambda done, part=part, number=number: sweep.shard(part, number * size, done))


def _fingerprints(
    plan: Plan, weights: Weights, settings: dict[str, Any], parts: Sequence[Sequence[Sample]]
) -> list[Fingerprint]:
    common = fingerprint_of(plan, weights, settings)
    return [
        common | {"number": number, "sequences": len(part), "inputs": inputs_digest(part)}
        for number, part in enumerate(parts)
    ]
