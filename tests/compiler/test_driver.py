"""`mxloom.compile`: recipes, errors with file and line, and the pipeline string that repeats a run."""

# Operations are looked up by name, so their fields are not known to the type checker.
# pyright: reportAttributeAccessIssue=false, reportOptionalMemberAccess=false, reportArgumentType=false
# pyright: reportCallIssue=false, reportIndexIssue=false

import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from mxloom.compiler.driver import compile, run_pipeline
from mxloom.compiler.evaluation import evaluate
from mxloom.dialects.errors import MxloomError, UsageError


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.language_model = nn.ModuleDict({"lm_head": nn.Linear(64, 32), "first": nn.Linear(64, 64)})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.language_model["lm_head"](torch.relu(self.language_model["first"](x)))


def example() -> dict[str, torch.Tensor]:
    return {"x": torch.randn(3, 64, generator=torch.Generator().manual_seed(0))}


def test_a_rule_that_matches_nothing_names_the_line_and_the_nearest_module(tmp_path: Path):
    """Field case C1."""
    recipe = tmp_path / "r.yaml"
    recipe.write_text("version: 1\nquantize:\n  - {match: lm_head, keep: bf16}\n  - {weights: mxfp4}\n")
    with pytest.raises(UsageError) as caught:
        compile(Model(), recipe, example=example())
    assert str(caught.value) == (
        f"{recipe}:3: 'lm_head' matches 0 of 2 modules (did you mean \"language_model.lm_head\"?)"
    )
    assert caught.value.exit_status == 2


def test_a_regular_expression_that_matches_passes_in_silence(tmp_path: Path):
    recipe = tmp_path / "r.yaml"
    recipe.write_text("version: 1\nquantize:\n  - {match: 're:.*head', keep: bf16}\n  - {weights: mxfp4}\n")
    assert len(list(compile(Model(), recipe, example=example()).function.walk())) > 0


def test_the_pipeline_string_repeats_the_run():
    rules = [{"match": "re:lm\\.?_head$", "weights": "nvfp4"}, {"weights": "mxfp4", "activations": "mxint8"}]
    torch.manual_seed(0)
    model = Model()
    first = compile(model, {"version": 1, "quantize": rules}, example=example())
    again = compile(model, example=example())
    run_pipeline(again.module, again.weights, first.pipeline)
    assert str(again.module) == str(first.module)


def test_the_compiled_module_is_called_like_the_model():
    torch.manual_seed(0)
    model = Model().eval()
    wide = compile(model, example=example())
    x = torch.randn(5, 64)
    with torch.no_grad():
        assert torch.equal(wide(x), model(x))
        assert torch.equal(wide(x=x), model(x))


def test_a_model_in_training_is_captured_as_it_evaluates_and_left_as_it_was():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 32), nn.BatchNorm1d(32), nn.Dropout(0.5)).train()
    model[2].eval()
    x = torch.randn(6, 64)
    model(x)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    wide = compile(model, example={"input": torch.randn(3, 64)})
    assert [part.training for part in model] == [True, True, False]
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    with torch.no_grad():
        assert torch.equal(wide(x), model.eval()(x))


def test_example_inputs_that_are_no_dictionary_are_refused():
    with pytest.raises(UsageError, match="example is a Tensor; give a dictionary"):
        compile(Model(), weights="mxfp4", example=torch.ones(2, 64))


def test_a_wrong_input_is_named():
    wide = compile(Model(), example=example())
    with pytest.raises(UsageError, match="unknown input 'y'; its inputs are x"):
        wide(y=torch.ones(2, 64))
    with pytest.raises(UsageError, match="input 'x' is missing"):
        wide()


@pytest.mark.parametrize("format", ["", "f64", "i8", 5])
def test_what_is_no_format_is_refused(format: Any):
    for formats in ({"weights": format}, {"weights": "mxfp4", "activations": format}):
        with pytest.raises(UsageError, match=r"format|weights|activations"):
            compile(Model(), **formats, example=example())


def test_recipe_and_formats_exclude_each_other():
    with pytest.raises(UsageError, match="exclude each other"):
        compile(Model(), {"version": 1, "quantize": []}, weights="mxfp4", example=example())


class Experts(nn.Module):
    """Attention 4 x [64, 64], and four experts as bare parameters [E, in, out] (field case E1)."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value, self.out = (nn.Linear(64, 64, bias=False) for _ in range(4))
        self.gate_up = nn.Parameter(torch.randn(4, 64, 64) * 0.1)
        self.down = nn.Parameter(torch.randn(4, 32, 64) * 0.1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scores = torch.softmax(self.query(x) @ self.key(x).transpose(-1, -2), -1)
        x = self.out(scores @ self.value(x))
        gate, up = (x.unsqueeze(1) @ self.gate_up).chunk(2, -1)
        return ((torch.nn.functional.silu(gate) * up) @ self.down).sum(1)


def test_experts_in_bare_three_dimensional_parameters_are_quantized_along_their_input():
    torch.manual_seed(0)
    compiled = compile(Experts(), weights="mxfp4", example={"x": torch.randn(2, 6, 64)})
    total = compiled.cost(batch=2, sequence=6)
    assert total.parameters == 40_960
    assert {t.format for t in total.tensors} == {"mxfp4"}
    assert total.weight_bits == 4.25
    types = {str(op.result.type.element_type) for op in compiled.packed()[0].walk() if op.name == "mx.parameter"}
    assert types == {"!mx.block<32xf4E2M1FN>", "!mx.block<32x1xf4E2M1FN>"}


def test_a_weight_that_is_not_finite_is_named():
    model = Model()
    with torch.no_grad():
        model.language_model["first"].weight[3, 5] = torch.inf
    with pytest.raises(MxloomError, match=r"language_model.first.weight: 1 of 4096 values are NaN or infinite"):
        compile(model, weights="mxfp4", example=example())


def test_costs_of_a_model_with_a_short_table_of_positions():
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=64, n_positions=32, n_embd=32, n_layer=1, n_head=2, bos_token_id=1, eos_token_id=2)
    compiled = compile(GPT2LMHeadModel(config), weights="mxfp4")
    assert compiled.cost().inputs[0] == (1, 32)


@pytest.mark.parametrize(
    ("example", "message"),
    [
        (
            {"x": torch.zeros(2, 63)},
            r"Model does not run on the example: RuntimeError: mat1 and mat2 .*\n.*\n.*x \[2, 63\]",
        ),
        ({"y": torch.zeros(2, 64)}, r"the example has 'y', which is no argument of its forward; these are: x"),
        ({"x": 3}, r"the example's 'x' is a int; every input is a tensor"),
        ({"x": torch.zeros(1, 64)}, r"the example x has size 1 in dimension 0"),
    ],
)
def test_an_example_that_the_model_does_not_take_is_named(example: dict, message: str, capfd: pytest.CaptureFixture):
    with pytest.raises(MxloomError, match=message):
        compile(Model(), weights="mxfp4", example=example)
    assert capfd.readouterr().err == ""


def test_inputs_in_the_place_of_the_recipe_are_told_where_to_go():
    with pytest.raises(UsageError, match=r"a recipe is a Tensor; .*example=\{"):
        compile(Model(), torch.zeros(2, 64))  # pyright: ignore[reportArgumentType]


DEMO = Path(__file__).parents[2] / "examples/models/kjv-2m"


def test_evaluate_in_a_recipe_measures_against_the_model_as_it_came():
    wanted = {"text": str(DEMO / "held_out.txt"), "context": 32, "limit": 2, "against": "float"}
    compiled = compile(DEMO, {"quantize": [{"weights": "mxint8"}], "evaluate": wanted})
    assert compiled.evaluation == evaluate(compiled, DEMO / "held_out.txt", context=32, limit=2, against=DEMO)
    figures = compiled.report()["evaluation"]
    assert figures["text_sha256"] == hashlib.sha256((DEMO / "held_out.txt").read_bytes()).hexdigest()
    assert figures["against"]["reference"] == "kjv-2m"


def test_a_tied_weight_in_two_formats_is_noted():
    rules = [{"kind": "embedding", "weights": "mxint8"}, {"weights": "mxfp4"}]
    assert compile(DEMO, {"quantize": rules}).report()["notes"] == [
        "model.embed_tokens.weight is stored 2 times, as mxfp4 and mxint8: its uses read it in different formats"
    ]
    assert compile(DEMO, weights="mxfp4").notes() == [
        "model.embed_tokens.weight is stored 2 times, as mxfp4 and bf16: its uses read it in different formats"
    ]


def test_a_compilation_prints_as_one_line():
    assert repr(compile(DEMO, weights="mxfp4")) == "<Compiled kjv-2m (causal-lm): quantize{weights=mxfp4}>"
