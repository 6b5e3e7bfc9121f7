"""A GGUF file: transformers reads its architecture and unpacks its weights into memory, in f32."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..backends.weight_store import WeightStore
from ..dialects.errors import MxloomError
from ._quiet import quiet_transformers
from .checkpoint import architecture, in_one_line, listed
from .example_inputs import task_of
from .model_source import ModelSource, non_persistent_buffers

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedConfig, PreTrainedModel


def open_gguf(path: Path) -> ModelSource:
    """The model in a GGUF file, a plain f32 model in memory. MxloomError where transformers cannot read the file."""
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise MxloomError(f'{path}: not a GGUF file (it does not begin with "GGUF").')
    with quiet_transformers() as notes:
        try:
            config = _config(path)
            model = _model(path, config)
        except MxloomError:
            raise
        except Exception as error:
            raise MxloomError(f"{path}: transformers cannot read it: {in_one_line(error)}") from error
    weights = WeightStore.from_state_dict({**model.state_dict(), **dict(non_persistent_buffers(model))}, copy=False)
    return ModelSource(model, weights, path.stem, task_of(model, None), config, (path,), tuple(notes))


def _config(path: Path) -> PreTrainedConfig:
    """The configuration in the file, without the mark of GGUF's quantization, which would forbid to save the model."""
    from transformers import AutoConfig

    config: Any = AutoConfig.from_pretrained(
        path.parent, gguf_file=path.name, local_files_only=True, attn_implementation="eager"
    )
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    if not config.architectures:
        config.architectures = [architecture(config).__name__]
    return config


def _model(path: Path, config: PreTrainedConfig) -> PreTrainedModel:
    from transformers.initialization import no_init_weights

    with no_init_weights():
        model = architecture(config)(config)
    tensors = _tensors(path, model)
    tied = dict(model.all_tied_weights_keys)
    found = model.load_state_dict(tensors, strict=False, assign=True)
    missing = [name for name in found.missing_keys if tied.get(name, name) not in tensors]
    if missing or found.unexpected_keys:
        raise MxloomError(
            f"{path}: {len(missing)} tensors are missing ({listed(missing)}) and "
            f"{len(found.unexpected_keys)} belong to no part of the model ({listed(found.unexpected_keys)})."
        )
    model.tie_weights()
    return model.eval()


def _tensors(path: Path, model: PreTrainedModel) -> dict[str, Tensor]:
    """The weights by their names in the model, in f32."""
    import torch
    from transformers import modeling_gguf_pytorch_utils as reader

    with _eased(reader):
        read = reader.load_gguf_checkpoint(
            str(path), return_tensors=True, model_to_load=model, torch_dtype=torch.float32
        )
    return read["tensors"]


@contextmanager
def _eased(reader: Any) -> Iterator[None]:
    """transformers draws a bar whatever its own switch says, and makes the same table of names for every module."""
    import gguf

    bar, names = reader.tqdm, gguf.get_tensor_name_map
    reader.tqdm = partial(bar, disable=True)
    gguf.get_tensor_name_map = cache(names)
    try:
        yield
    finally:
        reader.tqdm, gguf.get_tensor_name_map = bar, names
