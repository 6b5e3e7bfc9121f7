"""A recipe: what to do to a model, as one YAML file whose every key has an effect."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PrivateAttr,
    StringConstraints,
    ValidationError,
    model_validator,
)

from ..dialects.errors import MxloomError, UsageError, shortened
from ..dialects.formats import takes_scale_rule
from ..dialects.instances import format_of
from .pipeline import LARGEST, parse_passes, quoted
from .recipe_errors import explained, mistaken, spoken
from .recipe_text import SIZE_LIMIT, Reader, Where


def _known_format(name: str) -> str:
    from ..dialects.instances import format_of

    return _accepted(format_of, name)


def _known_passes(pipeline: str) -> str:
    return _accepted(parse_passes, pipeline)


def _check_cache(rule: Any) -> None:
    from ..passes._cache import kept_by

    try:
        kept_by(rule)
    except UsageError as error:
        raise ValueError(str(error)) from error


def _known_pattern(pattern: str) -> str:
    """A pattern that matching cannot stumble over later: a regular expression is compiled here."""
    from ..passes._pattern import search

    return _accepted(search, pattern.removeprefix("re:")) and pattern if pattern.startswith("re:") else pattern


def _one(version: Any) -> Any:
    if type(version) is not int or version != 1:
        raise ValueError(f"got {version!r:.60}; known: 1")
    return version


def _each_once(kinds: list[str]) -> list[str]:
    twice = next((kind for kind in kinds if kinds.count(kind) > 1), None)
    if twice is not None:
        raise ValueError(f"{twice} stands here more than once")
    return kinds


def _accepted(check: Callable[[str], object], text: str) -> str:
    """`text` where `check` takes it; its error becomes one that pydantic gathers with the others."""
    try:
        check(text)
    except MxloomError as error:
        raise ValueError(str(error)) from error
    return text


Word = Annotated[str, StringConstraints(min_length=1, max_length=1000, pattern=r"^[^\n\f\v\r]*$")]
Format = Annotated[Word, AfterValidator(_known_format)]
Kind = Literal["linear", "conv", "matmul", "attention", "expert_linear", "embedding"]
Kinds = Annotated[
    list[Kind],
    Field(min_length=1),
    BeforeValidator(lambda value: _listed(value), json_schema_input_type=Kind | list[Kind]),
    AfterValidator(_each_once),
]
Count = Annotated[int, Field(le=LARGEST)]
Positions = Annotated[int, Field(ge=0, le=LARGEST)]
Per = Literal["token", "channel"]
ScaleRule = Literal["floor", "ceil", "even", "rceil"]
RoundingMode = Literal["rne", "rna", "rtz", "stochastic"]


_FORMATS = ("weights", "activations", "attention", "cache", "cache_keys", "cache_values")
"""The keys of a rule that give a format."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Rule(_Strict):
    """Formats for the operations of the modules that `match` and `kind` choose; the first rule that matches wins."""

    match: Annotated[Word, AfterValidator(_known_pattern)] | None = Field(
        None, description="name of a module, glob, or `re:` and a regular expression; all if left out"
    )
    kind: Kinds | None = Field(None, description="kinds of operation; all but embedding if left out")
    keep: Literal["f32", "bf16", "f16"] | None = Field(None, description="leave these modules in this wide format")
    weights: Format | None = Field(None, description="format of the weights")
    activations: Format | None = Field(None, description="format of the other operands")
    attention: Format | None = Field(None, description="format of the operands of attention and of its probabilities")
    cache: Format | None = Field(None, description="format in which keys and values are cached")
    cache_keys: Format | None = Field(None, description="format of the cached keys, in place of cache")
    cache_values: Format | None = Field(None, description="format of the cached values, in place of cache")
    keys_per: Per | None = Field(None, description="what a scale of the keys stands for; token if left out")
    keys_wide: Positions | None = Field(None, description="how many of the newest keys stay wide; 0 if left out")
    keys_step: Positions | None = Field(None, description="how many keys are rounded at a time; a block's if left out")
    values_per: Per | None = Field(None, description="what a scale of the values stands for; token if left out")
    values_wide: Positions | None = Field(None, description="how many of the newest values stay wide; 0 if left out")
    values_step: Positions | None = Field(
        None, description="how many values are rounded at a time; a block's if left out"
    )
    scale_rule: ScaleRule | None = Field(None, description="how block scales are chosen; the recipe's if left out")
    rounding: RoundingMode | None = Field(None, description="how elements are rounded; the recipe's if left out")
    weight_threshold: float | None = Field(None, description="impact above which a block of a mixed weight is high")
    activation_threshold: float | None = Field(None, description="the same for mixed activations")

    @model_validator(mode="after")
    def _says_one_thing(self) -> Self:
        formats = [name for name in _FORMATS if getattr(self, name) is not None]
        if self.keep is None and not formats:
            raise ValueError("the rule has no effect: give it weights, activations, attention, cache or keep")
        if self.keep is not None and formats:
            raise ValueError(f"keep and {formats[0]} contradict each other: give one of them")
        _check_cache(self)
        return self

    def rounds_by_chance(self, recipe: Recipe) -> bool:
        """Whether the rule rounds stochastically, by its own word or the recipe's."""
        return (self.rounding or recipe.rounding) == "stochastic"

    def takes_scale_rule(self) -> bool:
        """Whether one of its formats has scales that a rule chooses."""
        given = (getattr(self, name) for name in _FORMATS)
        return any(takes_scale_rule(format_of(text)) for text in given if text is not None)

    def options(self, recipe: Recipe) -> dict[str, Any]:
        """The options of the pass `quantize`, with the recipe's scale rule, rounding and seed where they apply."""
        options = self.model_dump(exclude_none=True)
        if self.keep is None:
            scale_rule = recipe.scale_rule if self.takes_scale_rule() else None
            defaults = {"scale_rule": scale_rule, "rounding": recipe.rounding}
            options = {key: value for key, value in defaults.items() if value is not None} | options
        ordered = {key: options[key] for key in Rule.model_fields if key in options}
        return ordered | ({"seed": recipe.seed} if options.get("rounding") == "stochastic" else {})


class Calibrate(_Strict):
    """What passes that need data run the model on."""

    text: Word | None = Field(
        None,
        description="file of a text, or of JSON lines with text or input_ids (.jsonl), from the recipe's folder; "
        "without one a language model speaks from the seed, and any other model gets its example",
    )
    samples: Count = Field(128, ge=1, description="sequences that passes take where they do not say how many")
    length: Count = Field(512, ge=2, description="tokens of a sequence")
    seed: Count = Field(0, ge=0, description="seed of the choice of sequences")


class Evaluate(_Strict):
    """How the result is judged after compiling."""

    text: Word = Field(description="file of the text whose perplexity is measured, from the recipe's folder")
    against: Word | None = Field(
        None, description="the reference: `float`, the same model as it came, or a path from the recipe's folder"
    )
    context: Count = Field(512, ge=2, description="tokens of one window")
    limit: Count | None = Field(None, ge=1, description="number of windows; all if left out")


class Recipe(_Strict):
    """What to do to a model: rules that give formats, then passes."""

    version: Annotated[Literal[1], BeforeValidator(_one)] = Field(description="version of the recipe's form")
    quantize: list[Rule] = Field(default_factory=list, description="rules in order; the first that matches wins")
    scale_rule: ScaleRule | None = Field(None, description="how block scales are chosen; each format's own if left out")
    rounding: RoundingMode | None = Field(None, description="how elements are rounded; rne if left out")
    passes: list[Annotated[Word, AfterValidator(_known_passes)]] = Field(
        default_factory=list, description="passes that run after the rules, as pipeline strings"
    )
    calibration: Calibrate | None = Field(None, description="what passes that need data run the model on")
    evaluate: Evaluate | None = Field(None, description="how the result is judged")
    seed: Count = Field(0, ge=0, description="seed of stochastic rounding")

    @model_validator(mode="after")
    def _has_effect(self) -> Self:
        if not (self.quantize or self.passes or self.evaluate):
            raise ValueError("it has no effect: give it quantize, passes or evaluate")
        if self.calibration is not None and not self.passes:
            raise ValueError("calibration has no effect: there are no passes, and rules need no data")
        narrow = [rule for rule in self.quantize if rule.keep is None]
        for name in ("scale_rule", "rounding"):
            if getattr(self, name) is not None and all(getattr(rule, name) is not None for rule in narrow):
                raise ValueError(f"{name} has no effect: no rule in quantize is without one of its own")
        if self.scale_rule is not None and not any(r.takes_scale_rule() for r in narrow if r.scale_rule is None):
            raise ValueError("scale_rule has no effect: no format in quantize has power-of-two scales")
        if "seed" in self.model_fields_set and not any(rule.rounds_by_chance(self) for rule in narrow):
            raise ValueError("seed has no effect: nothing in quantize has rounding: stochastic")
        return self

    _path: Path | None = PrivateAttr(None)
    _lines: dict[Where, int] = PrivateAttr(default_factory=dict)

    @classmethod
    def from_file(cls, path: str | Path) -> Recipe:
        """Read a YAML file. Raises UsageError with file and line for everything that is wrong in it."""
        path = Path(path)
        if "\0" in str(path) or not path.name:
            raise UsageError(f"{shortened(repr(str(path)), 200)} is no file's name")
        try:
            if path.stat().st_size > SIZE_LIMIT:
                raise UsageError(f"{path}: a recipe has at most {SIZE_LIMIT} bytes")
            text = path.read_text("utf-8")
        except OSError as error:
            reason = mistaken(str(path)) or f"the recipe cannot be read: {error.strerror}"
            raise UsageError(f"{shortened(str(path), 200)}: {reason}") from error
        except UnicodeDecodeError as error:
            raise UsageError(f"{path}: the recipe is not UTF-8 text (byte {error.start})") from error
        return cls.from_text(text, path)

    @classmethod
    def from_text(cls, text: str, path: str | Path = "<recipe>") -> Recipe:
        """Read YAML text; `path` names it in errors."""
        reader = Reader(str(path))
        recipe = _validated(reader.read(text), str(path), reader.lines)
        recipe._path, recipe._lines = Path(path), reader.lines
        return recipe

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Recipe:
        """A recipe given in Python; `version` may be left out. Raises UsageError naming the key that is wrong."""
        return _validated({"version": 1, **values}, "recipe", {})

    @property
    def path(self) -> Path | None:
        """The file it was read from."""
        return self._path

    @property
    def calibration_line(self) -> int | None:
        """The line, from 1, of the key `calibration`; None where the recipe was given in Python."""
        return self._lines.get(("calibration",))

    def line_of(self, rule: int) -> int | None:
        """The line, from 1, of a rule, from 0; None where the recipe was given in Python."""
        return self._lines.get(("quantize", rule))

    def pipeline(self) -> str:
        """The passes that carry the recipe out: one `quantize{…}` per rule in order, then `passes`."""
        rules = [_spelled("quantize", rule.options(self)) for rule in self.quantize]
        return ",".join([*rules, *self.passes])

    def to_json(self) -> dict[str, Any]:
        """What was stated, as plain values: `Recipe.from_dict(recipe.to_json())` is the same recipe."""
        return {"version": 1, **self.model_dump(exclude_unset=True)}


def _spelled(name: str, options: dict[str, Any]) -> str:
    spelled = (f"{key}={','.join(map(quoted, _listed(value)))}" for key, value in options.items())
    return f"{name}{{{' '.join(spelled)}}}"


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _validated(values: Any, name: str, lines: dict[Where, int]) -> Recipe:
    if not isinstance(values, dict):
        raise UsageError(f"{name}: a recipe is a mapping that begins with `version: 1`")
    if (where := _null(values)) is not None:
        line = f":{lines[where]}" if where in lines else ""
        raise UsageError(f"{name}{line}: {spoken(where)} has no value: give it one or leave the key out")
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        raise UsageError(explained(error, Recipe, name, lines)) from error


def _null(value: Any, where: Where = ()) -> Where | None:
    """The way to the first value that is null."""
    if value is None:
        return where
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return next((found for key, part in inner if (found := _null(part, (*where, key))) is not None), None)
