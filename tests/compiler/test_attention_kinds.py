"""Attention that a model computes in a way of its own stays its own: nothing that it is given is dropped."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

import mxloom
from mxloom.compiler.attention_interface import attention_forward
from mxloom.dialects.errors import MxloomError
from mxloom.dialects.operations.attention import AttentionOp

SMALL: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "use_cache": False,
    "attn_implementation": "eager",
}


def sparse() -> Any:
    """DeepSeek V3.2: an index of 4 of 12 keys for each query, which eager alone turns into a mask."""
    latent: dict[str, Any] = {
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 8,
        "v_head_dim": 8,
    }
    index: dict[str, Any] = {"index_topk": 4, "index_n_heads": 2, "index_head_dim": 16}
    experts: dict[str, Any] = {
        "moe_intermediate_size": 16,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 1,
    }
    config = transformers.DeepseekV32Config(
        **SMALL, **latent, **index, **experts, num_key_value_heads=4, topk_group=1, n_shared_experts=1
    )
    return transformers.DeepseekV32ForCausalLM(config)


def blocks() -> Any:
    """MiniMax M3, at fixed sizes: 1 block of 2 keys for each query, beside the one that it stands in."""
    from transformers.models.minimax_m3_vl.modeling_minimax_m3_vl import MiniMaxM3VLForCausalLM

    index: dict[str, Any] = {
        "index_block_size": 2,
        "index_topk_blocks": 2,
        "index_local_blocks": 1,
        "index_head_dim": 8,
    }
    config = transformers.MiniMaxM3VLTextConfig(
        **SMALL,
        **index,
        num_key_value_heads=2,
        head_dim=8,
        num_local_experts=4,
        num_experts_per_tok=2,
        index_n_heads=2,
        layer_types=["full_attention", "minimax_m3_sparse"],
    )
    return MiniMaxM3VLForCausalLM(config)


@pytest.mark.parametrize(("made", "dynamic"), [pytest.param(sparse, True, marks=pytest.mark.slow), (blocks, False)])
def test_sparse_attention_equals_eager(made: Any, dynamic: bool) -> None:
    torch.manual_seed(0)
    model = made().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3)
    given = {"input_ids": torch.randint(3, 60, (2, 12)), "attention_mask": torch.ones(2, 12, dtype=torch.long)}
    compiled = mxloom.compile(model, example=given, dynamic=dynamic)
    with torch.no_grad():
        assert torch.equal(compiled(**given)[0], model(**given).logits)
    assert not any(isinstance(op, AttentionOp) for op in compiled.module.walk())


def test_an_argument_that_the_operator_does_not_have_is_refused() -> None:
    tensor = torch.randn(1, 2, 3, 4)
    with pytest.raises(MxloomError, match=r"'sinks', which mx\.attention does not have"):
        attention_forward(torch.nn.Module(), tensor, tensor, tensor, None, sinks=tensor)
