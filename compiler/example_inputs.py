"""What a model does and what goes in: its task by its class, and inputs to capture it with."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..dialects.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from .model_source import ModelSource


def task_of(model: nn.Module, folder: Path | None) -> str:
    """The task by the model's class and, for sentence embeddings, by `modules.json` beside it."""
    name = type(model).__name__
    if name.endswith(("ForCausalLM", "LMHeadModel")):
        return "causal-lm"
    if name.endswith("ForImageClassification"):
        return "image-classification"
    if folder is not None and (folder / "modules.json").is_file():
        return "embedding"
    body = name.endswith("Model") and getattr(model, "main_input_name", "") == "input_ids"
    return "embedding" if body else "module"


def example_inputs(source: ModelSource) -> dict[str, Tensor]:
    """Inputs for `source.model` by the name of its main input. UsageError where that is none we know."""
    main = getattr(source.model, "main_input_name", None)
    if main == "pixel_values":
        return {"pixel_values": _images(source)}
    if main == "input_ids":
        inputs = _tokens(source)
        if getattr(source.config, "is_encoder_decoder", False):
            inputs["decoder_input_ids"] = inputs["input_ids"][:, 3:].clone()
        return inputs
    takes = f"{main!r}" if main else "inputs unknown to mxloom"
    named = [main or "name of forward argument"]
    named += ["decoder_input_ids"] if getattr(source.config, "is_encoder_decoder", False) else []
    call = ", ".join(f"{name!r}: tensor" for name in named)
    raise UsageError(
        f"{source.name}: {type(source.model).__name__} takes {takes}, and mxloom makes inputs for tokens and images "
        f"alone. Compile it in Python: mxloom.compile(model, recipe, example={{{call}}}), tensors of batch size 2 or "
        "more."
    )


def _tokens(source: ModelSource) -> dict[str, Tensor]:
    import torch

    from .model_source import BATCH, SEQUENCE

    vocabulary = _text_config(source.config).vocab_size
    ids = torch.arange(BATCH * SEQUENCE).reshape(BATCH, SEQUENCE) % max(vocabulary - 4, 1) + min(3, vocabulary - 1)
    mask = torch.ones(BATCH, SEQUENCE, dtype=torch.long)
    mask[0, :3] = 0
    inputs = {"input_ids": ids, "attention_mask": mask}
    if has_segments(source.config) and "token_type_ids" in inspect.signature(source.model.forward).parameters:
        inputs["token_type_ids"] = torch.zeros_like(ids)
    device = _device(source.model)
    return {name: tensor.to(device) for name, tensor in inputs.items()}


def has_segments(config: Any) -> bool:
    """Whether a model of tokens tells segments apart by `token_type_ids`, and takes zeros where none are given.

    Its tokenizer returns them beside the tokens. GPT-2 has an argument of that name too: absent and 0 differ there.
    """
    return isinstance(getattr(config, "type_vocab_size", None), int)


def _images(source: ModelSource) -> Tensor:
    import torch

    from .model_source import BATCH

    channels = getattr(source.config, "num_channels", 3)
    height, width = image_size(source)
    images = torch.linspace(-1, 1, BATCH * channels * height * width)
    return images.reshape(BATCH, channels, height, width).to(_device(source.model))


def image_size(source: ModelSource) -> tuple[int, int]:
    """Height and width in pixels: of the configuration, else of the image processor beside it, else 224."""
    size: Any = getattr(source.config, "image_size", None) or _processor_size(source) or 224
    if isinstance(size, dict):
        size = size.get("height") or size.get("shortest_edge") or 224, size.get("width") or size.get("shortest_edge")
    height, width = (size, size) if isinstance(size, int) else size
    return int(height), int(width or height)


def _processor_size(source: ModelSource) -> Any:
    from ..backends.checkpoint_files import read_json

    paths = [path for path in source.files if path.name == "preprocessor_config.json"]
    if not paths:
        return None
    fields = read_json(paths[0], 1_000_000)
    return fields.get("crop_size") or fields.get("size")


def _text_config(config: Any) -> Any:
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def _device(model: nn.Module) -> Any:
    """Where inputs lie: a model without values (meta) is captured as one on the processor."""
    parameter = next(iter(model.parameters()), None)
    return "cpu" if parameter is None or parameter.is_meta else parameter.device
