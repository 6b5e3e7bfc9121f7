"""A model whose weights are on the meta device as one on the processor, while it is captured: nothing is loaded.

A model's code makes tensors where its inputs lie, where its weights lie, or wherever torch puts them; all of that must
be one device. Tracing reads no values, so parameters may lie in one memory that nobody writes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn

    from .precision import Places


def on_meta(model: nn.Module) -> bool:
    """Whether some parameter or buffer of the model has no values."""
    return any(tensor.is_meta for _, _, tensor in _held(model))


@contextmanager
def placed(model: nn.Module) -> Iterator[None]:
    """Inside, what lies on the meta device lies on the processor, without values; afterwards the model is as before.

    All parameters share the memory of the largest, which no program touches; buffers, which a model may write, have
    their own. Tied parameters stay tied.
    """
    before = [(held, name, tensor) for held, name, tensor in _held(model) if tensor.is_meta]
    try:
        _place(before)
        yield
    finally:
        for held, name, tensor in before:
            held[name] = tensor


def _held(model: nn.Module) -> Places:
    return [
        (held, name, tensor)
        for part in model.modules()
        for held in (part._parameters, part._buffers)
        for name, tensor in held.items()
        if tensor is not None
    ]


def _place(places: Places) -> None:
    import torch

    parameters = {id(tensor): tensor for _, _, tensor in places if isinstance(tensor, torch.nn.Parameter)}
    size = max((_extent(tensor) for tensor in parameters.values()), default=0)
    memory = torch.empty(size, dtype=torch.uint8, device="cpu").untyped_storage()
    new: dict[int, Any] = {}
    for _, _, tensor in places:
        if id(tensor) in new:
            continue
        if id(tensor) in parameters:
            shared = torch.empty(0, dtype=tensor.dtype, device="cpu").set_(memory, 0, tensor.shape, tensor.stride())  # pyright: ignore[reportCallIssue, reportArgumentType]
            new[id(tensor)] = torch.nn.Parameter(shared, tensor.requires_grad)
        else:
            new[id(tensor)] = torch.empty_like(tensor, device="cpu")
    for held, name, tensor in places:
        held[name] = new[id(tensor)]


def _extent(tensor: Tensor) -> int:
    """Bytes from a tensor's first element to the end of its last."""
    if tensor.numel() == 0:
        return 0
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.element_size()


def beside(model: nn.Module, example: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The example on the processor where the model is to be `placed`; elsewhere as it is."""
    import torch

    if not on_meta(model):
        return dict(example)
    return {
        name: torch.zeros_like(tensor, device="cpu") if tensor.is_meta else tensor.cpu()
        for name, tensor in example.items()
    }
