"""What a model does and what goes in: its task by its class, and inputs to capture it with."""

from __future__ import annotations

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
    raise UsageError(
        f"{source.name}: {type(source.model).__name__} takes {main or 'inputs unknown to mxloom'}; "
        "give example={'name of forward argument': tensor, ...}, batch size 2 or more."
    )


def _tokens(source: ModelSource) -> dict[str, Tensor]:
    import torch

    from .model_source import BATCH, SEQUENCE

    vocabulary = _text_config(source.config).vocab_size
    ids = torch.arange(BATCH * SEQUENCE).reshape(BATCH, SEQUENCE) % max(vocabulary - 4, 1) + min(3, vocabulary - 1)
    mask = torch.ones(BATCH, SEQUENCE, dtype=torch.long)
    mask[0, :3] = 0
    device = _device(source.model)
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device)}


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
    parameter = next(iter(model.parameters()), None)
    return "cpu" if parameter is None else parameter.device
