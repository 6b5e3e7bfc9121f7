"""A cache in formats of its own, in whole models: one forward, token by token, in Hugging Face's generation, stored."""

# What a module holds by name is typed as a tensor or a module.
# pyright: reportAttributeAccessIssue=false, reportCallIssue=false

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import mxloom
from mxloom import MxloomError
from mxloom.compiler.compiled import Compiled
from mxloom.compiler.model_source import ModelSource, open_model
from mxloom.compiler.recipe import Recipe

from .test_hugging_face import CONFIGS, prompt

KIVI = {
    "kind": "attention",
    "cache": "block<4xi2, bf16, zero i2>",
    "keys_per": "channel",
    "keys_step": 8,
    "values_wide": 5,
}
RULES: dict[str, dict[str, Any]] = {
    "kivi": KIVI,
    "swap": {"kind": "attention", "cache": "block<4xi4, bf16>", "values_per": "channel", "keys_wide": 3},
    "attention": {**KIVI, "cache": "block<4xi4, bf16>", "attention": "mxint8", "keys_wide": 2},
}


@cache
def source(name: str) -> ModelSource:
    """A small model whose attention chooses, so that what is cached matters: with random weights it is nearly even."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(CONFIGS[name](), attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if any(part in parameter_name for part in ("q_proj.weight", "k_proj.weight", "c_attn.weight")):
                parameter.mul_(6.0)
    return open_model(model)


def compiled(name: str, rule: dict[str, Any], *passes: str) -> Compiled:
    return mxloom.compile(source(name), {"quantize": [rule], "passes": list(passes)})


def greedy(model: Compiled, ids: torch.Tensor, mask: torch.Tensor, count: int) -> torch.Tensor:
    """Continued by whole forwards, without a cache."""
    for _ in range(count):
        following = model(input_ids=ids, attention_mask=mask).logits[:, -1].argmax(-1, keepdim=True)
        ids, mask = torch.cat([ids, following], 1), torch.cat([mask, torch.ones_like(following)], 1)
    return ids


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", ["llama", "gpt2", pytest.param("qwen3", marks=pytest.mark.slow)])
def test_generation_with_the_cache_of_transformers_is_the_module_s(name: str, rule: str):
    """Logits to the bit without the cache, tokens with it: of a padded batch where positions are relative."""
    own = compiled(name, RULES[rule])
    ids, mask = (part[1 if name == "gpt2" else 0 :] for part in prompt())
    model = own.to_hf()
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    assert torch.equal(logits, own(input_ids=ids, attention_mask=mask).logits)
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    produced = model.generate(ids, attention_mask=mask, use_cache=True, **options)
    assert torch.equal(produced, greedy(own, ids, mask, 12))


@pytest.mark.parametrize("rule", RULES)
def test_logits_of_one_forward_are_those_token_by_token(rule: str):
    """Every position: its query saw in the whole sequence what the cache held when it came, in each layer."""
    own = compiled("llama", RULES[rule])
    ids = torch.randint(3, 128, (2, 30), generator=torch.Generator().manual_seed(3))
    whole = own(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    model, held = own.to_hf(), transformers.DynamicCache()
    steps: list[torch.Tensor] = []
    with torch.no_grad():
        for start, end in ((0, 7), *((t, t + 1) for t in range(7, 30))):
            given = {"attention_mask": torch.ones(2, end, dtype=torch.long), "cache": held, "use_cache": True}
            steps.append(model(input_ids=ids[:, start:end], **given).logits)
    torch.testing.assert_close(torch.cat(steps, 1), whole, rtol=1e-4, atol=2e-4)
    wide = compiled("llama", {"keep": "f32"})
    assert (wide(input_ids=ids, attention_mask=torch.ones_like(ids)).logits - whole).abs().max() > 0.02


def test_later_tokens_change_nothing_before_them():
    own = compiled("llama", KIVI)
    ids = torch.randint(3, 128, (1, 30), generator=torch.Generator().manual_seed(3))
    other = ids.clone()
    other[:, 21:] = 5
    first, second = (own(input_ids=each, attention_mask=torch.ones_like(each)).logits[:, :21] for each in (ids, other))
    assert torch.equal(first, second)


def test_rotated_keys_are_cached_rotated():
    own = compiled("llama", KIVI, "rotate{size=16 attention=true}")
    ids, mask = prompt()
    model = own.to_hf()
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    assert torch.equal(logits, own(input_ids=ids, attention_mask=mask).logits)
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    assert torch.equal(model.generate(ids, attention_mask=mask, **options), greedy(own, ids, mask, 6))


def test_values_are_rotated_within_heads_under_a_cache_with_wide_positions():
    """The fused rotation passes from v_proj to o_proj: attention mixes rotated values, rounded or not."""
    rule = {"kind": "attention", "cache_values": "fixed<24, 12>", "values_wide": 5}
    own, plain = compiled("llama", rule, "rotate{size=16 fuse=true}"), compiled("llama", {"keep": "f32"})
    ids, mask = prompt()
    expected = plain(input_ids=ids, attention_mask=mask).logits
    # of 15 layers, down_proj of both rotates at run time, and o_proj does not
    assert own.provenance["notes"] == [
        "rotate: 2 values are rotated at run time; 13 layers read what is rotated already"
    ]
    torch.testing.assert_close(own(input_ids=ids, attention_mask=mask).logits, expected, rtol=2e-2, atol=2e-2)


def test_a_static_cache_has_no_newest_positions():
    model = compiled("llama", KIVI).to_hf()
    ids, mask = prompt()
    with pytest.raises(MxloomError, match="reads a cache of a fixed size or a mask of its own, in which the newest"):
        model.generate(ids, attention_mask=mask, cache_implementation="static", max_new_tokens=4, pad_token_id=0)


def test_a_static_cache_without_newest_positions_is_as_good_as_any():
    own = compiled("llama", {"kind": "attention", "cache": "mxint4"})
    ids, mask = prompt()
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    produced = own.to_hf().generate(ids, attention_mask=mask, cache_implementation="static", **options)
    assert torch.equal(produced, greedy(own, ids, mask, 6))


def test_a_window_drops_what_a_group_needs():
    own = compiled("gemma3", KIVI)
    with pytest.raises(
        MxloomError, match=r"self_attn.* rounds several positions together, and transformers drops what"
    ):
        own.to_hf()
    alone = compiled("gemma3", {"kind": "attention", "cache": "mxint4", "keys_wide": 2, "values_wide": 3})
    ids, mask = prompt()
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    assert torch.equal(alone.to_hf().generate(ids, attention_mask=mask, **options), greedy(alone, ids, mask, 6))


def test_what_is_stored_is_read_again(tmp_path: Path):
    own = compiled("llama", RULES["attention"])
    own.save(tmp_path / "artefact")
    again = mxloom.load(tmp_path / "artefact")
    ids, mask = prompt()
    given = {"input_ids": ids, "attention_mask": mask}
    assert torch.equal(again(**given).logits, own(**given).logits)
    assert str(again.module) == str(own.module)


TEXT = """version: 1
quantize:
  - kind: attention
    cache: int4_g32
    keys_per: channel
    keys_step: 128
    values_wide: 128
  - weights: mxfp4
"""


def test_a_recipe_says_what_the_pass_takes():
    recipe = Recipe.from_text(TEXT)
    assert recipe.pipeline() == (
        "quantize{kind=attention cache=int4_g32 keys_per=channel keys_step=128 values_wide=128 rounding=rne},"
        "quantize{weights=mxfp4}"
    ).replace(" rounding=rne", "")
    assert Recipe.from_dict(recipe.to_json()).pipeline() == recipe.pipeline()
    scaled = Recipe.from_dict({"quantize": [{"cache_keys": "mxint4"}], "scale_rule": "ceil"})
    assert scaled.pipeline() == "quantize{cache_keys=mxint4 scale_rule=ceil}"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("keys_per: channel", "keys_per: chanel", ":5: quantize rule 1, keys_per: got 'chanel' (did you mean"),
        ("keys_step: 128", "keys_step: -1", ":6: quantize rule 1, keys_step: "),
        ("keys_step: 128", "keys_step: 0", ":3: quantize rule 1: keys_step=0: a number of positions, 1 or more"),
        ("values_wide: 128", "values_wide: many", ":7: quantize rule 1, values_wide: it should be a valid integer"),
        ("cache: int4", "cache_values: int4", ":3: quantize rule 1: keys_per has no effect without a format"),
        ("cache: int4_g32", "keep: bf16", ":3: quantize rule 1: keys_per has no effect without a format"),
        ("cache: int4_g32", "cache: bf16", ":3: quantize rule 1: keys_per='channel' has no effect: bf16 has no"),
        (
            "cache: int4",
            "cache_key: int4",
            ':4: unknown key "cache_key" in quantize rule 1 (did you mean "cache_keys"?',
        ),
    ],
)
def test_what_is_wrong_in_a_recipe_is_named_with_its_line(old: str, new: str, message: str):
    with pytest.raises(MxloomError) as caught:
        Recipe.from_text(TEXT.replace(old, new), "r.yaml")
    assert f"r.yaml{message}" in str(caught.value)


def test_a_rule_that_fits_no_layer_names_its_line(tmp_path: Path):
    recipe = tmp_path / "r.yaml"
    recipe.write_text(TEXT.replace("keys_step: 128", "keys_step: 48"))
    with pytest.raises(MxloomError, match=r"r\.yaml:3: keys_step=48: int4_g32 rounds 32 positions"):
        mxloom.compile("examples/models/kjv-2m", recipe)
