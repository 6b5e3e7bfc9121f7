"""Inputs to calibrate with: what the user gave, or what the model says when it speaks freely from a seed."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..dialects.arguments import came
from ..dialects.errors import MxloomError, UsageError, did_you_mean
from .calibration_text import documents_of, drawn, tokens_of, windows
from .inputs import completed, fitted, not_captured

if TYPE_CHECKING:
    from torch import Tensor
    from xdsl.ir import SSAValue

    from .model_source import ModelSource

LENGTH = 64
"""Tokens of a calibration sequence, at most, where nobody says how many."""

SPOKEN = 16
"""Sequences that a model speaks at a time."""


class CalibrationData:
    """Inputs of a module, as many as a pass asks for.

    `given` is a text or its file (`.jsonl`: a JSON object a line, with "text" or "input_ids"), an iterable of texts, of
    token numbers, of tensors (the model's main input), or of mappings from input names to tensors, or None: a language
    model then speaks from a seed, and any other model gets the example that it was captured with.
    Texts are cut into sequences of `length` tokens, chosen at random from `seed`, or from the front where that is None.
    """

    def __init__(
        self,
        source: ModelSource,
        arguments: Sequence[SSAValue],
        given: Any = None,
        *,
        length: int | None = None,
        seed: int | None = None,
    ) -> None:
        """Raises UsageError for what is no text, file or iterable, and for sequences that the model cannot take."""
        from .evaluated import positions

        self.source, self.arguments, self.length, self.seed = source, arguments, length, seed
        self.was_read = False
        self._given = _Kept(given) if _is_iterable(given) and not isinstance(given, Sequence) else given
        if not (given is None or isinstance(given, str | Path) or _is_iterable(given)):
            raise UsageError(
                "calibration is a text, its file, or an iterable of texts, of tensors, or of dictionaries of inputs "
                f"by name, got {came(given)}"
            )
        most = positions(source.config)
        if length is not None and most is not None and length > most:
            raise UsageError(f"calibration: length is {length}; {source.name} has {most} positions")

    def __call__(self, samples: int) -> list[list[Tensor]]:
        """At most so many inputs of the module, each all of them in order."""
        self.was_read = True
        names = [argument.name_hint or "" for argument in self.arguments]
        found: list[list[Tensor]] = []
        for place, named in enumerate(self._named(samples)):
            full = completed(self._known(dict(named), names, place), names, self.source.config)
            missing = [name for name in names if name not in full]
            if missing:
                raise UsageError(
                    f"calibration: input {missing[0]!r} is missing; the model's inputs are {', '.join(names)}"
                )
            found.append([fitted(full[n], a, f"calibration: {n}") for n, a in zip(names, self.arguments, strict=True)])
        return found

    def _known(self, named: dict[str, Any], names: Sequence[str], place: int) -> dict[str, Any]:
        """The inputs without a mask that says nothing. UsageError for one that the module does not take."""
        mask = named.get("attention_mask")
        if "attention_mask" not in names and hasattr(mask, "all"):
            if not bool((mask != 0).all()):  # pyright: ignore[reportOptionalMemberAccess]
                raise UsageError(
                    f"calibration input {place} is padded, and the module was captured without attention_mask, so "
                    "padding would count as data: give its sequences one by one, without padding"
                )
            del named["attention_mask"]
        unknown = next((name for name in named if name not in names), None)
        if unknown is not None:
            hint = did_you_mean(str(unknown), names) or not_captured(self.source, str(unknown))
            raise UsageError(f"calibration: unknown input {unknown!r}; the model's inputs are {', '.join(names)}{hint}")
        return named

    def _named(self, samples: int) -> Iterator[Mapping[str, Any]]:
        given = self._given
        if given is None and self.source.task == "causal-lm":
            yield from ({"input_ids": row[None]} for row in _spoken(self.source, samples, self.length, self.seed or 0))
        elif given is None:
            yield self.source.example()
        elif isinstance(given, str | Path):
            yield from self._windows(
                drawn(documents_of(given), samples, self.seed), samples, alone=not _is_lines(given)
            )
        else:
            yield from self._iterated(given, samples)

    def _iterated(self, given: Iterable[Any], samples: int) -> Iterator[Mapping[str, Any]]:
        first = next(iter(given), None)
        if first is None:
            raise UsageError("calibration: the iterable is empty: there is nothing to calibrate with")
        if isinstance(first, str) or _is_tokens(first):
            documents = drawn(given, samples, self.seed) if isinstance(given, Sequence) else given
            yield from self._windows(documents, samples, alone=False)
            return
        for place, each in enumerate(islice(given, samples)):
            if isinstance(each, Mapping):
                yield each
            elif hasattr(each, "is_floating_point"):
                yield {self._main(each): each[None] if self._is_row(each) else each}
            else:
                raise UsageError(
                    f"calibration input {place} is {came(each)}; an iterable has texts, tensors, or dictionaries of "
                    "inputs by name, all of one kind"
                )

    def _main(self, tensor: Tensor) -> str:
        """The input that a tensor without a name is."""
        names = [argument.name_hint or "" for argument in self.arguments]
        main = getattr(self.source.model, "main_input_name", None)
        return main if main in names else names[0]

    def _is_row(self, tensor: Tensor) -> bool:
        """Whether a tensor of tokens is one sequence and no batch."""
        return tensor.ndim == 1 and not tensor.is_floating_point()

    def _windows(self, documents: Iterable[Any], samples: int, *, alone: bool) -> Iterator[Mapping[str, Any]]:
        """Sequences of texts; `alone` where there is one text, which must be long enough for what was asked."""
        import torch

        from .evaluated import check_vocabulary

        length = self.length or LENGTH
        least, count = length if alone and self.length else 2, 0
        for window in windows(
            documents, lambda each: tokens_of(self.source, each), length, samples, self.seed, shortest=least
        ):
            count += 1
            check_vocabulary(self.source.name, _vocabulary(self.source), max(window))
            yield {"input_ids": torch.tensor([window])}
        if count == 0:
            raise UsageError(
                f"calibration: the text has fewer than {least} tokens, the least that a sequence takes: give a longer "
                "text, or a smaller length"
            )


def calibration_inputs(
    source: ModelSource, arguments: Sequence[SSAValue], given: Any, samples: int
) -> list[list[Tensor]]:
    """At most so many inputs of a module whose arguments these are, each all of them in order (see above)."""
    return CalibrationData(source, arguments, given)(samples)


class _Kept:
    """An iterable that can be gone through again, and is asked for no more than is read."""

    def __init__(self, given: Iterable[Any]) -> None:
        self._rest, self._read = iter(given), []

    def __iter__(self) -> Iterator[Any]:
        place = 0
        while True:
            if place == len(self._read):
                try:
                    self._read.append(next(self._rest))
                except StopIteration:
                    return
            yield self._read[place]
            place += 1


def _is_iterable(given: Any) -> bool:
    if isinstance(given, str | Path | Mapping) or hasattr(given, "is_floating_point"):
        return False
    return isinstance(given, Iterable)


def _is_lines(given: str | Path) -> bool:
    return str(given).endswith((".jsonl", ".ndjson"))


def _is_tokens(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str) and all(type(token) is int for token in value)


def _vocabulary(source: ModelSource) -> int | None:
    config: Any = source.config
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    size = getattr(config, "vocab_size", None)
    return size if isinstance(size, int) else None


def _spoken(source: ModelSource, samples: int, length: int | None, seed: int) -> list[Tensor]:
    """Sequences drawn from the model's own distribution, each from a first token drawn at random."""
    import torch

    model: Any = source.loaded()
    config = model.config.get_text_config() if hasattr(model.config, "get_text_config") else model.config
    wanted = LENGTH if length is None else length
    wanted = min(wanted, getattr(config, "max_position_embeddings", None) or wanted)
    generator = torch.Generator().manual_seed(seed)
    begin = torch.randint(config.vocab_size, (samples, 1), generator=generator)
    with torch.no_grad():
        return [row for ids in begin.split(SPOKEN) for row in _continued(model, ids, wanted, generator)]


def _continued(model: Any, ids: Tensor, length: int, generator: Any) -> Tensor:
    """Tokens [batch, 1] continued to [batch, length], token by token, with the model's cache where it has one."""
    import torch

    parameters = inspect.signature(model.forward).parameters
    cache = next((name for name in ("cache", "past_key_values") if name in parameters), None)  # the older name
    held: Any = None
    while ids.shape[1] < length:
        given, kept = (ids, {}) if held is None else (ids[:, -1:], {cache: held})
        said = model(input_ids=given, use_cache=cache is not None, **kept)
        held = getattr(said, cache, None) if cache is not None else None
        logits = said.logits[:, -1].float().cpu()
        if not bool(logits.isfinite().all()):
            raise MxloomError("calibration: the model speaks NaN or infinite logits: give it a text to read")
        ids = torch.cat([ids, torch.multinomial(logits.softmax(-1), 1, generator=generator)], 1)
    return ids
