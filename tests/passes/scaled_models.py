"""Small random models whose scales passes move, captured once, and what they compute in float."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from xdsl.dialects.builtin import ModuleOp

from mxloom.backends.reference import Interpreter, body
from mxloom.backends.weight_store import WeightStore
from mxloom.compiler.driver import import_source
from mxloom.compiler.model_source import open_model
from mxloom.dialects.operations.parameter import ParameterOp

_TEXT: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GROUPED: dict[str, Any] = {**_TEXT, "num_key_value_heads": 2, "head_dim": 8}
_PHI3: dict[str, Any] = {key: value for key, value in _GROUPED.items() if key != "head_dim"}
_OTHER: dict[str, Any] = {"vocab_size": 64, "bos_token_id": 1, "eos_token_id": 2}


def _language(config: Any) -> nn.Module:
    return transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")


def _vit() -> nn.Module:
    sizes = {key: _TEXT[key] for key in ("hidden_size", "intermediate_size", "num_hidden_layers")}
    config = transformers.ViTConfig(**sizes, num_attention_heads=4, image_size=16, patch_size=8)
    return transformers.AutoModelForImageClassification.from_config(config, attn_implementation="eager")


def _mixtral() -> nn.Module:
    model: Any = _language(transformers.MixtralConfig(**_GROUPED, num_local_experts=4, sliding_window=None))
    model.set_experts_implementation("eager")
    return model


MODELS: dict[str, Callable[[], nn.Module]] = {
    "llama": lambda: _language(transformers.LlamaConfig(**_GROUPED)),
    "llama_tied": lambda: _language(transformers.LlamaConfig(**_GROUPED, tie_word_embeddings=True)),
    "qwen3": lambda: _language(transformers.Qwen3Config(**_GROUPED)),
    "gemma": lambda: _language(transformers.GemmaConfig(**_GROUPED)),
    "phi3": lambda: _language(transformers.Phi3Config(**_PHI3)),
    "gpt2": lambda: _language(transformers.GPT2Config(**_OTHER, n_positions=64, n_embd=32, n_layer=1, n_head=4)),
    "gpt_neox": lambda: _language(transformers.GPTNeoXConfig(**_TEXT, use_parallel_residual=True)),
    "bert": lambda: transformers.BertForSequenceClassification(transformers.BertConfig(**_TEXT)),
    "vit": _vit,
    "mixtral": _mixtral,
}
"""Grouped heads, tied tables, gains 1 + w, joined projections, attention beside the MLP, norms behind sums, experts."""

TOKENS = {
    "input_ids": torch.tensor([[5, 6, 7, 8, 9, 33], [9, 3, 4, 5, 1, 60]]),
    "attention_mask": torch.tensor([[1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1]]),
}


class Captured:
    """A model's module and weights, to be changed, and inputs."""

    def __init__(self, module: ModuleOp, weights: WeightStore, inputs: list[Tensor], source: Any) -> None:
        self.module, self.weights, self.inputs, self.source = module, weights, inputs, source

    def outputs(self, inputs: list[Tensor] | None = None) -> list[Tensor]:
        """What the module computes now, by the reference interpreter."""
        return Interpreter(self.module, self.weights)(*(inputs or self.inputs))

    def names(self) -> list[str]:
        """The names of the module's parameters."""
        return [op.source.data for op in self.module.walk() if isinstance(op, ParameterOp)]


def captured(model: nn.Module, example: dict[str, Tensor]) -> Captured:
    """A model with uneven weights, gains and biases, captured."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            spread = 0.2 if parameter.ndim > 1 else 0.3
            middle = 1.0 if parameter.ndim == 1 and "bias" not in name else 0.0
            parameter.copy_(middle + spread * torch.randn(parameter.shape, generator=generator))
    source = open_model(model.eval(), example=example)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = import_source(source).clone()
    inputs = [example[argument.name_hint or ""] for argument in body(module).args]
    return Captured(module, source.weights.copy(), inputs, source)


@cache
def _source(name: str) -> Captured:
    torch.manual_seed(0)
    example = {"pixel_values": torch.randn(2, 3, 16, 16)} if name == "vit" else TOKENS
    return captured(MODELS[name](), example)


def model(name: str) -> Captured:
    """One of `MODELS`, captured once; module and weights are the caller's own."""
    held = _source(name)
    return Captured(held.module.clone(), held.weights.copy(), held.inputs, held.source)


def assert_same(found: list[Tensor], wanted: list[Tensor], tolerance: float = 1e-5) -> None:
    """Every output within `tolerance` of the largest magnitude of what it should be."""
    for one, other in zip(found, wanted, strict=True):
        assert bool(one.isfinite().all())
        assert float((one - other).abs().max()) <= tolerance * float(other.abs().max())
