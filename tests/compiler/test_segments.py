"""Segments of text: what a tokenizer of BERT returns is what the compiled model takes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertConfig, BertModel, BertTokenizer, GPT2Config, GPT2LMHeadModel

import mxloom
from mxloom.dialects.errors import UsageError

WORDS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "one", "two", "three", "four", "five")


def bert(folder: Path) -> Any:
    config = BertConfig(
        vocab_size=len(WORDS), hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4
    )
    torch.manual_seed(0)
    BertModel(config).save_pretrained(folder)
    return BertModel.from_pretrained(folder, attn_implementation="eager").eval()


def test_what_the_tokenizer_returns_is_taken(tmp_path: Path) -> None:
    """Pairs of texts, of two lengths; and where no segments are given, all is the first one, as in BERT itself."""
    model = bert(tmp_path)
    tokenizer = BertTokenizer(vocab={word: index for index, word in enumerate(WORDS)})
    texts = tokenizer(["one two", "three"], ["four five", "one"], return_tensors="pt", padding=True)
    assert texts["token_type_ids"].unique().tolist() == [0, 1]
    compiled = mxloom.compile(tmp_path)
    assert compiled.inputs == ("input_ids", "attention_mask", "token_type_ids")
    compiled.save(tmp_path / "out")
    plain = {name: texts[name] for name in ("input_ids", "attention_mask")}
    for runs in (compiled, mxloom.load(tmp_path / "out")):
        with torch.no_grad():
            assert torch.equal(runs(**texts)[0], model(**texts)[0])
            assert torch.equal(runs(**plain)[0], model(**plain)[0])
            assert not torch.equal(runs(**plain)[0], runs(**texts)[0])


def test_an_argument_of_that_name_may_mean_something_else() -> None:
    """GPT-2 without token_type_ids adds nothing; with zeros it adds the embedding of token 0."""
    model = GPT2LMHeadModel(GPT2Config(vocab_size=32, n_positions=32, n_embd=32, n_layer=1, n_head=4)).eval()
    compiled = mxloom.compile(model)
    assert "token_type_ids" not in compiled.inputs
    tokens = torch.arange(12).reshape(2, 6)
    with pytest.raises(UsageError, match=r"takes 'token_type_ids' too, but was captured without it.*example="):
        compiled(input_ids=tokens, token_type_ids=tokens)
    with pytest.raises(UsageError, match=r"unknown input 'nonsense'; its inputs are input_ids, attention_mask$"):
        compiled(input_ids=tokens, nonsense=tokens)


def test_an_optional_input_is_captured_where_the_example_names_it() -> None:
    """The example may give one tensor for both: they are two inputs all the same."""
    model: Any = GPT2LMHeadModel(GPT2Config(vocab_size=32, n_positions=32, n_embd=32, n_layer=1, n_head=4)).eval()
    model.set_attn_implementation("eager")
    tokens = torch.arange(12).reshape(2, 6)
    compiled = mxloom.compile(model, example={"input_ids": tokens, "token_type_ids": tokens})
    given = {"input_ids": tokens.flip(0), "token_type_ids": tokens % 3}
    with torch.no_grad():
        assert torch.equal(compiled(**given)[0], model(**given, use_cache=False).logits)
    with pytest.raises(UsageError, match="'token_type_ids' is missing"):
        compiled(input_ids=tokens)
