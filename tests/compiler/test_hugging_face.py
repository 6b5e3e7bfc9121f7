"""`to_hf()`: the numerics of the typed module, with the cache and sampling of transformers."""

# What a module holds by name is typed as a tensor or a module.
# pyright: reportAttributeAccessIssue=false, reportCallIssue=false

import gc
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from mxloom.compiler.compiled import Compiled
from mxloom.compiler.driver import compile
from mxloom.dialects.errors import MxloomError

WIDTHS: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
OTHER: dict[str, Any] = {"vocab_size": 128, "bos_token_id": 1, "eos_token_id": 2}

CONFIGS = {
    "llama": lambda: transformers.LlamaConfig(**WIDTHS),
    "llama_tied": lambda: transformers.LlamaConfig(**WIDTHS, tie_word_embeddings=True),
    "qwen2": lambda: transformers.Qwen2Config(**WIDTHS),
    "qwen3": lambda: transformers.Qwen3Config(**WIDTHS),
    "gemma3": lambda: transformers.Gemma3TextConfig(**WIDTHS, sliding_window=6),
    "gpt2": lambda: transformers.GPT2Config(**OTHER, n_positions=128, n_embd=64, n_layer=2, n_head=4),
    "opt": lambda: transformers.OPTConfig(
        **OTHER,
        hidden_size=64,
        ffn_dim=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=128,
        word_embed_proj_dim=64,
    ),
}

RECIPE = {
    "version": 1,
    "quantize": [
        {"match": "lm_head", "weights": "int8_channel", "activations": "int8_channel"},
        {"weights": "mxfp4", "activations": "mxint8", "attention": "mxint8", "cache": "mxfp8_e4m3"},
    ],
}


def compiled(name: str, recipe: dict | None = None) -> Compiled:
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(CONFIGS[name](), attn_implementation="eager").eval()
    return compile(model, RECIPE if recipe is None else recipe)


def prompt() -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(3, 128, (2, 9), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    return ids, mask


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_and_generated_tokens_are_those_of_the_compiled_model(name: str):
    """Generation step by step without a cache by the compiled model, against `generate()` with its cache."""
    emulated = compiled(name)
    ids, mask = prompt()
    model = emulated.to_hf()
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    assert torch.equal(logits, emulated(input_ids=ids, attention_mask=mask).logits)
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    produced = model.generate(ids, attention_mask=mask, use_cache=True, **options)
    for _ in range(6):
        following = emulated(input_ids=ids, attention_mask=mask).logits[:, -1].argmax(-1, keepdim=True)
        ids = torch.cat([ids, following], 1)
        mask = torch.cat([mask, torch.ones_like(following)], 1)
    assert torch.equal(produced, ids)


@pytest.mark.parametrize(
    "name", ["llama", *(pytest.param(name, marks=pytest.mark.slow) for name in CONFIGS if name != "llama")]
)
def test_exact_sums_are_those_of_the_compiled_model(name: str):
    exact = compiled(name, {**RECIPE, "passes": ["accumulate{format=bf16}"]})
    ids, mask = prompt()
    with torch.no_grad():
        logits = exact.to_hf()(input_ids=ids, attention_mask=mask, use_cache=False).logits
    assert torch.equal(logits, exact(input_ids=ids, attention_mask=mask).logits)
    assert not torch.equal(logits, compiled(name)(input_ids=ids, attention_mask=mask).logits)


def exact_model() -> torch.nn.Module:
    return compiled("llama_tied", {**RECIPE, "passes": ["accumulate"]}).to_hf()


def test_a_changed_weight_of_a_layer_on_codes_is_told():
    model = exact_model()
    ids, mask = prompt()
    model.load_state_dict(model.state_dict())  # written, and the same
    model(input_ids=ids, attention_mask=mask)
    layer: Any = model.get_submodule("model.layers.0.mlp.down_proj")
    with torch.no_grad():
        layer.weight[0, 0] += 1
    with pytest.raises(MxloomError, match=r"weight or bias of model\.layers\.0\.mlp\.down_proj was changed"):
        model(input_ids=ids, attention_mask=mask)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_layers_on_codes_stay_in_f32(dtype: torch.dtype):
    ids, mask = prompt()
    with pytest.raises(MxloomError, match=f"q_proj was converted to {dtype}, but layers on codes sum in f32"):
        exact_model().to(dtype)(input_ids=ids, attention_mask=mask)


def test_a_folder_of_transformers_holds_weights_alone(tmp_path: Path):
    with pytest.raises(MxloomError, match=r"use save\(\) of the compiled model"):
        compiled("llama_tied").to_hf().save_pretrained(tmp_path / "refused")
    assert not (tmp_path / "refused").exists()
    model = compiled("llama_tied", {"quantize": [{"weights": "mxfp4"}]}).to_hf()
    model.save_pretrained(tmp_path)
    ids, mask = prompt()
    with torch.no_grad():
        again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager").eval()
        logits = again(input_ids=ids, attention_mask=mask, use_cache=False).logits
        assert torch.equal(logits, model(input_ids=ids, attention_mask=mask, use_cache=False).logits)


def test_layers_on_codes_have_gradients_after_their_model_is_gone():
    """The straight-through gradient: that of the linear layer with the rounded weight."""
    model = exact_model()
    layer: Any = model.get_submodule("model.layers.0.mlp.down_proj")
    weight = layer.weight.detach().clone()
    x = torch.randn(3, weight.shape[1], generator=torch.Generator().manual_seed(0)).requires_grad_()
    y = layer(x)
    del model, layer
    gc.collect()
    y.sum().backward()
    assert x.grad is not None
    assert torch.allclose(x.grad, torch.ones(3, weight.shape[0]) @ weight, atol=1e-6)


@pytest.mark.parametrize("passes", [[], ["accumulate"]], ids=["fast", "exact"])
def test_torch_compile_keeps_the_bits(passes: list[str]):
    """`aot_eager` traces as `inductor` does, and runs torch's own operations, whose bits fusion may change."""
    model = compiled("llama_tied", {**RECIPE, "passes": passes}).to_hf()
    ids, mask = prompt()
    with torch.no_grad():
        expected = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        traced = torch.compile(model, backend="aot_eager")
        assert torch.equal(traced(input_ids=ids, attention_mask=mask, use_cache=False).logits, expected)


@pytest.mark.parametrize("name", ["llama_tied", "gpt2"])
def test_wide_logits_are_those_of_the_model(name: str):
    wide = compiled(name, {"version": 1, "quantize": [{"keep": "f32"}]})
    ids, mask = prompt()
    with torch.no_grad():
        expected = wide.source.model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        logits = wide.to_hf()(input_ids=ids, attention_mask=mask, use_cache=False).logits
    assert torch.equal(wide(input_ids=ids, attention_mask=mask).logits, expected)
    assert torch.equal(logits, expected)


def test_the_source_model_stays_as_it_was():
    emulated = compiled("llama_tied")
    before = {name: tensor.clone() for name, tensor in emulated.source.model.state_dict().items()}
    emulated.to_hf()
    after = emulated.source.model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not any(type(m).__name__.startswith("Emulated") for m in emulated.source.model.modules())
    assert emulated.source.model.config.tie_word_embeddings


def test_a_tied_head_in_another_format_leaves_the_embedding_alone():
    emulated = compiled("llama_tied", {"version": 1, "quantize": [{"match": "lm_head", "weights": "int8_channel"}]})
    model = emulated.to_hf()
    embedding = model.get_input_embeddings().weight
    assert torch.equal(embedding, emulated.source.model.get_input_embeddings().weight)
    assert not torch.equal(model.lm_head.weight, embedding)


def test_a_module_that_is_no_model_of_transformers_is_refused():
    plain = compile(torch.nn.Sequential(torch.nn.Linear(8, 8)), weights="mxint8", example={"input": torch.ones(2, 8)})
    with pytest.raises(MxloomError, match="Sequential is no Hugging Face model"):
        plain.to_hf()
