"""Groups of contractions that share a scale of their input channels, and how a scale is put into the module."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
from xdsl.context import Context
from xdsl.dialects.builtin import ModuleOp
from xdsl.ir import Operation, SSAValue
from xdsl.rewriter import InsertPoint, Rewriter

from ..dialects.errors import UsageError
from ..dialects.operations._shapes import UNKNOWN, shape_of
from ..dialects.operations._values import hint_of
from ..dialects.operations.cast import CastOp
from ..dialects.operations.contraction import Contraction
from ..dialects.operations.pointwise import MulOp
from ._absent import without_sites
from ._channels import UnfollowedError
from ._context import note
from ._folding import Fold, channel_dim, find_fold, without_fold
from ._given import erase_unused
from ._scaled_parameters import Parameters
from ._sites import Site, root, sites, sites_of
from .quantize import matches, nearest


@dataclass
class Group:
    """Contractions that read one value, or values that are scaled together.

    `reason` says why the inverse of a scale cannot be folded; `fold` is then the weights alone, and None where these
    cannot take a scale either. `share` is of the module's MACs.
    """

    sites: list[Site]
    fold: Fold | None = None
    reason: str | None = None
    share: float = 0.0

    @property
    def name(self) -> str:
        return ", ".join(site.module for site in self.sites)

    @property
    def is_narrow(self) -> bool:
        """Whether a contraction of the group rounds what it reads."""
        return any(not site.is_wide for each in self.sites for site in sites_of(each.operation))

    def __str__(self) -> str:
        return f"{self.name} ({self.share:.1%} of MACs)"


def groups_of(module: ModuleOp, match: str = "*") -> list[Group]:
    """The groups that a pattern names, each if it matches one of its modules, in the order of the module.

    UsageError where the pattern matches nothing.
    """
    found = _found(module)
    shares = mac_shares(module)
    for group in found:
        group.share = sum(shares[site.operation] for site in group.sites)
        if group.reason is not None:
            try:
                group.fold = without_fold(group.sites)
            except UnfollowedError as error:
                group.reason = str(error)
    _require_matches(module, found, match)
    return [group for group in found if any(matches(match, site.module) for site in group.sites)]


def _found(module: ModuleOp) -> list[Group]:
    activations = [site for site in sites(module) if site.role == "activation"]
    order = {site.operation: place for place, site in enumerate(activations)}
    found, seen = list[Group](), set[Operation]()
    refused = dict[tuple[SSAValue, int], Group]()
    for site in activations:
        key = root(site.value), channel_dim(site)
        if key in refused:
            refused[key].sites.append(site)
        elif site.operation not in seen:
            group = Group([site])
            try:
                group.fold = find_fold(site)
                group.sites = sorted((each for each, _ in group.fold.inputs), key=lambda each: order[each.operation])
            except UnfollowedError as error:
                group.reason = str(error)
                refused[key] = group
            seen.update(each.operation for each in group.sites)
            found.append(group)
    return found


def _require_matches(module: ModuleOp, found: Sequence[Group], match: str) -> None:
    modules = list(dict.fromkeys(site.module for group in found for site in group.sites))
    if not modules:
        raise UsageError(f"{match!r} matches nothing: {without_sites(module)}")
    if not any(matches(match, name) for name in modules):
        raise UsageError(f"{match!r} matches 0 of {len(modules)} modules{nearest(match, modules)}")


def mac_shares(module: ModuleOp) -> dict[Operation, float]:
    """Each contraction's share of the MACs where every size that is not known is 1: of one token, say."""
    contractions = [op for op in module.walk() if isinstance(op, Contraction)]
    macs = {op: op.macs(lambda value: tuple(1 if s == UNKNOWN else s for s in shape_of(value))) for op in contractions}
    total = sum(macs.values()) or 1
    return {op: count / total for op, count in macs.items()}


def require_some(name: str, chosen: Sequence[object], left: Sequence[tuple[Group, str]]) -> None:
    """UsageError that lists why a pass would leave every group as it is."""
    if not chosen:
        listed = "\n".join(f"  {group}: {reason}" for group, reason in left)
        raise UsageError(f"{name}: none of {len(left)} groups of contractions can be scaled:\n{listed}")


def scale_at_run_time(group: Group, scale: np.ndarray, parameters: Parameters) -> None:
    """Divide what the group reads when the model runs, before it is rounded; the weights take the scale."""
    import torch

    assert group.fold is not None
    parameters.apply(group.fold, scale)
    first = group.sites[0]
    read, shape = root(first.value), [1] * len(first.shape)
    shape[channel_dim(first)] = scale.size
    weight = group.fold.readers[0].parameter
    factors = torch.from_numpy(1.0 / scale).float().reshape(shape)
    made = parameters.make(weight.source.data, "input_scale", factors, weight)
    product = MulOp.build(operands=[read, made.result], result_types=[read.type])
    product.result.name_hint = hint_of(f"{first.module}.scaled_input")
    Rewriter.insert_op(product, InsertPoint.before(first.operation))
    copies: dict[SSAValue, SSAValue] = {read: product.result}
    for site in group.sites:
        old = site.value
        new = _cast_again(old, copies, first.operation)
        site.operation.operands[list(site.operation.operands).index(old)] = new
        if not old.uses and isinstance(old.owner, Operation):
            erase_unused(old.owner)


def _cast_again(value: SSAValue, copies: dict[SSAValue, SSAValue], before: Operation) -> SSAValue:
    """The casts that make a value, once more upon the copy of what stands under them."""
    if value not in copies:
        owner = cast(CastOp, value.owner)
        copy = owner.clone({owner.input: _cast_again(owner.input, copies, before)})
        Rewriter.insert_op(copy, InsertPoint.before(before))
        copies[value] = copy.result
    return copies[value]


def report(ctx: Context, name: str, done: Iterable[str], left: Iterable[tuple[Group, str]]) -> None:
    """Notes for the report: what a pass has scaled, and what not and why."""
    for line in done:
        note(ctx, f"{name}: {line}")
    for group, reason in left:
        note(ctx, f"{name}: left {group}: {reason}")
