"""`scale`: by which rule the scales of blocks follow from their values."""

from __future__ import annotations

from dataclasses import dataclass, replace

from xdsl.context import Context
from xdsl.dialects.builtin import ModuleOp
from xdsl.passes import ModulePass

from ..dialects.errors import UsageError, did_you_mean
from ..dialects.formats import SCALE_RULES, BlockType, Rounding
from ..dialects.instances import name_of
from ..dialects.operations.cast import CastOp
from ._context import note
from ._sites import ROLES, Site, sites
from .quantize import matches, nearest


@dataclass(frozen=True)
class Scale(ModulePass):
    """Let the casts of matched operands make their scales by `rule`, where the format has it.

    Powers of two (OCP MX 1.0 and its implementations): `floor`, `ceil`, `even`, `rceil`; `outlier-aware`, the smallest
    that clips nothing, halved where the largest magnitude is below 3.5 of it (arXiv 2603.08713). Blocks under 8-bit
    float scales: `four-over-six` (arXiv 2512.02010) and `n-over-six`, the largest magnitude becoming 6, or down to 4.
    All but formats with zero points: `sweep`, the scale with the least squared error among those around the largest
    magnitude's (exponents one lower and higher; 20 codes of an 8-bit float; parts from 1 to 0.5). Rules that try
    several scales keep the one with the least squared error in each block, at run time for activations. `role` narrows
    the pass to `weights`, `activations`, `attention` or `cache`. UsageError where no matched operand has the rule.
    """

    name = "scale"

    rule: str
    match: str = "*"
    role: str = "all"

    def apply(self, ctx: Context, op: ModuleOp) -> None:
        if self.rule not in SCALE_RULES:
            hint = did_you_mean(self.rule, SCALE_RULES)
            raise UsageError(f"scale: unknown rule {self.rule!r}{hint}; known: {', '.join(SCALE_RULES)}")
        every = [site for site in sites(op) if self._is_meant(site)]
        found = [site for site in every if matches(self.match, site.module)]
        if not found:
            names = dict.fromkeys(site.module for site in every)
            raise UsageError(f"scale: {self.match!r} matches no operand that is rounded into blocks"
                             f"{nearest(self.match, names)}")  # fmt: skip
        fitting = [site for site in found if self.rule in _format(site).scale_rules()]
        if not fitting:
            kinds = ", ".join(dict.fromkeys(name_of(site.format) for site in found))
            known = ", ".join(dict.fromkeys(rule for site in found for rule in _format(site).scale_rules()))
            raise UsageError(f"scale: none of {kinds} has the rule {self.rule!r}; they have {known}")
        for site in fitting:
            self._set(site)
        left = len(found) - len(fitting)
        note(
            ctx, f"scale{{rule={self.rule}}}: {len(fitting)} operands" + (f"; {left} have no such rule" if left else "")
        )

    def _is_meant(self, site: Site) -> bool:
        roles = {"all": ROLES, "weights": ("weight",), "activations": ("activation",)}.get(self.role, (self.role,))
        if not set(roles) <= set(ROLES):
            raise UsageError(f"scale: role is all, weights, activations, attention or cache, got {self.role!r}")
        return site.role in roles and isinstance(site.format, BlockType) and not site.is_probabilities

    def _set(self, site: Site) -> None:
        owner = site.read.owner
        if not isinstance(owner, CastOp):
            raise UsageError(
                f"scale: the scales of {site.name} were chosen by a pass before; put scale before clip, gptq and mix"
            )
        how: Rounding = replace(owner.how(), scale_rule=self.rule)
        if owner.how() != how:
            site.retype(str(site.format), how)


def _format(site: Site) -> BlockType:
    assert isinstance(site.format, BlockType)
    return site.format
