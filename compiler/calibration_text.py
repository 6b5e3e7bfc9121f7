"""Texts to calibrate with: read from files, made tokens, and cut into windows."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

from ..dialects.arguments import came
from ..dialects.errors import MxloomError, UsageError, did_you_mean, shortened
from .protocol import read_text, tokenized

if TYPE_CHECKING:
    from .model_source import ModelSource

Document = str | Sequence[int]
"""A text, or its tokens."""

FIELDS = ("text", "input_ids")
"""What a line of a JSON lines file has, one of them."""


def documents_of(text: str | Path) -> Iterator[Document]:
    """The documents of a JSON lines file (its name ends in .jsonl or .ndjson), one a line; else the text as one.

    Raises MxloomError, naming file and line, for what cannot be read.
    """
    if not str(text).endswith((".jsonl", ".ndjson")):
        yield read_text(text)[0]
        return
    try:
        with Path(text).open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield _document(line, f"{text}:{number}")
    except OSError as error:
        raise MxloomError(f"{text}: the calibration text cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise MxloomError(f"{text}: not UTF-8 (byte {error.start})") from error


def _document(line: str, where: str) -> Document:
    form = 'a line is a JSON object with "text" or "input_ids"'
    try:
        fields = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise MxloomError(f"{where}: this is no JSON: {form}, got {shortened(ascii(line.strip()), 60)}") from error
    if not isinstance(fields, dict) or not fields.keys() & set(FIELDS):
        raise MxloomError(f"{where}: {form}, got {shortened(ascii(line.strip()), 60)}")
    unknown = next((key for key in fields if key not in FIELDS), None)
    if unknown is not None:
        raise MxloomError(f"{where}: unknown key {unknown!r:.60}{did_you_mean(unknown, FIELDS)}: {form}")
    if len(fields) > 1:
        raise MxloomError(f"{where}: both text and input_ids: {form}, and not both")
    if "text" in fields:
        if not isinstance(fields["text"], str):
            raise MxloomError(f"{where}: text is a string, got {came(fields['text'])}")
        return fields["text"]
    tokens = fields["input_ids"]
    if not isinstance(tokens, list) or not all(type(token) is int and token >= 0 for token in tokens):
        raise MxloomError(f"{where}: input_ids is a list of token numbers, got {came(tokens)}")
    return tokens


def tokens_of(source: ModelSource, document: Any) -> Sequence[int]:
    """The tokens of a document, without special ones. UsageError for what is no document."""
    if isinstance(document, str):
        return tokenized(source.tokenizer(), document)
    if isinstance(document, Sequence) and all(type(token) is int for token in document):
        return document
    raise UsageError(f"calibration: a text or a list of token numbers was expected among others, got {came(document)}")


def windows(
    documents: Iterable[Any],
    tokens: Callable[[Any], Sequence[int]],
    length: int,
    samples: int,
    seed: int | None,
    *,
    shortest: int,
) -> Iterator[Sequence[int]]:
    """At most so many sequences of `length` tokens, none of them twice, from documents that `tokens` takes apart.

    A document is cut from its front; one of fewer tokens than `length`, but `shortest`, is a sequence itself. With a
    seed the windows of a document come in an order drawn from it. First comes one window of each document, then the
    next of each, and so on.
    """
    draw = None if seed is None else Random(seed)
    left: list[list[Sequence[int]]] = []
    found = 0
    for document in documents:
        own = tokens(document)
        cut = [own[begin : begin + length] for begin in range(0, max(len(own) - length + 1, 1), length)]
        cut = [window for window in cut if len(window) >= shortest]
        if not cut:
            continue
        if draw is not None:
            draw.shuffle(cut)
        yield cut.pop(0)
        left.append(cut)
        found += 1
        if found == samples:
            return
    while any(left) and found < samples:
        for others in left:
            if others and found < samples:
                yield others.pop(0)
                found += 1


def drawn(documents: Iterable[Any], samples: int, seed: int | None) -> Iterable[Any]:
    """Documents in an order drawn from a seed, of many a random choice (Vitter 1985, algorithm R); else as they lie.

    Twice as many as there are samples, and 64, stay: some may be too short.
    """
    if seed is None:
        return documents
    draw, most = Random(seed), 2 * samples + 64
    kept: list[Any] = []
    for place, document in enumerate(documents):
        if place < most:
            kept.append(document)
        elif (taken := draw.randrange(place + 1)) < most:
            kept[taken] = document
    draw.shuffle(kept)
    return kept
