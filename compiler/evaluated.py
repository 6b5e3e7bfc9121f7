"""One face for everything that can be evaluated: a compiled model, a Hugging Face model, an opened source, a path."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..dialects.errors import MxloomError, UsageError
from ..dialects.operations.contraction import ExpertLinearOp, LinearOp
from .example_inputs import task_of
from .model_source import ModelSource, open_model

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedTokenizerBase

    from .compiled import Compiled

_DTYPES = {"torch.float32": "f32", "torch.bfloat16": "bf16", "torch.float16": "f16", "torch.float64": "f64"}


@dataclass(frozen=True)
class Evaluated:
    """A model as evaluation sees it: called with inputs by name, it yields its outputs by name or in order.

    `kind` is the class of the model; `is_causal` says whether it may be a causal language model: what is no model of
    transformers may be one until its outputs show that it is none.
    """

    name: str
    task: str
    dtype: str
    positions: int | None
    call: Callable[..., Any]
    source: ModelSource | None
    config: Any = None
    kind: str = ""
    is_causal: bool = True
    accumulators: tuple[str, ...] = ()
    """Those that linear layers state; without any they sum as torch does."""

    @property
    def vocabulary(self) -> int | None:
        """The number of tokens that the model knows, where its configuration states it."""
        config = self.config.get_text_config() if hasattr(self.config, "get_text_config") else self.config
        size = getattr(config, "vocab_size", None)
        return size if isinstance(size, int) else None

    def logits(self, tokens: Tensor) -> Tensor:
        """Logits [sequence, vocabulary] for tokens [sequence], run alone, so that nothing is padding.

        UsageError where the model yields something else, MxloomError for a token beyond the vocabulary.
        """
        logits = self.output("logits", input_ids=tokens[None])
        shape = tuple(getattr(logits, "shape", ()))
        if len(shape) != 3 or shape[:2] != (1, len(tokens)):
            raise UsageError(
                f"{self.name} ({self.kind}) yields {list(shape)} for {len(tokens)} tokens, where a causal language "
                f"model yields logits [1, {len(tokens)}, vocabulary]; it is none."
            )
        check_vocabulary(self.name, shape[-1], int(tokens.max()))
        return logits[0]

    def output(self, name: str, **inputs: Tensor) -> Tensor:
        """The output `name`, or the first one where outputs have no such name."""
        import torch

        if "input_ids" in inputs:
            inputs.setdefault("attention_mask", torch.ones_like(inputs["input_ids"]))
        with torch.no_grad():
            outputs = self.call(**inputs)
        if isinstance(outputs, torch.Tensor):
            return outputs
        named = getattr(outputs, name, None)
        return outputs[0] if named is None else named

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer that came with the model. UsageError if none did."""
        if self.source is None:
            raise UsageError(f"{self.name}: a model in memory has no tokenizer; give tokenizer=.")
        return self.source.tokenizer()


def check_vocabulary(name: str, vocabulary: int | None, token: int) -> None:
    """MxloomError where the model has no such token."""
    if vocabulary is not None and token >= vocabulary:
        raise MxloomError(
            f"{name}: the text has token {token}, but the model's vocabulary is {vocabulary}: the tokenizer belongs to "
            "another model."
        )


@dataclass(frozen=True)
class Remembered(Evaluated):
    """A reference that is asked about the same windows again and again: what it said is kept, up to `room` bytes."""

    room: int = 0
    said: dict[bytes, Tensor] = field(default_factory=dict, compare=False)

    def logits(self, tokens: Tensor) -> Tensor:
        window = tokens.numpy().tobytes()
        if window in self.said:
            return self.said[window]
        logits = super().logits(tokens)
        if sum(kept.nbytes for kept in self.said.values()) + logits.nbytes <= self.room:
            self.said[window] = logits
        return logits


def remembered(model: Any, *, room: int = 2 << 30) -> Evaluated:
    """`model` as a reference for several evaluations on one text: its logits are computed once, within `room` bytes."""
    ready = evaluated(model)
    return Remembered(**{each.name: getattr(ready, each.name) for each in fields(ready)}, room=room)


def evaluated(model: Any) -> Evaluated:
    """`model` made ready: a path is opened (an artefact or a model as it came), a source loaded once it is run."""
    from torch import nn

    from .compiled import Compiled

    if isinstance(model, Evaluated):
        return model
    if isinstance(model, str | Path):
        model = _opened(Path(model))
    if isinstance(model, Compiled):
        return _compiled(model)
    if isinstance(model, ModelSource):
        return _source(model)
    if isinstance(model, nn.Module):
        return _module(model, None)
    raise UsageError(f"a {type(model).__name__} cannot be evaluated: give a compiled model, a model, or a path.")


def _opened(path: Path) -> Compiled | ModelSource:
    from .artefact import is_artefact, load

    return load(path) if is_artefact(path) else open_model(path)


def _compiled(compiled: Compiled) -> Evaluated:
    layers = [op for op in compiled.module.walk() if isinstance(op, LinearOp | ExpertLinearOp)]
    stated = {layer.acc.label for layer in layers if layer.acc is not None}
    stated |= {layer.window.label for layer in layers if isinstance(layer, LinearOp) and layer.window is not None}
    return replace(_of_source(compiled.source, compiled), accumulators=tuple(sorted(stated)))


def _source(source: ModelSource) -> Evaluated:
    """A source whose weights are read when it is first run: what is wrong with its kind is told before that."""
    if not any(tensor.is_meta for tensor in source.model.state_dict().values()):
        return _module(source.model, source)
    loaded = cache(source.loaded)
    return _of_source(source, lambda **inputs: _call(loaded(), inputs))


def _of_source(source: ModelSource, call: Callable[..., Any]) -> Evaluated:
    return Evaluated(
        name=source.name,
        task=source.task,
        dtype="f32",
        positions=positions(source.config),
        call=call,
        source=source,
        config=source.config,
        kind=type(source.model).__name__,
        is_causal=_is_causal(source.model, source.task),
    )


def _module(model: nn.Module, source: ModelSource | None) -> Evaluated:
    config: Any = getattr(model, "config", None)
    first = next(model.parameters(), None)
    if first is not None and first.is_meta:
        raise MxloomError(f"{type(model).__name__}: its weights are on the meta device; there is nothing to run.")
    kind = type(model).__name__
    task = task_of(model, None) if source is None else source.task
    return Evaluated(
        name=kind if source is None else source.name,
        task=task,
        dtype="f32" if first is None else _DTYPES.get(str(first.dtype), str(first.dtype)),
        positions=positions(config),
        call=lambda **inputs: _call(model, inputs),
        source=source,
        config=config,
        kind=kind,
        is_causal=_is_causal(model, task),
    )


def _is_causal(model: nn.Module, task: str) -> bool:
    """By the task; a model of transformers that is for nothing known must generate text, from text, with no encoder."""
    generates: Any = getattr(model, "can_generate", None)
    if task != "module" or generates is None:
        return task in ("causal-lm", "module")
    has_encoder = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    return bool(generates()) and not has_encoder and getattr(model, "main_input_name", "") == "input_ids"


def _call(model: nn.Module, inputs: dict[str, Any]) -> Any:
    if hasattr(getattr(model, "config", None), "use_cache"):
        inputs = {**inputs, "use_cache": False}
    with _evaluating(model):
        return model(**inputs)


@contextmanager
def _evaluating(model: nn.Module):
    """Dropout and the like are off inside; the model's own mode comes back afterwards."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def positions(config: Any) -> int | None:
    """Positions that a model with a table of them has; rotary models have no hard limit, so theirs is not one."""
    if config is None or getattr(config, "rope_parameters", None) is not None:
        return None
    limit = getattr(config, "max_position_embeddings", None)
    return limit if isinstance(limit, int) else None
