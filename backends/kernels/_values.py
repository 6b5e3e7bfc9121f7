"""What functions that read memory themselves are given: tensors that have some, on this processor."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ...dialects.arguments import came
from ...dialects.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor


def is_plain(x: Any, *, gpu: bool = False) -> bool:
    """Whether `x` is an ordinary tensor that takes no part in gradients, whose memory holds its values.

    It lies on a CPU, or with `gpu` on a CUDA device. The memory of a lazily negated tensor holds others, that of lazy
    zeros, of a tensor inside `torch.vmap` or under a mode that makes up tensors (export, fake tensors) none.
    """
    import torch
    from torch._C._functorch import is_functorch_wrapped_tensor

    return (
        type(x) is torch.Tensor
        and (x.is_cpu or (gpu and x.is_cuda))
        and not x.requires_grad
        and x.layout == torch.strided
        and not (x.is_nested or x.is_neg() or x._is_zerotensor())
        and not is_functorch_wrapped_tensor(x)
        and not torch._C._len_torch_dispatch_stack()
    )


def values_on_cpu(name: str, x: Any) -> Tensor:
    """The values of `x` as f32, detached. Raises UsageError for what is no f32, bf16 or f16 tensor in memory here.

    Tensors on other devices, sparse, lazily negated and made-up ones (meta, fake, inside `torch.vmap`) are such.
    """
    import torch

    if not isinstance(x, torch.Tensor):
        raise UsageError(f"{name} is a torch tensor, got {came(x)}: make a tensor of it first")
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise UsageError(f"{name} is f32, bf16 or f16, got {x.dtype}: convert it with .float() first")
    if not x.is_cpu:
        raise UsageError(f"{name} lies in memory of the CPU, got one on {x.device}: bring it there with .cpu()")
    if not is_plain(x.detach()):
        raise UsageError(
            f"{name} is a dense tensor whose memory holds its values, got a {x.layout} {type(x).__name__} that is "
            "lazy, made up, or inside torch.vmap: use .to_dense(), .resolve_neg(), or real values"
        )
    return x.detach().to(torch.float32)
