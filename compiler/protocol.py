"""How a text becomes windows of tokens, and the line that says so beside every perplexity."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..dialects.arguments import came, whole_number
from ..dialects.errors import MxloomError, UsageError
from ._quiet import quiet_transformers
from .evaluated import Evaluated, check_vocabulary

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Protocol:
    """What a perplexity depends on: text (name, SHA-256, part), windows of `context` tokens, dtype and accumulators."""

    text: str
    sha256: str
    characters: int | None
    windows: int
    context: int
    dtype: str
    accumulators: tuple[str, ...] = ()
    """Those of linear layers; none where all sum as torch does."""
    trained: int | None = None
    """Positions that the model was made for, where the windows are longer (rotary models run beyond them, badly)."""

    def __str__(self) -> str:
        sums = f", linear layers summed in {', '.join(self.accumulators)}" if self.accumulators else ""
        part = "" if self.characters is None else f", first {grouped(self.characters)} characters"
        return (
            f"{self.text} sha256 {self.sha256[:8]}…{part}, {grouped(self.windows)} windows of {grouped(self.context)}, "
            f"no overlap, BOS no, {grouped(self.windows * (self.context - 1))} tokens, {self.dtype}{sums}"
            + ("" if self.trained is None else f"; longer than the {self.trained} positions the model was made for")
        )


def windows_of(
    model: Evaluated,
    text: str | Path,
    context: int,
    limit: int | None,
    characters: int | None,
    tokenizer: PreTrainedTokenizerBase | None,
    reference: Evaluated | None = None,
) -> tuple[Sequence[Tensor], Protocol]:
    """Windows of token numbers [context], one after the other in the text, and the protocol they make.

    Neither model is run; raises UsageError or MxloomError for what could not be measured, or not compared.
    """
    import torch

    check_models(model, reference, context)
    content, name, digest = read_text(text)
    content = content[:characters]
    tokens = tokenized(tokenizer or model.tokenizer(), content)
    count = len(tokens) // context if limit is None else min(limit, len(tokens) // context)
    if count == 0:
        raise MxloomError(
            f"{name}: {grouped(len(tokens))} tokens, but one window takes {grouped(context)}: "
            "take a longer text or a smaller context."
        )
    if reference is not None and tokenizer is None:
        check_tokenizers(model, reference, [content])
    check_vocabulary(model.name, model.vocabulary, max(tokens[: count * context]))
    windows = torch.tensor(tokens[: count * context]).reshape(count, context)
    exceeded = _exceeded(model, context)
    figures = Protocol(name, digest, characters, count, context, model.dtype, model.accumulators, exceeded)
    return windows.unbind(), figures


def tokenized(tokenizer: Any, text: str) -> list[int]:
    """The tokens of a text, without special ones."""
    with quiet_transformers():
        return tokenizer(text, add_special_tokens=False)["input_ids"]


def _exceeded(model: Evaluated, context: int) -> int | None:
    """What the configuration states as the most positions, where a window has more."""
    stated = getattr(model.config, "max_position_embeddings", None)
    return stated if isinstance(stated, int) and context > stated else None


def check_settings(text: Any, context: Any, limit: Any, characters: Any, tokenizer: Any) -> None:
    """Raise UsageError, naming the argument, where one is not of its kind or makes no sense."""
    if not isinstance(text, str | Path):
        raise UsageError(f"text is a file's path or the text itself, got {came(text)}")
    if whole_number("context", context) < 2:
        raise UsageError(f"context is {context}; a window needs 2 tokens, one to read and one to predict.")
    for name, value in (("limit", limit), ("characters", characters)):
        if value is not None and whole_number(name, value) < 1:
            raise UsageError(f"{name} is {value}; it must be 1 or more.")
    if tokenizer is not None and not callable(tokenizer):
        raise UsageError(f"tokenizer is a loaded tokenizer, such as transformers has, got {came(tokenizer)}")


def check_models(model: Evaluated, reference: Evaluated | None, context: int) -> None:
    """Raise where a model is no causal language model, cannot take `context` tokens, or is not like the reference."""
    for each in (model,) if reference is None else (model, reference):
        _check_model(each, context)
    if reference is not None:
        check_vocabularies(model, reference)


def check_vocabularies(model: Evaluated, reference: Evaluated) -> None:
    """MxloomError where both models state the size of their vocabulary, and not the same one."""
    own, other = model.vocabulary, reference.vocabulary
    if own is not None and other is not None and own != other:
        raise MxloomError(
            f"{model.name} has a vocabulary of {own} tokens, {reference.name} one of {other}: models of different "
            "vocabularies cannot be compared."
        )


def check_tokenizers(model: Evaluated, reference: Evaluated, texts: Sequence[str]) -> None:
    """MxloomError where both models have a tokenizer, and they do not make the same tokens of the texts."""
    if model.source is None or reference.source is None or model.source.files == reference.source.files:
        return
    try:
        tokenizers = model.tokenizer(), reference.tokenizer()
    except MxloomError:  # one of them has none
        return
    for text in texts:
        own, other = (tokenized(tokenizer, text) for tokenizer in tokenizers)
        if own != other:
            place = next(
                (i for i, (a, b) in enumerate(zip(own, other, strict=False)) if a != b), min(map(len, (own, other)))
            )
            raise MxloomError(
                f"{model.name} and {reference.name} have different tokenizers: of this text they make {len(own)} and "
                f"{len(other)} tokens, which differ from number {place} on. Models are compared on the same tokens."
            )


def _check_model(model: Evaluated, context: int) -> None:
    if not model.is_causal:
        what = f"is a {model.kind}, a model for {model.task}" if model.task != "module" else f"is a {model.kind}"
        raise UsageError(f"{model.name} {what}; perplexity is for causal language models.")
    if model.positions is not None and context > model.positions:
        raise UsageError(f"context is {context}; {model.name} has {model.positions} positions.")


def read_text(text: str | Path) -> tuple[str, str, str]:
    """The text, its name, and the SHA-256 of its bytes. A string that names no file is the text itself."""
    path = Path(text) if isinstance(text, Path) or _may_be_path(text) else None
    if path is not None and (isinstance(text, Path) or path.is_file()):
        try:
            raw = path.read_bytes()
            return raw.decode("utf-8"), path.name, hashlib.sha256(raw).hexdigest()
        except OSError as error:
            raise MxloomError(f"{path}: the text cannot be read ({error.strerror}).") from error
        except UnicodeDecodeError as error:
            raise MxloomError(f"{path}: not UTF-8 (byte {error.start}).") from error
    if path is not None and path.suffix in (".txt", ".md") and " " not in str(text):
        raise MxloomError(f"{path}: no such text file.")
    return str(text), "text", hashlib.sha256(str(text).encode()).hexdigest()


def _may_be_path(text: str) -> bool:
    return 0 < len(text) < 1024 and "\n" not in text and "\0" not in text and len(os.path.basename(text)) < 256  # noqa: PTH119


def grouped(number: int) -> str:
    """A whole number in groups of three digits, with spaces."""
    return f"{number:,}".replace(",", " ")
