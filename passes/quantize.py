"""`quantize`: one rule that gives formats to the operands of the modules it matches."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase

from xdsl.context import Context
from xdsl.dialects.builtin import DYNAMIC_INDEX, IntegerAttr, ModuleOp, TensorType
from xdsl.ir import Attribute
from xdsl.passes import ModulePass
from xdsl.utils.exceptions import VerifyException

from ..dialects.errors import UsageError, did_you_mean
from ..dialects.formats import MixedType, Rounding, takes_scale_rule, verify_tensor
from ..dialects.formats._format import POWER_OF_TWO_RULES
from ..dialects.instances import format_of
from ._absent import absent, opaque, without_sites
from ._cache import Kept, kept_by
from ._pattern import search
from ._sites import Role, Site, sites

_KEYS = {
    "keys": "cache",
    "values": "cache",
    "weight": "weights",
    "activation": "activations",
    "attention": "attention",
}
"""What the user types for a place: a role, but that the cache has keys and values."""

_CACHED = {"key": "keys", "value": "values"}
"""The places of the operands that a cache holds."""

_THRESHOLDS: tuple[Role, ...] = ("weight", "activation")
"""The roles that take mixed formats."""

CONTRACTIONS = ("linear", "conv", "matmul", "attention", "expert_linear")


class RuleError(UsageError):
    """A rule that has no effect or contradicts itself. `rule` counts the rules from 1 as they ran."""

    def __init__(self, rule: int, message: str):
        super().__init__(f"rule {rule}: {message}")
        self.rule, self.message = rule, message


@dataclass(frozen=True)
class Quantize(ModulePass):
    """Round what the matched operations read; an operation that an earlier rule decided is left as it is.

    Several `quantize` passes in a row are a list of rules, and the first match wins. `match` is the name of a module
    of the model, a glob, or `re:` and a regular expression that is searched for. `kind` narrows the rule to
    operations (`linear`, `conv`, `matmul`, `attention`, `expert_linear`; an embedding, which is a look-up and no
    contraction, only where `kind` names it). A role without a format stays wide, and so does everything that `keep`
    matches: `keep=f32` leaves it, `keep=bf16` rounds its operands to bf16. `seed` starts stochastic rounding.
    `cache` is the format in which keys and values are cached; `cache_keys` and `cache_values` are those of one of them.
    `keys_per` and `values_per` say what a scale of a format of blocks stands for: `token`, the default, or `channel`;
    `keys_wide` and `values_wide`, how many of the newest positions stay wide; `keys_step` and `values_step`, how many
    positions are rounded at a time (docs/cache.md).
    Mixed formats keep a block in their high format where its impact exceeds `weight_threshold` or
    `activation_threshold`; without these the pass `mix` says which blocks.
    Raises `RuleError` where the rule, or one of its formats, changes nothing.
    """

    name = "quantize"

    match: str = "*"
    kind: tuple[str, ...] = ()
    weights: str | None = None
    activations: str | None = None
    attention: str | None = None
    cache: str | None = None
    cache_keys: str | None = None
    cache_values: str | None = None
    keys_per: str | None = None
    keys_wide: int | None = None
    keys_step: int | None = None
    values_per: str | None = None
    values_wide: int | None = None
    values_step: int | None = None
    keep: str | None = None
    scale_rule: str | None = None
    rounding: str = "rne"
    seed: int = 0
    weight_threshold: float | None = None
    activation_threshold: float | None = None

    def apply(self, ctx: Context, op: ModuleOp) -> None:
        every = sites(op)
        rule = 1 + max((s.rule or 0 for s in every), default=0)
        self._check(rule)
        modules = self._modules(rule, every, op)
        chosen = [s for s in modules if s.rule is None]
        if not chosen:
            raise RuleError(
                rule,
                f"every module that {self.match!r} matches was decided by an earlier rule; remove it or put it first",
            )
        formats = self._formats()
        self._check_scale_rule(rule, formats)
        self._check_thresholds(rule, formats)
        for place, format in formats.items():
            concerned = [s for s in chosen if _place(s) == place]
            if not concerned and self.keep is None:
                what = f"{self._typed(place)}={format!r} has no effect"
                left = opaque(op, ("attention",)) if place not in ("weight", "activation") else ""
                why = f"none of the modules that {self.match!r} matches has such an operand{left}"
                raise RuleError(rule, f"{what}: {why}")
            for site in concerned:
                self._check_lies(rule, site, format)
        for place, format in formats.items():
            for site in chosen:
                if _place(site) == place:
                    self._round(site, format)
        for site in chosen:
            site.operation.attributes["rule"] = IntegerAttr(rule, 64)

    def _formats(self) -> dict[str, str]:
        """The format of each place, the cache's first: attention's own cast then stands upon it."""
        if self.keep is not None:
            return {} if self.keep == "f32" else dict.fromkeys(_KEYS, self.keep)
        given = {
            **{place: kept.format for place, kept in kept_by(self).items()},
            "weight": self.weights,
            "activation": self.activations,
            "attention": self.attention,
        }
        return {place: format for place, format in given.items() if format is not None}

    def _typed(self, place: str) -> str:
        """The option that gives a place its format."""
        if self.keep is not None:
            return "keep"
        own = {"keys": self.cache_keys, "values": self.cache_values}.get(place)
        return f"cache_{place}" if own is not None else _KEYS[place]

    def _kept(self, site: Site, format: str) -> Kept | None:
        """How the cache holds an operand; None for what is no cache's."""
        if site.role != "cache":
            return None
        return Kept(format) if self.keep is not None else kept_by(self)[_place(site)]

    def _layout(self, site: Site, format: str) -> Attribute:
        kept = self._kept(site, format)
        return site.layout(format) if kept is None else kept.layout(site)

    def _round(self, site: Site, format: str) -> None:
        kept, how = self._kept(site, format), self._how(site.role, self._layout(site, format))
        if kept is None:
            site.retype(format, how)
        else:
            kept.keep(site, how)

    def _check(self, rule: int) -> None:
        formats = (self.weights, self.activations, self.attention, self.cache, self.cache_keys, self.cache_values)
        if self.keep is not None and any(formats):
            raise RuleError(rule, "keep= and formats contradict each other; give one or the other")
        if self.keep is not None and self.keep not in ("f32", "bf16", "f16"):
            raise RuleError(rule, f"keep={self.keep!r}: a rule keeps f32, bf16 or f16")
        if not any((self.keep, *formats)):
            raise RuleError(rule, "the rule names no format; give weights=, activations=, attention=, cache= or keep=")
        self._or_refuse(rule, lambda: kept_by(self))
        if self.seed < 0:
            raise RuleError(rule, f"seed={self.seed}: a seed is 0 or more")
        for kind in self.kind:
            if kind not in (*CONTRACTIONS, "embedding"):
                raise RuleError(rule, f"unknown kind {kind!r}{did_you_mean(kind, (*CONTRACTIONS, 'embedding'))}")

    def _or_refuse(self, rule: int, check: Callable[[], object]) -> None:
        """Name the rule in what a check refuses."""
        try:
            check()
        except UsageError as error:
            raise RuleError(rule, str(error)) from None

    def _check_lies(self, rule: int, site: Site, format: str) -> None:
        """Raise RuleError where blocks of the format do not lie on the operand, or it is narrow for good."""
        if reason := site.rounded():
            raise RuleError(rule, f"{site.name} {reason}")
        try:
            verify_tensor(TensorType(self._layout(site, format), site.shape))
        except VerifyException as error:
            shape = ", ".join("?" if size == DYNAMIC_INDEX else str(size) for size in site.shape)
            reason = str(error).replace(str(DYNAMIC_INDEX), "?")
            key = self._typed(_place(site))
            raise RuleError(rule, f"{key}={format!r} does not fit {site.name} [{shape}]: {reason}") from None
        if (kept := self._kept(site, format)) is not None:
            self._or_refuse(rule, lambda: kept.steps(site))

    def _how(self, role: Role, format: Attribute) -> Rounding:
        threshold = self._threshold(role) if isinstance(format, MixedType) else None
        return Rounding(self._scale_rule(format), self.rounding, seed=self.seed, threshold=threshold)

    def _threshold(self, role: Role) -> float | None:
        """The block impact above which operands of a role keep the high format, where the rule says one."""
        return {"weight": self.weight_threshold, "activation": self.activation_threshold}.get(role)

    def _check_thresholds(self, rule: int, formats: dict[str, str]) -> None:
        """Raise RuleError for a mixed format where none can be, and for a threshold without a mixed format."""
        mixed = {place for place, format in formats.items() if isinstance(format_of(format), MixedType)}
        for place in sorted(mixed):
            if place not in _THRESHOLDS:
                raise RuleError(
                    rule, f"{self._typed(place)}={formats[place]!r}: only weights and activations are mixed"
                )
        for role in _THRESHOLDS:
            if self._threshold(role) is not None and role not in mixed:
                raise RuleError(rule, f"{role}_threshold has no effect: {_KEYS[role]}= is no mixed format")

    def _scale_rule(self, format: Attribute) -> str | None:
        """The rule's own where the format has power-of-two scales; other scales have one rule only."""
        return self.scale_rule if takes_scale_rule(format) else None

    def _check_scale_rule(self, rule: int, formats: dict[str, str]) -> None:
        if self.scale_rule is None:
            return
        if self.scale_rule not in POWER_OF_TWO_RULES:
            hint, known = did_you_mean(self.scale_rule, POWER_OF_TWO_RULES), ", ".join(POWER_OF_TWO_RULES)
            raise RuleError(rule, f"unknown scale_rule {self.scale_rule!r}{hint}; known: {known}")
        if not any(self._scale_rule(format_of(format)) for format in formats.values()):
            given = ", ".join(dict.fromkeys(formats.values())) or "its formats"
            what = f"scale_rule={self.scale_rule!r} has no effect"
            raise RuleError(rule, f"{what}: none of {given} has power-of-two scales")

    def _modules(self, rule: int, every: list[Site], module: ModuleOp) -> list[Site]:
        kinds = self.kind or CONTRACTIONS
        matched = [s for s in every if s.kind in kinds and matches(self.match, s.module)]
        if matched:
            return matched
        if not every:
            raise RuleError(rule, f"{self.match!r} matches nothing: {without_sites(module)}")
        names = {s.module: s.kind for s in every if s.kind in kinds}
        if not names and self.kind:
            raise RuleError(rule, absent(self.kind, every, module))
        other = {s.module: s.kind for s in every if matches(self.match, s.module)}
        hint = did_you_mean(self.match.strip("*."), names)
        if other:
            name, kind = next(iter(other.items()))
            hint = f"; {name} is of kind {kind}: name it with kind={kind}"
        raise RuleError(rule, f"{self.match!r} matches 0 of {len(names)} modules{hint or nearest(self.match, names)}")


def _place(site: Site) -> str:
    """Which of the rule's formats a site takes: that of its role, or of what a cache holds there."""
    return _CACHED[site.operand] if site.role == "cache" else site.role


def matches(pattern: str, module: str) -> bool:
    """Whether a rule's pattern (a name, a glob, or `re:` and a regular expression to search for) matches a module."""
    if pattern.startswith("re:"):
        return search(pattern[3:])(module)
    return fnmatchcase(module, pattern)


def nearest(pattern: str, modules: Iterable[str]) -> str:
    """The module whose last part is that of the pattern: `lm_head` finds `language_model.lm_head`."""
    last = pattern.strip("*.").rsplit(".", 1)[-1]
    near = [m for m in modules if m.rsplit(".", 1)[-1] == last and last]
    if near:
        return f' (did you mean "{near[0]}"?)'
    parts = dict.fromkeys(m.rsplit(".", 1)[-1] for m in modules)
    return did_you_mean(last, parts) or "; `mxloom inspect` lists them"
