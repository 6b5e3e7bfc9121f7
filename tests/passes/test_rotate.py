"""`rotate`: the function stays what it was, one rotation for all readers, everything else runs rotated modules."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from xdsl.dialects.builtin import ModuleOp

from mxloom.backends.reference import Interpreter
from mxloom.backends.weight_store import WeightStore
from mxloom.compiler.artefact import load, save
from mxloom.compiler.compiled import Compiled
from mxloom.compiler.driver import compile, import_source
from mxloom.compiler.model_source import ModelSource, open_model
from mxloom.dialects.errors import MxloomError, UsageError
from mxloom.dialects.hadamard import hadamard
from mxloom.dialects.mx import parse_module
from mxloom.dialects.operations.contraction import LinearOp
from mxloom.dialects.operations.hadamard import HadamardOp
from mxloom.passes._context import CompileContext
from mxloom.passes._sites import module_name, sites
from mxloom.passes.rotate import Rotate

SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "max_position_embeddings": 32,
}
GROUPED: dict[str, Any] = SIZES | {"num_key_value_heads": 1, "head_dim": 16}
GPT2: dict[str, Any] = {"vocab_size": 64, "n_embd": 48, "n_layer": 2, "n_head": 3, "n_positions": 32}

MODELS: dict[str, Callable[[], torch.nn.Module]] = {
    "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**GROUPED)),
    "tied": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**GROUPED, tie_word_embeddings=True)),
    "qwen2": lambda: transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**SIZES, num_key_value_heads=1)),
    "qwen3": lambda: transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**GROUPED, tie_word_embeddings=True)),
    "gemma": lambda: transformers.GemmaForCausalLM(transformers.GemmaConfig(**GROUPED)),
    "mixtral": lambda: transformers.MixtralForCausalLM(transformers.MixtralConfig(**GROUPED, num_local_experts=3)),
    "gpt2": lambda: transformers.GPT2LMHeadModel(transformers.GPT2Config(**GPT2, bos_token_id=1, eos_token_id=2)),
    "bert": lambda: transformers.BertForSequenceClassification(transformers.BertConfig(**SIZES)),
}
SLOW = ("tied", "qwen2", "gemma", "mixtral")
"""What differs little from the others."""

FUSED = ("llama", "tied", "qwen2", "qwen3", "gemma", "mixtral", "bert")
"""What has streams between root mean square norms, or values that attention mixes."""


def some(names: Iterable[str]) -> list[Any]:
    return [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in names]


_models: dict[str, torch.nn.Module] = {}
_sources: dict[str, ModelSource] = {}


def model(name: str) -> torch.nn.Module:
    """A small model whose norms have gains and whose layers have biases that differ from number to number."""
    if name not in _models:
        torch.manual_seed(0)
        made = MODELS[name]().eval()
        with torch.no_grad():
            for parameter in made.parameters():
                if parameter.ndim == 1:
                    parameter += 0.3 * torch.randn_like(parameter)
        _models[name] = made
    return _models[name]


def source(name: str) -> ModelSource:
    if name not in _sources:
        _sources[name] = open_model(model(name))
    return _sources[name]


def example(name: str) -> dict[str, torch.Tensor]:
    ids = torch.randint(3, 64, (2, 7), generator=torch.Generator().manual_seed(2))
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return given | ({"token_type_ids": torch.zeros_like(ids)} if name == "bert" else {})


def inputs(name: str) -> list[torch.Tensor]:
    function: Any = next(iter(import_source(source(name)).body.block.ops))
    return [example(name)[argument.name_hint] for argument in function.body.block.args]


def rotated(name: str, *passes: Rotate) -> tuple[ModuleOp, WeightStore, list[str]]:
    module, weights = import_source(source(name)).clone(), source(name).weights.copy()
    context = CompileContext(weights=weights)
    for each in passes:
        each.apply(context, module)
    module.verify()
    return module, weights, context.notes


def distance(name: str, module: ModuleOp, weights: WeightStore) -> float:
    """The relative distance of the outputs to those of the model itself, as torch runs it."""
    with torch.no_grad():
        wanted = model(name)(**example(name)).logits
    (found,) = Interpreter(module, weights)(*inputs(name))
    return float((found - wanted).norm() / wanted.norm())


def rotations(module: ModuleOp) -> list[str]:
    return [op.result.name_hint or "" for op in module.walk() if isinstance(op, HadamardOp)]


@pytest.mark.parametrize("options", [{"size": 16}, {"size": 48, "random": 3, "attention": False}, {"size": "full"}])
@pytest.mark.parametrize("name", some(MODELS))
def test_the_function_is_preserved(name: str, options: dict[str, Any]) -> None:
    """48 = 12 x 4 and 96 = 12 x 8 are no powers of two."""
    module, weights, _ = rotated(name, Rotate(**options))
    assert distance(name, module, weights) < 1e-5
    assert rotations(module)
    for op in module.walk():
        if isinstance(op, LinearOp):
            assert isinstance(op.input.owner, HadamardOp)


@pytest.mark.parametrize("options", [{"size": 16}, {"size": 8, "random": 1, "attention": True}])
@pytest.mark.parametrize("name", some(FUSED))
def test_the_function_is_preserved_by_fused_rotations(name: str, options: dict[str, Any]) -> None:
    module, weights, notes = rotated(name, Rotate(fuse=True, **options))
    assert distance(name, module, weights) < 1e-5
    assert "layers read what is rotated already" in notes[-1]
    if name != "bert" and "attention" not in options:
        assert all("mlp" in value for value in rotations(module)), "only what activation functions yield is left"


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
def test_weights_are_rotated_as_the_definition_says(name: str) -> None:
    module, weights, _ = rotated(name, Rotate(size=16, random=5))
    for op in (op for op in module.walk() if isinstance(op, LinearOp)):
        owner: Any = op.weight.owner
        own = owner.source.data
        old = source(name).weights.wide(own.removesuffix(".rotated")).double()
        along = 0 if op.transposed is not None else 1
        assert torch.equal(weights.wide(own), hadamard(old, 16, along, 5).float())


def test_what_reads_one_value_shares_one_rotation() -> None:
    module, _, _ = rotated("llama", Rotate(size=16))
    layer = [value for value in rotations(module) if "layers.0" in value]
    assert layer == [
        f"model.layers.0.{value}.rotated"
        for value in ("input_layernorm", "self_attn.view.3", "post_attention_layernorm", "mlp.mul")
    ]


def test_a_tied_embedding_keeps_its_values_beside_the_head() -> None:
    module, weights, _ = rotated("qwen3", Rotate(size=16))
    own = "model.embed_tokens.weight"
    assert torch.equal(weights.wide(own), source("qwen3").weights.wide(own))
    assert torch.equal(weights.wide("lm_head.weight"), source("qwen3").weights.wide(own))
    assert torch.equal(weights.wide(f"{own}.rotated"), hadamard(weights.wide(own).double(), 16).float())
    assert weights.canonical("lm_head.weight") == own
    assert str(module).count(f'"{own}.rotated"') == 1


def test_fused_gains_are_folded() -> None:
    """Gemma's norms compute 1 + weight (field case P2): the gain that readers take over is that, and 0 is left."""
    for name, left in (("llama", 1.0), ("gemma", 0.0)):
        _, weights, _ = rotated(name, Rotate(size=16, fuse=True))
        old = source(name).weights
        norm, layer = "model.layers.1.input_layernorm.weight", "model.layers.1.self_attn.q_proj.weight"
        gain = old.wide(norm).double() + (1.0 - left)
        assert weights.wide(norm).unique().tolist() == [left]
        wanted = hadamard(old.wide(layer).double() * gain, 16)
        assert torch.allclose(weights.wide(layer).double(), wanted, rtol=1e-6, atol=1e-7)


def test_casts_stand_behind_rotations() -> None:
    """Before or after `quantize`, the same module: rotated, then rounded."""
    rule: dict[str, Any] = {"weights": "mxfp4", "activations": "mxfp4", "attention": "mxint8", "cache": "mxfp8_e4m3"}
    after = compile(model("llama"), {"quantize": [rule], "passes": ["rotate{size=16 attention=true}"]})
    order = [op.name for op in after.module.walk()]
    assert order.count("mx.hadamard") == 13
    for site in sites(after.module):
        if site.role == "activation" or site.name.endswith((".query", ".key")):
            owner: Any = site.value.owner
            while owner.name == "mx.cast":
                owner = owner.input.owner
            assert owner.name == "mx.hadamard", site.name
    before, weights, _ = rotated("llama", Rotate(size=16, attention=True))
    from mxloom.passes.quantize import Quantize

    Quantize(**rule).apply(CompileContext(), before)
    (found,) = Interpreter(before, weights)(*inputs("llama"))
    assert torch.equal(found, after(*inputs("llama")).logits)


QUANTIZED: list[dict[str, Any]] = [
    {"match": "lm_head", "weights": "int8_channel", "activations": "int8_channel"},
    {"weights": "mxfp4", "activations": "mxint8", "attention": "mxint8", "cache": "mxfp8_e4m3"},
]


def compiled(name: str, *passes: str) -> Compiled:
    return compile(model(name), {"quantize": QUANTIZED, "passes": list(passes)})


PIPELINES = ["rotate{size=16 attention=true}", "rotate{size=16 fuse=true random=1}"]


@pytest.mark.parametrize("pipeline", PIPELINES)
@pytest.mark.parametrize("name", some(["llama", "tied", "qwen3"]))
def test_hugging_face_models_compute_and_generate_as_the_rotated_module(name: str, pipeline: str) -> None:
    own = compiled(name, pipeline)
    ids, mask = inputs(name)
    found = own.to_hf()
    with torch.no_grad():
        logits = found(input_ids=ids, attention_mask=mask, use_cache=False).logits
    assert torch.equal(logits, own(input_ids=ids, attention_mask=mask).logits)
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    produced = found.generate(ids, attention_mask=mask, use_cache=True, **options)
    for _ in range(4):
        following = own(input_ids=ids, attention_mask=mask).logits[:, -1].argmax(-1, keepdim=True)
        ids, mask = torch.cat([ids, following], 1), torch.cat([mask, torch.ones_like(following)], 1)
    assert torch.equal(produced, ids)


@pytest.mark.parametrize("pipeline", ["rotate{size=16}", "rotate{size=16 fuse=true}"])
def test_hugging_face_models_without_formats_are_rotated_too(pipeline: str) -> None:
    own = compile(model("qwen3"), {"passes": [pipeline]})
    given = example("qwen3")
    with torch.no_grad():
        assert torch.equal(own.to_hf()(**given).logits, own(**given).logits)


def test_exact_sums_read_rotated_codes() -> None:
    own = compiled("llama", "rotate{size=16}", "accumulate")
    wanted = own(*inputs("llama")).logits
    assert torch.equal(Interpreter(own.module, own.weights)(*inputs("llama"))[0], wanted)
    with torch.no_grad():
        assert torch.equal(own.to_hf()(**example("llama")).logits, wanted)


@pytest.mark.parametrize("pipeline", PIPELINES)
@pytest.mark.parametrize("name", some(["qwen3", "tied"]))
def test_artefacts_hold_rotated_models(name: str, pipeline: str, tmp_path: Path) -> None:
    model(name).save_pretrained(tmp_path / "own")  # pyright: ignore[reportCallIssue]
    own = compile(tmp_path / "own", {"quantize": QUANTIZED, "passes": [pipeline]})
    again = load(save(own, tmp_path / "artefact"))
    given = example(name)
    assert torch.equal(again(**given).logits, own(**given).logits)
    assert again.pipeline == own.pipeline
    with torch.no_grad():
        assert torch.equal(again.to_hf()(**given).logits, own(**given).logits)


def test_weights_of_the_source_stay_as_they_are() -> None:
    before = source("llama").weights.wide("model.layers.0.mlp.up_proj.weight").clone()
    own = compile(source("llama"), {"passes": ["rotate{size=16 fuse=true}"]})
    assert torch.equal(source("llama").weights.wide("model.layers.0.mlp.up_proj.weight"), before)
    assert not torch.equal(own.weights.wide("model.layers.0.mlp.up_proj.weight"), before)


def test_outliers_are_spread() -> None:
    """One channel 50 times the others: rounded in blocks of 32, the product is nearer to the float one."""
    torch.manual_seed(0)
    layer = torch.nn.Linear(64, 64, bias=False)
    x = torch.randn(128, 64)
    x[:, 5] *= 50
    rule = {"activations": "mxint4"}
    errors = []
    for passes in ([], ["rotate{size=32}"], ["rotate{size=32 random=1}"]):
        found = compile(torch.nn.Sequential(layer), {"quantize": [rule], "passes": passes}, example={"input": x})(x)
        errors.append(float((found - layer(x)).detach().norm()))
    assert max(errors[1:]) < errors[0]


CONV = """
!image = tensor<?x24x9x9xf32>
!weight = tensor<8x12x3x3xf32>
!result = tensor<?x8x5x5xf32>
func.func @f(%x: !image) -> !result {
  %w = mx.parameter "conv.weight" : !weight
  %conv = mx.conv %x, %w, stride = [2, 2], padding = [1, 1], groups = 2 : (!image, !weight) -> !result
  func.return %conv : !result
}
"""


def test_channels_of_convolutions_where_they_are_named() -> None:
    module, weights = parse_module(CONV), WeightStore.from_state_dict({"conv.weight": torch.randn(8, 12, 3, 3)})
    x = torch.randn(2, 24, 9, 9)
    (wanted,) = Interpreter(module, weights)(x)
    with pytest.raises(UsageError, match="matches 0 of 0 modules"):
        Rotate(size=4).apply(CompileContext(weights=weights), module)
    Rotate(size=4, kind=("conv",)).apply(CompileContext(weights=weights), module)
    module.verify()
    (found,) = Interpreter(module, weights)(x)
    assert "size = 4, dim = -3" in str(module)
    assert torch.allclose(found, wanted, rtol=1e-5, atol=1e-5)


def test_computed_operands_of_products() -> None:
    """Both sides of a product of two computed values, along what it sums over."""
    text = (
        "func.func @f(%a: tensor<2x5x12xf32>, %b: tensor<2x12x7xf32>) -> tensor<2x5x7xf32> {\n"
        "  %ab = mx.matmul %a, %b : (tensor<2x5x12xf32>, tensor<2x12x7xf32>) -> tensor<2x5x7xf32>\n"
        "  func.return %ab : tensor<2x5x7xf32>\n}"
    )
    module, a, b = parse_module(text), torch.randn(2, 5, 12), torch.randn(2, 12, 7)
    Rotate(size=12, attention=True, random=0).apply(CompileContext(weights=WeightStore()), module)
    module.verify()
    assert sorted(rotations(module)) == ["a.rotated", "b.rotated"]
    assert torch.allclose(Interpreter(module, WeightStore())(a, b)[0], a @ b, atol=1e-5)


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "width": (
        "llama",
        {"size": 20},
        r"q_proj sums over 48 numbers, which are no blocks of 20; sizes that work: 2, 4, 8, 12, 16, 24, 48",
    ),
    "order": ("llama", {"size": 6}, "48 numbers, which are no blocks of 6; sizes that work"),
    "head": ("llama", {"size": 48, "attention": True}, r"self_attn\.attention sums over 16 numbers.*work: 2, 4, 8, 16"),
    "match": ("llama", {"size": 16, "match": "model.lm_head"}, r'matches 0 of 15 modules \(did you mean "lm_head"\?\)'),
    "layer norm": ("gpt2", {"size": 16, "fuse": True}, "fuse has no effect: what .*c_attn reads meets mx.layer_norm"),
    "post norm": ("bert", {"size": 32, "match": "*query", "fuse": True}, "no effect: .* meets mx.layer_norm"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str) -> None:
    name, options, reason = REFUSED[case]
    with pytest.raises(UsageError, match=f"rotate: .*{reason}|rotate: {reason}"):
        rotated(name, Rotate(**options))


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"size": -1}, "size is a number of 2 or more"),
        ({"size": "wide"}, "size is a number of 2 or more"),
        ({"random": -1}, "random is a seed of 0 or more"),
        ({"kind": ("attention",)}, "unknown kind 'attention'.*attention=true"),
        ({"kind": ("linears",)}, "unknown kind 'linears'"),
    ],
)
def test_options_that_cannot_be(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(UsageError, match=reason):
        Rotate(**options)


def test_a_second_rotation_of_the_same_layers_is_refused() -> None:
    with pytest.raises(UsageError, match=r"rotate has no effect: .* was rotated by an earlier rotate"):
        rotated("llama", Rotate(size=16), Rotate(size=16))
    module, weights, notes = rotated("llama", Rotate(size=8, match="*mlp*"), Rotate(size=16))
    assert distance("llama", module, weights) < 1e-5
    assert any("rotate leaves model.layers.0.mlp.up_proj as it is" in note for note in notes)
    with pytest.raises(UsageError, match="rotate has no effect"):
        rotated("llama", Rotate(size=16, fuse=True), Rotate(size=16, fuse=True, match="*q_proj"))


def test_passes_that_stand_before_it_are_told() -> None:
    """Codes are decided (packed, or by `clip`, if only of some layers), or residuals are made of what is rounded."""
    own = compiled("llama")
    module, weights = own.packed()
    with pytest.raises(UsageError, match=r"rotate: the codes of the weight of .*q_proj are decided already"):
        Rotate(size=16).apply(CompileContext(weights=weights), module)
    rules = [{"match": "*mlp*", "weights": "nvfp4", "activations": "nvfp4"}]
    with pytest.raises(UsageError, match=r"rotate: the codes of the weight of model\.layers\.0\.mlp\.\w+ are decided"):
        compile(model("llama"), {"quantize": rules, "passes": ["clip", "rotate{size=16}"]})
    passes = ["residual-channels{top=16}", "rotate{size=16}"]
    with pytest.raises(UsageError, match="rotate stands before residual-channels"):
        compile(model("llama"), {"quantize": rules, "passes": passes}, calibration=[example("llama")])


def test_hardware_refuses_by_name() -> None:
    with pytest.raises(MxloomError, match=r"mx\.hadamard has no meaning in integers"):
        compile(
            model("llama"),
            {
                "quantize": [{"weights": "mxint8", "activations": "mxint8"}],
                "passes": ["rotate{size=16}", "legalize-hardware"],
            },
        )


def test_unmatched_layers_of_a_fused_stream_are_rotated_with_it() -> None:
    module, weights, _ = rotated("llama", Rotate(size=16, match="*q_proj", fuse=True))
    assert distance("llama", module, weights) < 1e-5
    assert rotations(module) == []
    marked = [module_name(op) for op in module.walk() if "rotated" in op.attributes]
    assert "lm_head" in marked
    assert "model.layers.0.mlp.gate_proj" in marked
