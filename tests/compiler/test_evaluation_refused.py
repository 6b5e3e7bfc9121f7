"""What evaluation refuses: models of another kind, vocabularies that differ, tokenizers that are not there."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    BertForMaskedLM,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from mxloom.compiler.driver import compile
from mxloom.compiler.evaluation import evaluate, evaluate_classifier
from mxloom.compiler.model_source import ModelSource, open_model
from mxloom.dialects.errors import MxloomError, UsageError

VOCABULARY, ALPHABET = 16, "abcdefghijklmnop"


def letters(text: str, **options: Any) -> dict[str, list[int]]:
    """A tokenizer: `a` is token 0, `b` token 1 ..."""
    return {"input_ids": [ALPHABET.index(letter) for letter in text]}


def measure(model: Any, text: str, **options: Any) -> Any:
    return evaluate(model, text, tokenizer=cast(Any, letters), **options)


def small_folder(kind: Any, folder: Path, vocabulary: int = VOCABULARY, *, letters: str = "") -> Path:
    """A tiny random model as a Hugging Face folder; with `letters`, beside it a tokenizer of one token for each."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    torch.manual_seed(0)
    kind(kind.config_class(vocab_size=vocabulary, bos_token_id=1, eos_token_id=2, **sizes)).save_pretrained(folder)
    if letters:
        tokens = Tokenizer(models.WordLevel({letter: i for i, letter in enumerate(letters)}, unk_token=letters[0]))
        tokens.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")  # pyright: ignore[reportAttributeAccessIssue]
        PreTrainedTokenizerFast(tokenizer_object=tokens).save_pretrained(folder)
    return folder


@pytest.fixture
def unloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """No weights are read: what can be told before that, is."""
    monkeypatch.setattr(ModelSource, "loaded", lambda self: pytest.fail("the weights were read"))


@pytest.mark.usefixtures("unloaded")
@pytest.mark.parametrize(
    "kind", [BertForSequenceClassification, BertForMaskedLM, BertForTokenClassification, BertForQuestionAnswering]
)
def test_models_that_predict_no_next_token(kind: Any, tmp_path: Path) -> None:
    """A masked language model has logits for every token, and a perplexity of them would mean nothing."""
    folder = small_folder(kind, tmp_path / "bert", letters=ALPHABET)
    said = f"^bert is a {kind.__name__}; perplexity is for causal language models"
    with pytest.raises(UsageError, match=said):
        evaluate(folder, "abcd", context=2)
    with pytest.raises(UsageError, match=said):
        evaluate(small_folder(LlamaForCausalLM, tmp_path / "a", letters=ALPHABET), "abcd", context=2, against=folder)
    with pytest.raises(UsageError, match=said):
        compile(folder, {"evaluate": {"text": __file__, "context": 2}})


def test_an_encoder_and_decoder_is_no_causal_language_model() -> None:
    model = T5ForConditionalGeneration(T5Config(vocab_size=16, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2))
    with pytest.raises(UsageError, match="is a T5ForConditionalGeneration; perplexity is for causal"):
        measure(model, "abcd", context=2)


@pytest.mark.parametrize("shape", [(1, 3), (1, 4), (4, 16), (1, 3, 16), (1, 4, 16, 2), ()])
def test_outputs_that_are_no_logits(shape: tuple[int, ...]) -> None:
    """A module of one's own is asked: what it yields for 4 tokens is not [1, 4, vocabulary]."""

    class Classifier(nn.Module):
        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
            return torch.zeros(shape)

    with pytest.raises(UsageError, match=r"Classifier \(Classifier\) yields .* for 4 tokens.*it is none"):
        measure(Classifier(), "abcd", context=4)


@pytest.mark.usefixtures("unloaded")
def test_vocabularies_and_tokenizers_are_compared_before_the_work(tmp_path: Path) -> None:
    one = small_folder(LlamaForCausalLM, tmp_path / "one", letters=ALPHABET)
    larger = small_folder(LlamaForCausalLM, tmp_path / "larger", VOCABULARY + 3)
    turned = small_folder(LlamaForCausalLM, tmp_path / "turned", letters="abcdfeghijklmnop")
    with pytest.raises(MxloomError, match="one has a vocabulary of 16 tokens, larger one of 19: models of different"):
        evaluate(one, "abcdefgh", context=4, against=larger)
    with pytest.raises(MxloomError, match=r"different tokenizers: of this text they make 8 and 8 .* from number 4 on"):
        evaluate(one, "abcdefgh", context=4, against=turned)
    text = tmp_path / "text.txt"
    text.write_text("abcdefgh")
    with pytest.raises(MxloomError, match="one has a vocabulary of 16 tokens, larger one of 19"):
        compile(one, {"evaluate": {"text": str(text), "context": 4, "against": str(larger)}})


def test_a_tokenizer_of_another_model(tmp_path: Path) -> None:
    folder = small_folder(LlamaForCausalLM, tmp_path / "small", 4, letters=ALPHABET)
    with pytest.raises(MxloomError, match="small: the text has token 7, but the model's vocabulary is 4: the tokeni"):
        evaluate(folder, "abcdefgh", context=4)


def test_a_token_beyond_the_logits_of_a_module() -> None:
    class Short(nn.Module):
        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
            return torch.zeros(1, 4, 12)

    assert measure(Short(), "abcl", context=4).perplexity == pytest.approx(12)
    with pytest.raises(MxloomError, match="Short: the text has token 12, but the model's vocabulary is 12"):
        measure(Short(), "abcm", context=4)


def test_same_tokens_by_another_tokenizer_are_compared(tmp_path: Path) -> None:
    """Another tokenizer that makes the same of this text does no harm; a reference without one has nothing to say."""
    one = small_folder(LlamaForCausalLM, tmp_path / "one", letters=ALPHABET)
    for other in (
        small_folder(LlamaForCausalLM, tmp_path / "turned", letters="abcdfeghijklmnop"),
        small_folder(LlamaForCausalLM, tmp_path / "bare"),
    ):
        result = evaluate(one, "abcd", context=4, against=other)
        assert (result.against.difference, result.against.kl_mean) == (0, 0)


@pytest.mark.usefixtures("unloaded")
@pytest.mark.parametrize(
    ("kind", "files"),
    [
        (BertForSequenceClassification, "a BertTokenizer needs tokenizer.json or vocab.txt"),
        (BertModel, "a BertTokenizer needs tokenizer.json or vocab.txt"),
        (LlamaForCausalLM, "none of tokenizer.json, tokenizer.model, "),
    ],
)
def test_folders_without_a_tokenizer(kind: Any, files: str, tmp_path: Path) -> None:
    """transformers would make up a tokenizer of no words for a BERT, and its error for a Llama is about itself."""
    folder = small_folder(kind, tmp_path / "bare")
    with pytest.raises(MxloomError) as caught:
        open_model(folder).tokenizer()
    assert str(caught.value).startswith(f"{folder}: the model has no tokenizer there: {files}")
    assert "do: copy the tokenizer's files from where the model came from" in str(caught.value)
    if kind is LlamaForCausalLM:
        with pytest.raises(MxloomError, match="the model has no tokenizer there"):
            evaluate(folder, "abcd", context=2)


def test_a_tokenizer_that_is_broken_or_has_only_settings(tmp_path: Path) -> None:
    folder = small_folder(LlamaForCausalLM, tmp_path / "broken")
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    with pytest.raises(MxloomError, match=r"a LlamaTokenizer needs tokenizer\.json or tokenizer\.model\n  do: copy"):
        open_model(folder).tokenizer()
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(MxloomError, match=r"broken: the tokenizer in tokenizer\.json cannot be read: .+\n  do: copy"):
        open_model(folder).tokenizer()


def test_models_that_classify_no_images(tmp_path: Path) -> None:
    folder = small_folder(LlamaForCausalLM, tmp_path / "words")
    with pytest.raises(UsageError, match="words is a LlamaForCausalLM, a model for causal-lm, not for image-class"):
        evaluate_classifier(folder, [torch.zeros(3, 8, 8)], folder)


@pytest.mark.usefixtures("unloaded")
def test_an_embedding_model_beside_a_model_of_another_kind(tmp_path: Path) -> None:
    body = small_folder(BertModel, tmp_path / "body", letters=ALPHABET)
    words = small_folder(LlamaForCausalLM, tmp_path / "words", letters=ALPHABET)
    with pytest.raises(UsageError, match="body is an embedding model, words a LlamaForCausalLM"):
        evaluate(body, "abcd", against=words)
    with pytest.raises(UsageError, match="body is a BertModel, a model for embedding; perplexity is for"):
        evaluate(words, "abcd", context=2, against=body)
    larger = small_folder(BertModel, tmp_path / "larger", VOCABULARY + 1, letters=ALPHABET)
    with pytest.raises(MxloomError, match="body has a vocabulary of 16 tokens, larger one of 17"):
        evaluate(body, "abcd", against=larger)
