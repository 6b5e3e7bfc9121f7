"""Recipes: every key has an effect, and whatever is wrong is named with its line."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from mxloom import MxloomError, compile
from mxloom.compiler.pipeline import parse_passes
from mxloom.compiler.recipe import Recipe, Rule
from mxloom.compiler.recipe_text import SIZE_LIMIT
from mxloom.dialects.errors import UsageError
from mxloom.passes.quantize import matches

RECIPES = sorted((Path(__file__).parents[2] / "examples" / "recipes").glob("*.yaml"))

EXAMPLE = r"""# comment
version: 1
quantize:
  - {match: "*.lm_head", keep: bf16}
  - match: 're:layers\.(0|27)\."q"'
    kind: [linear, conv]
    weights: mxint8
    rounding: rna
  - {weights: mxfp4, activations: mxint8}
scale_rule: even
passes: ["pack", "quantize{attention=mxint8}"]
"""


def message(text: str) -> str:
    with pytest.raises(MxloomError) as caught:
        Recipe.from_text(text, "r.yaml")
    assert caught.value.exit_status == 2
    return str(caught.value)


def test_rules_become_passes_in_order() -> None:
    assert Recipe.from_text(EXAMPLE).pipeline() == (
        'quantize{match="*.lm_head" keep=bf16},'
        r'quantize{match="re:layers\\.(0|27)\\.\"q\"" kind=linear,conv weights=mxint8 scale_rule=even rounding=rna},'
        "quantize{weights=mxfp4 activations=mxint8 scale_rule=even},"
        "pack,quantize{attention=mxint8}"
    )


def test_the_pipeline_parses_into_what_the_rules_say() -> None:
    keep, pattern, rest, _, attention = parse_passes(Recipe.from_text(EXAMPLE).pipeline())
    assert vars(keep)["match"] == "*.lm_head"
    assert vars(pattern)["match"] == r're:layers\.(0|27)\."q"'
    assert vars(pattern)["kind"] == ("linear", "conv")
    assert vars(pattern)["rounding"] == "rna"
    assert vars(rest)["scale_rule"] == "even"
    assert vars(attention)["attention"] == "mxint8"


def test_a_rule_s_own_scale_rule_and_rounding_go_before_the_recipe_s() -> None:
    rules = [{"weights": "mxfp4", "scale_rule": "ceil"}, {"weights": "mxfp4", "rounding": "rtz"}, {"keep": "f32"}]
    recipe = Recipe.from_dict({"quantize": rules, "scale_rule": "floor", "rounding": "rna"})
    assert recipe.pipeline() == (
        "quantize{weights=mxfp4 scale_rule=ceil rounding=rna},"
        "quantize{weights=mxfp4 scale_rule=floor rounding=rtz},"
        "quantize{keep=f32}"
    )


def test_the_seed_reaches_stochastic_rounding() -> None:
    recipe = Recipe.from_dict({"quantize": [{"weights": "mxfp4", "rounding": "stochastic"}], "seed": 7})
    assert recipe.pipeline() == "quantize{weights=mxfp4 rounding=stochastic seed=7}"
    (rounding,) = parse_passes(recipe.pipeline())
    assert vars(rounding)["seed"] == 7


def test_types_in_full_stand_in_quotes() -> None:
    recipe = Recipe.from_dict({"quantize": [{"weights": "!mx.block<16xf4E2M1FN, f8E4M3FN, f32>"}]})
    assert recipe.pipeline() == 'quantize{weights="!mx.block<16xf4E2M1FN, f8E4M3FN, f32>"}'


def test_lines_of_rules() -> None:
    recipe = Recipe.from_text(EXAMPLE, "r.yaml")
    assert [recipe.line_of(rule) for rule in range(3)] == [4, 5, 9]
    assert recipe.path == Path("r.yaml")
    assert Recipe.from_dict({"quantize": [{"weights": "mxfp4"}]}).line_of(0) is None


def test_plain_values_and_back() -> None:
    recipe = Recipe.from_text(EXAMPLE)
    again = Recipe.from_dict(recipe.to_json())
    assert again.pipeline() == recipe.pipeline()
    assert again.to_json() == recipe.to_json()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("version: 1\nscale-rule: even", 'r.yaml:2: unknown key "scale-rule" (did you mean "scale_rule"?); known: '),
        (
            "version: 1\nquantize:\n- {wieghts: mxfp4}",
            'r.yaml:3: unknown key "wieghts" in quantize rule 1 (did you mean',
        ),
        ("version: 1\nquantize:\n- weights: mxfp4\n- weights: mxfp5", "r.yaml:4: quantize rule 2, weights: "),
        ("version: 1\nquantize:\n- weights: mxfp5", '(did you mean "mxfp4"?)'),
        ("version: 1\nquantize:\n- match: x", "r.yaml:3: quantize rule 1: the rule has no effect"),
        ("version: 1\nquantize:\n- {keep: bf16, weights: mxfp4}", "keep and weights contradict each other"),
        ("version: 1\nquantize:\n- {keep: mxfp4}", "r.yaml:3: quantize rule 1, keep: got 'mxfp4'"),
        ("version: 1\nquantize:\n- {weights: mxfp4, kind: liner}", "kind 1: got 'liner' (did you mean \"linear\"?)"),
        ("version: 1\nquantize:\n- {weights: false}", "weights: it should be a valid string, got False"),
        ("version: true", "r.yaml:1: version: got True; known: 1"),
        ("version: 1.0", "r.yaml:1: version: got 1.0; known: 1"),
        ("version: 1\nquantize:\n- weights: mxfp4\n  match: 're:('", "r.yaml:4: quantize rule 1, match: match 're:('"),
        ("version: 1\nquantize:\n- {weights: mxfp4, match: 're:(?!x)'}", "look-around, including look-ahead"),
        ("version: 1\nquantize:\n- {weights: mxfp4, match: null}", "r.yaml:3: quantize rule 1, match has no value"),
        ("version: 1\nquantize:", "r.yaml:2: quantize has no value: give it one or leave the key out"),
        ("version: 1\nquantize:\n- {weights: mxfp4, kind: [conv, conv]}", "kind: conv stands here more than once"),
        ("version: 1\nquantize:\n- {weights: mxfp4, kind: []}", "kind: "),
        ("version: 1\nquantize: []", "r.yaml:1: the recipe: it has no effect: give it quantize, passes or evaluate"),
        ("version: 1\nquantize: [{weights: mxfp4}]\nseed: 3", "seed has no effect"),
        ("version: 1\nquantize: [{weights: mxfp4, rounding: rna}]\nrounding: rtz", "rounding has no effect"),
        ("version: 1\nquantize: [{keep: bf16}]\nscale_rule: even", "scale_rule has no effect"),
        (f"version: 1\nquantize: [{{weights: mxfp4, rounding: stochastic}}]\nseed: {2**63}", "r.yaml:3: seed: "),
        (f"version: 1\nevaluate: {{text: t, context: {2**63}}}", "evaluate, context: "),
        ("version: 1\nquantize: 3", "r.yaml:2: quantize: it should be a valid list, got 3"),
        ("version: 1\nscale_rule: evn", "r.yaml:2: scale_rule: got 'evn' (did you mean \"even\"?)"),
        ("version: 1\nrounding: up", "known: rne, rna, rtz, stochastic"),
        ("version: 1\npasses:\n- pack\n- pakc", 'r.yaml:4: passes 2: there is no pass "pakc" (did you mean "pack"?)'),
        ("version: 1\npasses: ['quantize{weihgts=x}']", 'has no option "weihgts" (did you mean "weights"?)'),
        ("version: 1\npasses:\n- accumulate{format=e5m10}", 'r.yaml:3: passes 1: no accumulator is called "e5m10"'),
        ("version: 1\npasses: ['accumulate{partials=0}']", "at least one partial sum, got 0"),
        ("version: 1\nevaluate: {context: 8}", 'r.yaml:2: "text" is missing in evaluate'),
        ("version: 1\nevaluate: {text: t, contxt: 8}", 'unknown key "contxt" in evaluate (did you mean "context"?)'),
        ("version: 1\nevaluate: {text: t, limit: 0}", "evaluate, limit: "),
        ("version: 1\nsearch: {metric: fisher}", 'r.yaml:2: "search" is not available in this version'),
        ("version: 1\npasses: [calibrate]\ncalibration: {txt: t}", 'r.yaml:3: unknown key "txt" in calibration'),
        ("version: 1\npasses: [calibrate]\ncalibration: {length: 1}", "r.yaml:3: calibration, length: "),
        ("version: 1\nquantize: [{weights: mxfp4}]\ncalibration: {}", "calibration has no effect: there are no passes"),
        ("version: 1\ncost: {}", '"cost" is not available in this version'),
        ("quantize: []", '"version" is missing'),
        ("version: 2", "r.yaml:1: version: got 2; known: 1"),
        ("- 1", "a recipe is a mapping"),
        ("", "a recipe is a mapping"),
    ],
)
def test_what_is_wrong_is_named_with_its_line(text: str, expected: str) -> None:
    assert expected in message(text)


@pytest.mark.parametrize(
    "value", ["yes", "No", "on", "0x1", "0o1", "0b1", "010", "1_0", "1:30", "+1", ".inf", ".NaN", "1."]
)
def test_what_yaml_readers_take_for_different_values_is_refused(value: str) -> None:
    """YAML 1.1 (types bool, int, float) and the core schema of YAML 1.2 (section 10.3.2) read these differently."""
    assert "r.yaml:2: " in message(f"version: 1\nseed: {value}")


def test_null_is_refused_in_a_dictionary_too() -> None:
    with pytest.raises(MxloomError, match=r"^recipe: quantize rule 1, kind has no value"):
        Recipe.from_dict({"quantize": [{"weights": "mxfp4", "kind": None}]})


@pytest.mark.parametrize(
    ("name", "known"),
    [("canonicalize", True), ("mlir-opt", False), ("transform-interpreter", False), ("apply-pdl", True)],
)
def test_a_recipe_names_no_pass_of_xdsl(name: str, known: bool) -> None:
    where = " here: mxloom-opt has it, from an xDSL universe" if known else ""
    assert f'r.yaml:2: passes 1: there is no pass "{name}"{where}' in message(f"version: 1\npasses: [{name}]")


def test_no_regular_expression_takes_long() -> None:
    """Backtracking would take 2^40 steps here."""
    rule = Rule.model_validate({"match": r"re:^(a+)+$", "weights": "mxfp4"})
    assert rule.match is not None
    assert not matches(rule.match, "a" * 100_000 + "!")


@pytest.mark.parametrize(
    "pattern", [r"layers\.(0|27)\.", r"^model\..*\.(q|k|v)_proj$", r"(?i)MLP", r"[^.]+_head$", r"\d{2}"]
)
def test_regular_expressions_match_as_python_s(pattern: str) -> None:
    modules = [f"model.layers.{n}.{part}" for n in (0, 3, 27) for part in ("self_attn.q_proj", "mlp.up_proj", "mlp")]
    for module in [*modules, "lm_head", "model.lm_head"]:
        assert matches(f"re:{pattern}", module) == bool(re.search(pattern, module))


def test_several_faults_come_in_the_order_of_the_file() -> None:
    lines = message("version: 1\nquantize:\n- {weigths: a}\n- {}\nseed: -1").splitlines()
    assert [line.split(" ")[0] for line in lines] == ["r.yaml:3:", "r.yaml:4:", "r.yaml:5:"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a: &x 1\nb: *x", "r.yaml:1: anchors and aliases"),
        ("version: 1\nseed: !!int 3", "r.yaml:2: tags (tag:yaml.org,2002:int) are not allowed"),
        ("version: !!python/object/apply:os.system ['true']", "r.yaml:1: tags"),
        ("version: 1\nversion: 1", 'r.yaml:2: the key "version" stands here a second time'),
        ("version: 1\n---\nversion: 1", "r.yaml:2: a recipe is one document"),
        ("version: 1\n? [a]\n: 2", "r.yaml:2: a key must be text"),
        ("version: [1", "r.yaml:2: this is not YAML"),
        ("version: 1\n\tx: 1", "r.yaml:2: this is not YAML"),
        ("version: \x00", "r.yaml: this is not YAML"),
        ("version: " + "9" * 5000, "is no number that can be read"),
        ("version: " + "[" * 100_000, "r.yaml:1: "),
        ("version: 1\nquantize: " + "[" * 50 + "]" * 50, "r.yaml:2: "),
        ("version: 1\nquantize:\n" + "- {weights: 3}\n" * 50_000, "r.yaml:5001: a recipe has at most 10000 values"),
        ("version: 1 #" + "x" * SIZE_LIMIT, "at most 1048576 bytes"),
    ],
)
def test_hostile_text_is_refused(text: str, expected: str) -> None:
    assert expected in message(text)


@pytest.mark.parametrize("content", [None, b"version: \xff"])
def test_a_file_that_cannot_be_read(content: bytes | None, tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(MxloomError, match=r"r\.yaml: the recipe (cannot be read: No such file|is not UTF-8)"):
        Recipe.from_file(file)


@pytest.mark.parametrize("values", [{"quantise": []}, {"quantize": [{"wieghts": "mxfp4"}]}])
def test_a_dictionary_is_checked_as_a_file_is(values: dict[str, Any]) -> None:
    with pytest.raises(MxloomError, match=r"^recipe: unknown key .*did you mean"):
        Recipe.from_dict(values)


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.stem)
def test_the_recipes_in_examples_are_right(file: Path) -> None:
    assert parse_passes(Recipe.from_file(file).pipeline())


def test_the_schema_refuses_unknown_keys() -> None:
    schema = Recipe.model_json_schema()
    assert schema["additionalProperties"] is False
    keys = {"version", "quantize", "scale_rule", "rounding", "passes", "calibration", "evaluate", "seed"}
    assert set(schema["properties"]) == keys
    assert all(part["additionalProperties"] is False for part in schema["$defs"].values())


PIPELINES = [
    "quantize{weights=mxfp4 activations=mxint8}",
    "pack",
    "quantize,pack",
    'quantize{match="a"}' + ",pack" * 100,
]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        *((pipeline, r"a pipeline of passes, not a recipe's file: .*`passes: \[PIPELINE\]`") for pipeline in PIPELINES),
        ("version: 1\nquantize: []\n", "a recipe's text, not its file"),
        ("quantize: [{weights: mxfp4}]", "a recipe's text, not its file"),
        ("mxfp4", 'a format, not a recipe\'s file: give weights="mxfp4"'),
        ("packed.yaml", "the recipe cannot be read: No such file"),
        ("x" * 300, "the recipe cannot be read: File name too long"),
    ],
)
def test_what_was_meant_by_a_text_that_names_no_file(text: str, said: str) -> None:
    with pytest.raises(UsageError, match=said) as caught:
        compile(torch.nn.Linear(2, 2), text, example={"input": torch.zeros(2, 2)})
    assert len(str(caught.value)) < 500


def test_a_file_named_as_a_pass_is_a_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("quantize").write_text("version: 1\npasses: [pack]\n")
    assert Recipe.from_file("quantize").pipeline() == "pack"


def test_the_pipeline_of_a_run_repeats_it() -> None:
    """As a recipe of one pass string: the same module, operation by operation, and the same numbers."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.ReLU(), torch.nn.Linear(32, 32))
    x = torch.randn(4, 64)
    rules = [
        {"match": "0", "weights": "mxfp4", "activations": "mxint8", "rounding": "stochastic"},
        {"match": "re:^2$", "weights": "nvfp4"},
    ]
    first = compile(model, {"quantize": rules, "seed": 7}, example={"input": x})
    again = compile(model, {"passes": [first.provenance["pipeline"]]}, example={"input": x})
    assert str(again.module) == str(first.module)
    assert again.provenance["pipeline"] == first.provenance["pipeline"]
    assert torch.equal(again(x), first(x))


def test_a_recipe_s_scale_rule_leaves_formats_with_float_scales_alone() -> None:
    rules = [{"match": "0", "weights": "mxfp4"}, {"weights": "nvfp4", "activations": "int8_tensor"}]
    recipe = Recipe.from_dict({"quantize": rules, "scale_rule": "floor"})
    first, second = recipe.quantize
    assert first.options(recipe) == {"match": "0", "weights": "mxfp4", "scale_rule": "floor"}
    assert second.options(recipe) == {"weights": "nvfp4", "activations": "int8_tensor"}


def test_a_recipe_s_scale_rule_that_no_format_takes_is_refused() -> None:
    with pytest.raises(UsageError, match="scale_rule has no effect: no format in quantize has power-of-two scales"):
        Recipe.from_dict({"quantize": [{"weights": "nvfp4"}], "scale_rule": "floor"})


@pytest.mark.parametrize("threshold", [1e-5, 1e-7, 2.5e-9, 0.25, 1.0, 1e20, 3e-38])
def test_numbers_of_any_size_reach_the_pass(threshold: float) -> None:
    """Python writes 1e-05, a pipeline reads an exponent behind a point only."""
    rule = {"weights": "fgmp", "weight_threshold": threshold}
    (step,) = parse_passes(Recipe.from_dict({"quantize": [rule]}).pipeline())
    assert vars(step)["weight_threshold"] == threshold
