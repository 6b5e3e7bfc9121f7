"""The three interfaces of transformers (attention, mask, experts) in our operators: models are captured whole."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from ..dialects import torch_operators
from ..dialects.errors import MxloomError

if TYPE_CHECKING:
    from torch import Tensor, nn

NAME = "mxloom"

_OWN_MASKS = '_attn_implementation in ("eager", "sdpa")'
"""Stands in the code of models that mask by an index of their own for these two alone."""

_OWN_ARGUMENTS = ("sinks", "indices", "block_indices")
"""What some models give to their attention beyond the interface, and what changes its values."""


def register() -> None:
    """Make `mxloom` known to transformers as an implementation of attention, of its masks, and of experts."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    torch_operators.register()
    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, mask)
    ALL_EXPERTS_FUNCTIONS.register(NAME, experts_forward)


@contextmanager
def structured(model: nn.Module) -> Iterator[None]:
    """Inside, attention and experts are our operators and no cache is used; afterwards the model is as it was.

    A model that writes its attention inside itself (falcon, bloom) keeps it, and so does one whose eager attention
    takes or prepares what our operator does not have (sparse indices, sinks of every query); a module that is not of
    transformers is left alone.
    """
    if not hasattr(model, "set_attn_implementation"):
        yield
        return
    register()
    parts: list[Any] = [part for part in model.modules() if hasattr(part, "config")]
    configs = {id(part.config): part.config for part in parts}.values()
    keys = ("_attn_implementation", "_experts_implementation", "use_cache")
    before = [(config, key, getattr(config, key)) for config in configs for key in keys if hasattr(config, key)]
    try:
        _select(model)
        for config, key, value in before:
            if key == "use_cache":
                config.use_cache = False
            elif key == "_experts_implementation" and value is not None:
                config._experts_implementation = NAME
        yield
    finally:
        for config, key, value in before:
            setattr(config, key, value)


def _select(model: Any) -> None:
    try:
        model.set_attn_implementation("eager" if _is_own_kind(model) else NAME)
    except ValueError:
        model.set_attn_implementation("eager")


def _is_own_kind(model: nn.Module) -> bool:
    """Whether a part computes attention in its own way: by an argument that we do not take, or by eager's masks."""
    known = inspect.signature(attention_forward).parameters
    for kind in {type(part) for part in model.modules()}:
        eager = getattr(sys.modules.get(kind.__module__), "eager_attention_forward", None)
        if eager is None or "ALL_ATTENTION_FUNCTIONS" not in (source := inspect.getsource(kind.forward)):
            continue
        taken = [p for p in inspect.signature(eager).parameters.values() if p.kind is not p.VAR_KEYWORD]
        if any(parameter.name not in known for parameter in taken) or _OWN_MASKS in source:
            return True
    return False


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    position_bias: Tensor | None = None,
    s_aux: Tensor | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """transformers' attention contract as flash attention has it: attention_mask is padding [B, K] or a whole 4-D mask.

    query [B, H, Q, D], key and value [B, G, K, D] -> ([B, Q, H, Dv], None). Where the module carries
    `mxloom_attention`, it says how the operands are rounded (`query`, `key`, `value`: functions of a tensor), which
    the newest positions of a cache are (`wide_key` and `wide_value`: functions of key and value), and how the
    probabilities are rounded (`keywords` of the operator). Raises MxloomError where a cache hands over positions that
    are not there yet, of which the newest are not known.
    """
    import torch

    if unknown := [name for name in _OWN_ARGUMENTS if others.get(name) is not None]:
        raise MxloomError(
            f"{type(module).__name__} gives its attention {unknown[0]!r}, which mx.attention does not have"
        )
    rounding = getattr(module, "mxloom_attention", {})
    newest = [
        rounding[f"wide_{n}"](t) if f"wide_{n}" in rounding else None for n, t in (("key", key), ("value", value))
    ]
    if any(part is not None for part in newest) and attention_mask is not None and attention_mask.ndim == 4:
        raise MxloomError(
            f"{type(module).__name__} reads a cache of a fixed size or a mask of its own, in which the newest "
            "positions are not the last: use the dynamic cache of transformers, which is its default"
        )
    query, key, value = (
        rounding[name](tensor) if name in rounding else tensor
        for name, tensor in (("query", query), ("key", key), ("value", value))
    )

    causal = bool(is_causal if is_causal is not None else getattr(module, "is_causal", True))
    padding = bias = None
    if attention_mask is not None and attention_mask.ndim == 4:
        bias, causal, sliding_window = attention_mask, False, None
        if bias.dtype == torch.bool:
            zero = torch.zeros((), dtype=query.dtype, device=query.device)
            bias = torch.where(bias, zero, torch.finfo(query.dtype).min)
    elif attention_mask is not None:
        padding = attention_mask.to(torch.bool)
    if position_bias is not None:
        bias = position_bias if bias is None else position_bias + bias
    out = torch.ops.mxloom.attention(
        query,
        key,
        value,
        padding,
        bias,
        s_aux,
        *newest,
        scale=scaling if scaling is not None else query.shape[-1] ** -0.5,
        causal=causal,
        window=sliding_window,
        softcap=softcap,
        **rounding.get("keywords", {}),
    )
    return out.transpose(1, 2).contiguous(), None


def mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Any = None,
    attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> Tensor | None:
    """Padding [B, K] where the mask function is causal or bidirectional, in a window or not; else eager's own mask.

    A cache of a fixed size holds positions behind the last query: then it is eager's too.
    """
    from transformers.masking_utils import eager_mask

    pattern = mask_pattern(mask_function)
    if pattern is None or (pattern[0] and kv_offset + kv_length != q_offset + q_length):
        return eager_mask(batch_size, q_length, kv_length, q_offset, kv_offset, mask_function, attention_mask, **kwargs)
    return None if attention_mask is None else attention_mask[:, -kv_length:]


def mask_pattern(function: Any) -> tuple[bool, int | None] | None:
    """(causal, window) of a mask function of transformers; None where it is anything else (packed, chunked, own)."""
    from transformers import masking_utils

    bases = {masking_utils.causal_mask_function: True, masking_utils.bidirectional_mask_function: False}
    if function in bases:
        return bases[function], None
    cells = [cell.cell_contents for cell in getattr(function, "__closure__", None) or ()]
    if getattr(function, "__qualname__", "").startswith("and_masks") and len(cells) == 1 and len(cells[0]) == 2:
        window, base = cells[0]
        if window.__qualname__.startswith("sliding_window") and base in bases:
            return bases[base], window.__closure__[0].cell_contents
    return None


def experts_forward(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """transformers' experts contract: rows routed through two expert contractions, the gate between, summed by weight.

    hidden_states [T, D], top_k_index and top_k_weights [T, k] -> [T, D].
    """
    import torch

    tokens, choices, width = hidden_states.shape[0], top_k_index.shape[-1], hidden_states.shape[-1]
    index = top_k_index.reshape(-1)
    rows = hidden_states.repeat_interleave(choices, dim=0)

    def contract(part: str, given: Tensor) -> Tensor:
        bias = getattr(self, f"{part}_proj_bias") if self.has_bias else None
        return torch.ops.mxloom.expert_linear(given, getattr(self, f"{part}_proj"), index, bias, self.is_transposed)

    up = contract("gate_up" if self.has_gate else "up", rows)
    down = contract("down", self._apply_gate(up) if self.has_gate else self.act_fn(up))
    if self.has_post_expert_norm:
        down = self.post_expert_norm(down)
    weighted = (down * top_k_weights.reshape(-1, 1)).view(tokens, choices, width)
    return weighted.sum(1).to(hidden_states.dtype)
