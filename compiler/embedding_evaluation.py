"""Sentence embeddings beside a reference: how far they turn, and whether neighbours stay neighbours."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from ..backends.checkpoint_files import read_json
from ..dialects.errors import MxloomError, UsageError
from .evaluated import Evaluated, check_vocabulary, evaluated
from .protocol import check_tokenizers, check_vocabularies

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class EmbeddingEvaluation:
    """Cosine of each sentence's embedding to the reference's: mean and least.

    `spearman`: rank correlation of the similarities of all pairs of sentences. `neighbours`: share of sentences whose
    nearest other sentence is the same. Both are None for fewer than three sentences.
    """

    reference: str
    sentences: int
    cosine_mean: float
    cosine_least: float
    spearman: float | None
    neighbours: float | None
    protocol: str

    def summary(self) -> str:
        """Two lines: the figures and how they came about."""
        figures = [f"cosine to {self.reference} {self.cosine_mean:.5f} (least {self.cosine_least:.4f})"]
        if self.spearman is not None and self.neighbours is not None:
            figures.append(f"Spearman {self.spearman:.4f}   same nearest neighbour {100 * self.neighbours:.1f} %")
        return f"{'   '.join(figures)}\nprotocol: {self.protocol}"

    def __str__(self) -> str:
        return self.summary()

    def to_json(self) -> dict[str, Any]:
        """Everything as plain values."""
        return asdict(self)


def evaluate_embeddings(
    model: Any,
    sentences: Sequence[str],
    against: Any,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> EmbeddingEvaluation:
    """Embed `sentences` with both models, each sentence alone (no padding), and compare. MxloomError without sentences.

    Pooling is what `1_Pooling/config.json` beside the model says (the mean over tokens, or the first token), the mean
    where there is none; embeddings are normalised.
    """
    candidate, reference = evaluated(model), evaluated(against)
    if not sentences:
        raise UsageError("no sentences to embed: give one a line.")
    check_vocabularies(candidate, reference)
    if tokenizer is None:
        tokenizer = candidate.tokenizer()
        check_tokenizers(candidate, reference, sentences)
    pooling = _pooling(candidate)
    own = _embed(candidate, sentences, tokenizer, pooling)
    other = _embed(reference, sentences, tokenizer, pooling)
    if own.shape != other.shape:
        raise MxloomError(f"embeddings have {own.shape[1]} dimensions, those of {reference.name} {other.shape[1]}.")
    cosine = (own * other).sum(-1)
    spearman, neighbours = _pairs(own, other) if len(sentences) > 2 else (None, None)
    protocol = f"{len(sentences)} sentences, each alone, {pooling} pooling, normalised, {candidate.dtype}"
    least = cosine.min().item()
    return EmbeddingEvaluation(
        reference.name, len(sentences), cosine.mean().item(), least, spearman, neighbours, protocol
    )


def check_embeddings(candidate: Evaluated, reference: Evaluated | None) -> Evaluated:
    """The reference of an embedding model. UsageError where there is none, or one for something else."""
    if reference is None:
        raise UsageError(f"{candidate.name}: an embedding model is measured against another: give the float model.")
    if reference.task not in ("embedding", "module"):
        raise UsageError(
            f"{candidate.name} is an embedding model, {reference.name} a {reference.kind}, a model for "
            f"{reference.task}: give an embedding model as the reference."
        )
    return reference


def _pooling(model: Evaluated) -> str:
    """`mean` or `first token`, as the files of sentence-transformers say."""
    folder = model.source.files[0].parent if model.source is not None and model.source.files else None
    path = folder / "1_Pooling" / "config.json" if folder is not None else None
    if path is None or not path.is_file():
        return "mean"
    modes = [
        key for key, value in read_json(path, 1_000_000).items() if key.startswith("pooling_mode_") and value is True
    ]
    if modes == ["pooling_mode_mean_tokens"]:
        return "mean"
    if modes == ["pooling_mode_cls_token"]:
        return "first token"
    raise MxloomError(f"{path}: pooling by {', '.join(modes) or 'nothing'} is not known; mean and first token are.")


def _embed(model: Evaluated, sentences: Sequence[str], tokenizer: Any, pooling: str) -> Tensor:
    """Normalised embeddings [sentences, width], f64."""
    import torch

    rows = []
    for sentence in sentences:
        inputs = tokenizer(sentence, return_tensors="pt", truncation=True, max_length=model.positions)
        check_vocabulary(model.name, model.vocabulary, max(inputs["input_ids"].flatten().tolist(), default=0))
        hidden = model.output(
            "last_hidden_state", input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]
        )[0].double()
        rows.append(hidden.mean(0) if pooling == "mean" else hidden[0])
    return torch.nn.functional.normalize(torch.stack(rows), dim=-1)


def _pairs(own: Tensor, other: Tensor) -> tuple[float, float]:
    """Spearman's rank correlation of the similarities of all pairs, and the share of equal nearest neighbours."""
    import torch

    one, two = own @ own.T, other @ other.T
    row, column = torch.triu_indices(len(own), len(own), offset=1)
    ranks = torch.stack([_ranks(one[row, column]), _ranks(two[row, column])])
    for similarities in (one, two):
        similarities.fill_diagonal_(-2)
    same = (one.argmax(-1) == two.argmax(-1)).double().mean().item()
    return torch.corrcoef(ranks)[0, 1].item(), same


def _ranks(values: Tensor) -> Tensor:
    """Ranks from 0; equal values share the mean of theirs."""
    import torch

    _, place, counts = torch.unique(values, return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double()
    return (last - (counts.double() + 1) / 2)[place]
