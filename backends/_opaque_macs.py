"""Multiply-accumulates of torch operators that a module keeps as they are, counted on shapes alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from math import prod
from typing import TYPE_CHECKING, Any

from xdsl.ir import SSAValue

from ..dialects.operations.opaque import AtenOp
from .reference import fill

if TYPE_CHECKING:
    from torch.utils._python_dispatch import TorchDispatchMode

_SUMS_NOTHING = [
    "_embedding_bag",
    "_embedding_bag_forward_only",
    "_log_softmax",
    "_native_batch_norm_legit_no_training",
    "_prelu_kernel",
    "_safe_softmax",
    "_softmax",
    "_unsafe_view",
    "_weight_norm_interface",
    "bernoulli",
    "cat",
    "constant_pad_nd",
    "cumsum",
    "embedding",
    "empty",
    "flip",
    "full",
    "gather",
    "index",
    "index_put",
    "index_select",
    "masked_scatter",
    "max_pool2d_with_indices",
    "native_batch_norm",
    "native_group_norm",
    "native_layer_norm",
    "ones",
    "pad",
    "randn",
    "repeat",
    "reflection_pad1d",
    "reflection_pad2d",
    "reflection_pad3d",
    "replication_pad1d",
    "replication_pad2d",
    "replication_pad3d",
    "roll",
    "scalar_tensor",
    "scatter",
    "scatter_add",
    "slice_scatter",
    "select_scatter",
    "sort",
    "split",
    "split_with_sizes",
    "stack",
    "t_",
    "topk",
    "transpose_",
    "tril",
    "triu",
    "unsafe_split",
    "unsafe_split_with_sizes",
    "where",
    "zeros",
]
"""Operators that torch does not mark as pointwise, as a view or as a reduction, and that multiply nothing to sum it."""


def opaque_macs(op: AtenOp, values: Mapping[SSAValue, Any]) -> tuple[int, bool]:
    """MACs of one run at the shapes of `values`, and whether they are all: False where an operator in it is not known.

    The operator runs on tensors without data, so that what torch makes of it on any machine (an LSTM, a transposed
    convolution) falls apart into matrix products and convolutions; their counts are `torch.utils.flop_counter`'s, two
    operations being one MAC.
    """
    import torch
    from torch.utils._pytree import tree_map

    def bare(value: Any) -> Any:
        if not hasattr(value, "shape"):
            return value
        return torch.empty(tuple(value.shape), dtype=value.dtype, device="meta")

    call = op.call()
    held = {operand: tree_map(bare, values[operand]) for operand in op.operands}
    counter = _counter()
    try:
        with torch.no_grad(), counter:
            call.target(*fill(call.args, held), **fill(call.kwargs, held))
    except Exception:  # an operator without a kernel for shapes, or whose result's shape hangs on data
        return 0, False
    return counter.total, not counter.unknown


@cache
def _formulas() -> dict[Any, Callable[..., int]]:
    """MACs of operators that torch's table of counts lacks."""
    import torch

    aten = torch.ops.aten
    return {
        aten.mv: lambda matrix, vector: prod(matrix.shape),
        aten.addmv: lambda bias, matrix, vector, **_: prod(matrix.shape),
        aten.dot: lambda one, other: prod(one.shape),
        aten.vdot: lambda one, other: prod(one.shape),
        aten._trilinear: _trilinear,
    }


def _trilinear(one: Any, two: Any, three: Any, *expanded: Any, **_: Any) -> int:
    """A product of three values for each point of the space that they span: one MAC."""
    shapes = [list(tensor.shape) for tensor in (one, two, three)]
    for shape, places in zip(shapes, expanded[:3], strict=True):
        for place in sorted(places):
            shape.insert(place, 1)
    return prod(max(sizes) for sizes in zip(*shapes, strict=True))


def _counter() -> Any:
    return _mode()()


@cache
def _mode() -> type[TorchDispatchMode]:
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils.flop_counter import flop_registry

    harmless = {getattr(torch.Tag, name, None) for name in ("pointwise", "reduction", "view_copy")}

    class Counter(TorchDispatchMode):
        """Adds up the MACs of what torch runs inside it; `unknown` names what it cannot count."""

        def __init__(self) -> None:
            super().__init__()
            self.total, self.unknown = 0, list[str]()

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            packet = func._overloadpacket
            if packet in flop_registry:
                self.total += flop_registry[packet](*args, **(kwargs or {}), out_val=result) // 2
            elif packet in _formulas():
                self.total += _formulas()[packet](*args, **(kwargs or {}))
            elif not _is_harmless(func):
                self.unknown.append(str(func))
            return result

    def _is_harmless(func: Any) -> bool:
        name = func._schema.name.removeprefix("aten::")
        return func.is_view or name in _SUMS_NOTHING or func.namespace == "prim" or bool(harmless & {*func.tags})

    return Counter
