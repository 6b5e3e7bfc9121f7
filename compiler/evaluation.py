"""Accuracy with its protocol: perplexity, and how far a model is from a reference, with the error of that figure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..dialects.errors import MxloomError
from .classifier_evaluation import ClassifierEvaluation as ClassifierEvaluation
from .classifier_evaluation import evaluate_classifier as evaluate_classifier
from .embedding_evaluation import EmbeddingEvaluation as EmbeddingEvaluation
from .embedding_evaluation import check_embeddings
from .embedding_evaluation import evaluate_embeddings as evaluate_embeddings
from .evaluated import Evaluated, evaluated
from .protocol import Protocol, check_models, check_settings, read_text, windows_of

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

ROWS = 64
"""Positions whose distributions are in memory at once, in f64."""


@dataclass(frozen=True)
class Comparison:
    """A model beside a reference on the same windows; all in nats, over all predicted tokens.

    `difference` is the mean negative log likelihood minus the reference's. Its `standard_error` is paired: the
    standard deviation of the per-window differences over the root of their number (None for one window).
    `kl_mean` and `kl_p99` are mean and 99th percentile over tokens of KL(reference || model).
    """

    reference: str
    perplexity: float
    negative_log_likelihood: float
    difference: float
    standard_error: float | None
    kl_mean: float
    kl_p99: float
    top1_agreement: float
    window_nll: tuple[float, ...]

    @property
    def verdict(self) -> str:
        """`no difference` below two standard errors, else `worse` or `better`; `unknown` where there is no error."""
        if self.standard_error is None:
            return "no difference" if self.difference == 0 else "unknown"
        if abs(self.difference) < 2 * self.standard_error or self.difference == 0:
            return "no difference"
        return "worse" if self.difference > 0 else "better"


@dataclass(frozen=True)
class Evaluation:
    """Perplexity of a language model on a text, and its distance to a reference where one was given.

    `negative_log_likelihood` is the mean in nats over the predicted tokens; `window_nll` the sum of each window.
    """

    perplexity: float
    negative_log_likelihood: float
    tokens: int
    windows: int
    window_nll: tuple[float, ...]
    protocol: str
    text_sha256: str
    against: Comparison | None = None

    def summary(self) -> str:
        """Two lines: the figures, and the protocol without which they mean nothing."""
        return f"{'   '.join(self._figures())}\nprotocol: {self.protocol}"

    def __str__(self) -> str:
        return self.summary()

    def to_json(self) -> dict[str, Any]:
        """Everything as plain values."""
        fields = asdict(self)
        if self.against is not None:
            fields["against"]["verdict"] = self.against.verdict
        return fields

    def _figures(self) -> list[str]:
        other = self.against
        if other is None:
            return [f"perplexity {self.perplexity:.4g}"]
        error = "" if other.standard_error is None else f" +- {other.standard_error:.4f}"
        remark = f" ({other.verdict})" if other.verdict in ("no difference", "unknown") else ""
        return [
            f"perplexity {self.perplexity:.4g} ({other.reference} {other.perplexity:.4g})",
            f"dNLL {other.difference:+.4f}{error}{remark}",
            f"KL {other.kl_mean:.3g} (p99 {other.kl_p99:.3g})",
            f"top-1 {100 * other.top1_agreement:.1f} %",
        ]


def evaluate(
    model: Any,
    text: str | Path,
    *,
    context: int = 512,
    against: Any = None,
    limit: int | None = None,
    characters: int | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> Any:
    """Evaluate a language model on a text: `Evaluation`.

    `model` and `against` are each a compiled model, a Hugging Face model, an opened source, or a path. `text` is a
    file (UTF-8) or the text itself; only its first `characters` count. It is tokenized without special tokens and cut
    into windows of `context` tokens without overlap, at most `limit` of them; the rest at the end is dropped. Each
    window stands alone, without a beginning-of-sequence token, and predicts `context` - 1 tokens.

    An embedding model takes the lines of the text as sentences, at most `limit`, and needs `against`:
    `EmbeddingEvaluation`. Raises UsageError for an argument of a wrong kind and for a model that is no causal language
    model, MxloomError for a text shorter than a window, for models of different vocabularies or tokenizers, and for
    logits that are NaN; whatever can be told before a model is run, is.
    """
    check_settings(text, context, limit, characters, tokenizer)
    candidate = evaluated(model)
    reference = None if against is None else evaluated(against)
    if candidate.task == "embedding":
        return _embeddings(candidate, reference, read_text(text)[0][:characters], limit, tokenizer)
    windows, protocol = windows_of(candidate, text, context, limit, characters, tokenizer, reference)
    if reference is None:
        return _evaluation([_likelihoods(candidate, window) for window in windows], protocol)
    return _compared(candidate, reference, windows, protocol)


def check_measurable(candidate: Evaluated, reference: Evaluated | None, context: int) -> None:
    """Raise what `evaluate` would raise for the models themselves, before they are run."""
    if candidate.task == "embedding":
        check_embeddings(candidate, reference)
    else:
        check_models(candidate, reference, context)
    candidate.tokenizer()


def _embeddings(
    candidate: Evaluated, reference: Evaluated | None, text: str, limit: int | None, tokenizer: Any
) -> EmbeddingEvaluation:
    sentences = [line.strip() for line in text.splitlines() if line.strip()][:limit]
    return evaluate_embeddings(candidate, sentences, check_embeddings(candidate, reference), tokenizer=tokenizer)


def _likelihoods(model: Evaluated, window: Tensor) -> float:
    """Sum over the window's predicted tokens of -ln p(token), in nats."""
    logits = model.logits(window)
    return math.fsum(_negative_log_likelihood(*part).sum().item() for part in _parts(logits, window, model.name))


def _parts(logits: Tensor, window: Tensor, name: str) -> list[tuple[Tensor, Tensor]]:
    """Logits [rows, vocabulary] that predict a token each, and those tokens [rows]; a few rows at a time."""
    if logits.isnan().any():
        raise MxloomError(f"{name}: logits are NaN; a weight or a scale is at fault.")
    predicting, predicted = logits[:-1].split(ROWS), window[1:].split(ROWS)
    return list(zip(predicting, predicted, strict=True))


def _negative_log_likelihood(logits: Tensor, tokens: Tensor) -> Tensor:
    """-ln softmax(logits)[token] of each row, in f64."""
    return -logits.double().log_softmax(-1).gather(-1, tokens[:, None])[:, 0]


def _evaluation(sums: Sequence[float], protocol: Protocol, against: Comparison | None = None) -> Evaluation:
    tokens = protocol.windows * (protocol.context - 1)
    mean = math.fsum(sums) / tokens
    return Evaluation(
        math.exp(mean), mean, tokens, protocol.windows, tuple(sums), str(protocol), protocol.sha256, against
    )


def _compared(candidate: Evaluated, reference: Evaluated, windows: Sequence[Tensor], protocol: Protocol) -> Evaluation:
    import torch

    own: list[float] = []
    other: list[float] = []
    divergences: list[Tensor] = []
    agreements = 0
    for window in windows:
        logits, reference_logits = candidate.logits(window), reference.logits(window)
        if logits.shape != reference_logits.shape:
            raise MxloomError(
                f"{candidate.name} has {logits.shape[-1]} logits, {reference.name} {reference_logits.shape[-1]}: "
                "models of different vocabularies cannot be compared."
            )
        parts = _parts(logits, window, candidate.name)
        reference_parts = _parts(reference_logits, window, reference.name)
        own.append(math.fsum(_negative_log_likelihood(*part).sum().item() for part in parts))
        other.append(math.fsum(_negative_log_likelihood(*part).sum().item() for part in reference_parts))
        for (row, _), (reference_row, _) in zip(parts, reference_parts, strict=True):
            divergences.append(divergence(reference_row, row))
            agreements += int((row.argmax(-1) == reference_row.argmax(-1)).sum())
    kl = torch.cat(divergences)
    tokens = len(kl)
    mean = math.fsum(other) / tokens
    comparison = Comparison(
        reference=reference.name,
        perplexity=math.exp(mean),
        negative_log_likelihood=mean,
        difference=math.fsum(a - b for a, b in zip(own, other, strict=True)) / tokens,
        standard_error=paired_standard_error(own, other, protocol.context - 1),
        kl_mean=kl.mean().item(),
        kl_p99=kl.quantile(0.99).item()
        if tokens <= 16_000_000
        else kl.kthvalue(math.ceil(0.99 * tokens)).values.item(),
        top1_agreement=agreements / tokens,
        window_nll=tuple(other),
    )
    return _evaluation(own, protocol, comparison)


def divergence(reference: Tensor, model: Tensor) -> Tensor:
    """KL(reference || model) of each row of logits [rows, vocabulary], in nats and f64, never below 0."""
    p, q = reference.double().log_softmax(-1), model.double().log_softmax(-1)
    terms = (p.exp() * (p - q)).masked_fill(p == -math.inf, 0.0)
    return terms.sum(-1).clamp(min=0.0)


def paired_standard_error(one: Sequence[float], other: Sequence[float], tokens: int) -> float | None:
    """Standard error of the mean difference per token, from the differences of windows of `tokens` tokens each."""
    if len(one) < 2:
        return None
    differences = [(a - b) / tokens for a, b in zip(one, other, strict=True)]
    mean = math.fsum(differences) / len(differences)
    variance = math.fsum((d - mean) ** 2 for d in differences) / (len(differences) - 1)
    return math.sqrt(variance / len(differences))
