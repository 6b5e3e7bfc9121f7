"""What functions that read memory themselves are given: tensors that have some, on this processor."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ...dialects.arguments import came
from ...dialects.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor


def values_on_cpu(name: str, x: Any) -> Tensor:
    """The values of `x` as f32, detached. Raises UsageError for what is no f32, bf16 or f16 tensor in memory here.

    Tensors on other devices, sparse and made-up ones (meta, fake, inside `torch.vmap`) are such.
    """
    import torch
    from torch._C._functorch import is_functorch_wrapped_tensor
    from torch._subclasses.fake_tensor import FakeTensor

    if not isinstance(x, torch.Tensor):
        raise UsageError(f"{name} is a torch tensor, got {came(x)}: make a tensor of it first")
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise UsageError(f"{name} is f32, bf16 or f16, got {x.dtype}: convert it with .float() first")
    if not x.is_cpu or isinstance(x, FakeTensor):
        raise UsageError(f"{name} lies in memory of the CPU, got one on {x.device}: bring it there with .cpu()")
    if x.layout != torch.strided or is_functorch_wrapped_tensor(x):
        raise UsageError(f"{name} is a dense tensor outside of torch.vmap, got {x.layout}: use .to_dense()")
    return x.detach().to(torch.float32)
