"""Inputs to calibrate with: what the user gave, or what the model says when it speaks freely from a seed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..dialects.arguments import came
from ..dialects.errors import UsageError
from .inputs import completed, fitted

if TYPE_CHECKING:
    from torch import Tensor
    from xdsl.ir import SSAValue

    from .model_source import ModelSource

LENGTH = 64
"""Tokens of a calibration sequence, at most."""


def calibration_inputs(
    source: ModelSource, arguments: Sequence[SSAValue], given: Any, samples: int
) -> list[list[Tensor]]:
    """At most so many inputs of a module whose arguments these are, each all of them in order.

    `given` is a text or its file (cut into sequences), a list of mappings from input names to tensors, or None: a
    language model then speaks from a seed, and any other model gets the example it was captured with.
    """
    found: list[list[Tensor]] = []
    for named in _named(source, given, samples):
        names = [argument.name_hint or "" for argument in arguments]
        full = completed(dict(named), names, source.config)
        missing = [name for name in names if name not in full]
        if missing:
            raise UsageError(f"calibration: input {missing[0]!r} is missing; the model's inputs are {', '.join(names)}")
        found.append([fitted(full[n], a, f"calibration: {n}") for n, a in zip(names, arguments, strict=True)])
    return found


def _named(source: ModelSource, given: Any, samples: int) -> Iterator[Mapping[str, Any]]:
    if given is None and source.task == "causal-lm":
        yield from ({"input_ids": row[None]} for row in _spoken(source, samples))
    elif given is None:
        yield source.example()
    elif isinstance(given, str | Path):
        yield from ({"input_ids": row[None]} for row in _cut(source, given, samples))
    elif isinstance(given, Sequence) and all(isinstance(each, Mapping) for each in given):
        yield from given[:samples]
    else:
        raise UsageError(
            f"calibration is a text, its file, or a list of dictionaries of inputs by name, got {came(given)}"
        )


def _cut(source: ModelSource, text: str | Path, samples: int) -> Tensor:
    """The first sequences of a text, [samples, LENGTH] at most."""
    import torch

    from .protocol import read_text, tokenized

    tokens = tokenized(source.tokenizer(), read_text(text)[0])
    length = min(LENGTH, len(tokens))
    if length < 2:
        raise UsageError("calibration: the text has fewer than two tokens")
    count = min(samples, len(tokens) // length)
    return torch.tensor(tokens[: count * length]).reshape(count, length)


def _spoken(source: ModelSource, samples: int) -> Tensor:
    """Sequences drawn from the model's own distribution, each from a first token drawn at random: [samples, LENGTH]."""
    import torch

    model: Any = source.loaded()
    config = model.config.get_text_config() if hasattr(model.config, "get_text_config") else model.config
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(config.vocab_size, (samples, 1), generator=generator)
    length = min(LENGTH, getattr(config, "max_position_embeddings", None) or LENGTH)
    with torch.no_grad():
        while ids.shape[1] < length:
            logits = model(input_ids=ids, use_cache=False).logits[:, -1].float().cpu()
            drawn = torch.multinomial(logits.softmax(-1), 1, generator=generator)
            ids = torch.cat([ids, drawn], 1)
    return ids
