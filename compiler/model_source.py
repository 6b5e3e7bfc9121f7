"""Where a model comes from: a Hugging Face folder, a GGUF file or a module in memory, all behind one interface."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..backends.weight_store import WeightStore
from ..dialects.errors import MxloomError, UsageError, did_you_mean

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase
    from xdsl.dialects.builtin import ModuleOp

TASKS = ("causal-lm", "embedding", "image-classification", "module")

BATCH, SEQUENCE = 2, 10
"""Sizes of example inputs: none is 1, and they differ, so that capture can tell them apart."""


@dataclass
class ModelSource:
    """A model to compile: its structure, its weights by name, and what belongs to it.

    `model` computes in f32. Where the weights lie in files its parameters and persistent buffers are on the meta
    device; what no file holds (rotary frequencies, positions) is there with its values, in f32 whatever the dtype of
    the checkpoint, and in `weights` too. `notes` say what was unusual about the checkpoint; `dynamic` says which sizes
    of the example may change (see `capture`); `imported` keeps the module once the model has been captured; `held`
    names the state where `model` has none to show.
    """

    model: nn.Module
    weights: WeightStore
    name: str
    task: str
    config: PreTrainedConfig | None = None
    files: tuple[Path, ...] = ()
    notes: tuple[str, ...] = ()
    inputs: dict[str, Tensor] = field(default_factory=dict)
    dynamic: bool | Mapping[str, Collection[int]] = True
    imported: ModuleOp | None = None
    held: tuple[str, ...] = ()

    @property
    def state(self) -> tuple[str, ...]:
        """The names of what belongs to the model and is stored with it: parameters and persistent buffers."""
        return self.held or tuple(self.model.state_dict())

    def set_dynamic(self, dynamic: bool | Mapping[str, Collection[int]]) -> None:
        """Say which sizes may change; a module that was captured for other ones is captured again."""
        if dynamic != self.dynamic:
            self.dynamic, self.imported = dynamic, None

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer that lies beside the model, loaded once. MxloomError if there is none."""
        return self._tokenizer

    def example(self) -> dict[str, Tensor]:
        """Inputs that the model accepts, on its device: what the user gave, or made for its task.

        Text: input_ids and attention_mask [2, 10], the first row padded by three on the left, and token_type_ids where
        the model tells segments apart. Images: pixel_values [2, channels, height, width]. On the processor where the
        model has no values.
        """
        from .example_inputs import example_inputs

        return self.inputs or example_inputs(self)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over the names and bytes of the files, or over the names and values of a module's weights."""
        digest = hashlib.sha256()
        for path in self.files:
            digest.update(f"{path.name}\n".encode())
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        if not self.files:
            _digest_weights(digest, self.weights)
        return digest.hexdigest()

    def loaded(self) -> nn.Module:
        """The model with its weights in f32, ready to run; a module in memory is itself."""
        from copy import deepcopy

        if not any(tensor.is_meta for tensor in self.model.state_dict().values()):
            return self.model
        model = deepcopy(self.model)
        wide = {name: self.weights.wide(name) for name in map(self.weights.canonical, model.state_dict())}
        model.load_state_dict({name: wide[self.weights.canonical(name)] for name in model.state_dict()}, assign=True)
        if hasattr(model, "tie_weights"):
            model.tie_weights()  # pyright: ignore[reportCallIssue]
        return model.eval()

    @cached_property
    def _tokenizer(self) -> PreTrainedTokenizerBase:
        from .tokenizer_files import load_tokenizer

        return load_tokenizer(self.name, self.files)


def open_model(
    source: str | Path | nn.Module | ModelSource,
    *,
    kind: str | None = None,
    example: Mapping[str, Any] | None = None,
) -> ModelSource:
    """A Hugging Face folder (safetensors), a GGUF file or a folder with exactly one, or an `nn.Module`.

    `example` are inputs by name; a module needs them, a folder has its own. `kind` names the task where it cannot be
    told from the architecture. Raises MxloomError (or UsageError) with what is wrong and what to do; code that lies in
    a model's folder is never run, nothing is fetched.
    """
    if kind is not None and kind not in TASKS:
        raise UsageError(f"unknown kind {kind!r}{did_you_mean(kind, TASKS)}; these are: {', '.join(TASKS)}.")
    if isinstance(source, ModelSource):
        if example is not None:
            raise UsageError(
                f"{source.name} is opened already, with an example of its own: give the example where it is opened, or "
                "compile the model itself"
            )
        return source
    if example is not None and not isinstance(example, Mapping):
        raise UsageError(
            f"example is a {type(example).__name__}; give a dictionary, inputs by the names of forward's arguments: "
            "example={'input': tensor}."
        )
    opened = _open_path(Path(source)) if isinstance(source, str | Path) else _open_module(source, example)
    if kind is not None:
        opened.task = kind
    if example is not None:
        opened.inputs = dict(example)
    return opened


def _open_path(path: Path) -> ModelSource:
    from .checkpoint import open_folder
    from .gguf_checkpoint import open_gguf

    if path.is_file():
        if path.suffix == ".gguf":
            return open_gguf(path)
        raise MxloomError(f"{path}: a model is a folder with config.json and safetensors, or a .gguf file.")
    if not path.is_dir():
        raise MxloomError(f"{path}: no such folder or file. mxloom does not download: give the path of a local model.")
    ggufs = sorted(path.glob("*.gguf"))
    if ggufs and not any(path.glob("*.safetensors")):
        if len(ggufs) > 1:
            raise UsageError(f"{path}: holds {len(ggufs)} GGUF files; name one, such as {ggufs[0]}.")
        return open_gguf(ggufs[0])
    return open_folder(path)


def _open_module(module: nn.Module, example: Mapping[str, Any] | None) -> ModelSource:
    from .example_inputs import task_of

    config = getattr(module, "config", None)
    task = "module" if config is None else task_of(module, None)
    if example is None and config is None:
        raise UsageError(
            f"{type(module).__name__}: a module needs example inputs to be captured with; "
            "give example={'name of forward argument': tensor, ...}, batch size 2 or more."
        )
    tensors = {**module.state_dict(keep_vars=True), **dict(non_persistent_buffers(module))}
    return ModelSource(module, WeightStore.from_state_dict(tensors), type(module).__name__, task, config)


def non_persistent_buffers(module: nn.Module) -> list[tuple[str, Tensor]]:
    """Buffers that `state_dict` leaves out, by full name: constants of the architecture."""
    return [
        (f"{path}.{name}" if path else name, buffer)
        for path, part in module.named_modules()
        for name, buffer in part.named_buffers(recurse=False)
        if name in part._non_persistent_buffers_set
    ]


def _digest_weights(digest: Any, weights: WeightStore) -> None:
    import torch

    for name in sorted(weights):
        tensor = weights[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().data if tensor.numel() else b"")
