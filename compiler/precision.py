"""A model of other floats as the f32 model that it stands for, while it is captured.

mxloom computes in f32: a checkpoint in bf16 or f16 is widened, which is exact, one in f64 rounded to nearest. Weights,
buffers and float inputs go alike, so that no operation meets two dtypes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn


Places = list[tuple[dict[str, Any], str, "Tensor"]]
"""Dictionary, name in it and tensor: where a module holds its parameters and buffers."""


@contextmanager
def wide(model: nn.Module) -> Iterator[None]:
    """Inside, the model is as `widen` makes it; afterwards as before."""
    before: Places = []
    try:
        before += widen(model)
        yield
    finally:
        for held, name, tensor in before:
            held[name] = tensor


def widen(model: nn.Module) -> Places:
    """Make parameters and buffers in bf16, f16 and f64 f32, rotary frequencies computed anew; what was there before.

    This is the guard of rotary tables: `model.to(bfloat16)` rounds `inv_freq` too, which is wrong by whole turns at
    long positions, so the frequencies never come from the rounded buffer.
    """
    import torch

    before: Places = [
        (held, name, tensor)
        for part in model.modules()
        for held in (part._parameters, part._buffers)
        for name, tensor in held.items()
        if tensor is not None and _is_other_float(tensor)
    ]
    rebuilt = _rebuilt_buffers(model)
    widened: dict[int, Any] = {}
    for _, _, tensor in before:
        if id(tensor) not in widened:
            new = rebuilt.get(id(tensor), tensor.detach().float())
            is_parameter = isinstance(tensor, torch.nn.Parameter)
            widened[id(tensor)] = torch.nn.Parameter(new, tensor.requires_grad) if is_parameter else new
    for held, name, tensor in before:
        held[name] = widened[id(tensor)]
    return before


def widened(example: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inputs with every float tensor in f32."""
    return {name: tensor.float() if _is_other_float(tensor) else tensor for name, tensor in example.items()}


def _is_other_float(tensor: Tensor) -> bool:
    import torch

    return _is_narrow(tensor) or tensor.dtype == torch.float64


def _is_narrow(tensor: Tensor) -> bool:
    import torch

    return tensor.dtype in (torch.bfloat16, torch.float16)


def _rebuilt_buffers(model: nn.Module) -> dict[int, Tensor]:
    """Buffers of 16 bits that no checkpoint holds, as the module's own constructor computes them from its config.

    One that does not round to what the model holds is left out: somebody has set it on purpose.
    """
    found: dict[int, Tensor] = {}
    for part in model.modules():
        buffers = {name: part._buffers[name] for name in part._non_persistent_buffers_set}
        rounded = {name: buffer for name, buffer in buffers.items() if buffer is not None and _is_narrow(buffer)}
        if rounded and hasattr(part, "config"):
            fresh = type(part)(part.config)  # pyright: ignore[reportCallIssue]
            for name, buffer in rounded.items():
                new = fresh._buffers.get(name)
                if new is not None and new.shape == buffer.shape and bool((new.to(buffer) == buffer).all()):
                    found[id(buffer)] = new.to(buffer.device)
    return found
