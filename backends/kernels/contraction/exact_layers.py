"""The linear layers that read one value as codes, as one module: values to codes once, then every layer."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from itertools import count
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

import torch
from torch import nn

from ....dialects import contractions, torch_operators
from ....dialects.contractions import Coded
from ....dialects.formats import Rounding
from ....dialects.mx import parse_type
from .._values import is_plain
from ..codes import Codes, PreparedCodes, prepare_codes
from ..codes_kernel import Factors
from ..fake_quantization import switched_off
from .exact_linear import ExactLinear

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Norm:
    """The value is the RMS norm of the input, with this weight."""

    weight: Tensor | None
    eps: float
    unit_offset: bool

    def __call__(self, x: Tensor) -> Tensor:
        return torch_operators.rms_norm(x, self.weight, self.eps, self.unit_offset)

    @property
    def factors(self) -> Factors:
        return ("row",) if self.weight is None else ("row", "column")

    def multiplied(self, x: Tensor) -> list[Tensor]:
        """What the norm multiplies the input with, as `torch_operators.rms_norm` does: rows, then columns."""
        rows = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)
        return [rows] if self.weight is None else [rows, 1.0 + self.weight if self.unit_offset else self.weight]


@dataclass(frozen=True)
class Product:
    """The value is the product of two inputs of one shape."""

    factors: Factors = ("value",)

    def __call__(self, x: Tensor, other: Tensor) -> Tensor:
        return x * other

    def multiplied(self, x: Tensor, other: Tensor) -> list[Tensor]:
        return [other]


Source = Norm | Product | None
"""What stands between the inputs of the module and the value that the layers read; None: nothing."""


_DEFAULT = Rounding()


class ExactLayers(nn.Module):
    """Layers with accumulators that read one value of a format. Gradients pass straight through the rounding."""

    def __init__(
        self, layers: Sequence[ExactLinear], format: str, how: Rounding = _DEFAULT, source: Source = None
    ) -> None:
        super().__init__()
        self.layers, self.format, self.how, self.source = tuple(layers), format, how, source
        self.handle = next(_HANDLES)
        _GROUPS[self.handle] = self

    def __deepcopy__(self, memo: dict[int, Any]) -> ExactLayers:
        """Another module on the same layers, which never change."""
        return type(self)(self.layers, self.format, self.how, self.source)

    def extra_repr(self) -> str:
        sizes = ", ".join(f"{layer.size} -> {layer.columns}" for layer in self.layers)
        return f"{sizes}; {self.format}, {self.layers[0].accumulator.label}"

    def forward(self, *inputs: Tensor) -> list[Tensor]:
        """The results of the layers, [..., N] f32 each."""
        if not torch.compiler.is_compiling() and all(map(is_plain, inputs)):
            return self.run(*inputs)
        value = inputs[0] if self.source is None else self.source(*inputs)
        return torch.ops.mxloom_kernels.exact_layers.default(value, self.handle)

    def run(self, *inputs: Tensor) -> list[Tensor]:
        """The results for plain tensors on the CPU."""
        if self.source is not None:
            fused = self._fused(*inputs)
            if fused is not None:
                return [layer(fused) for layer in self.layers]
            inputs = (self.source(*inputs),)
        codes = self.codes(inputs[0])
        return [layer(codes) for layer in self.layers]

    def codes(self, x: Tensor) -> Codes | Coded:
        """`x` [..., K] as codes: by a native kernel where there is one, in memory that the thread uses again."""
        if x.is_cpu and switched_off() is None:
            prepared = _prepared(self.format, self.how, x.shape, x.dtype, ())
            if isinstance(prepared, PreparedCodes):
                return prepared(x, *_scratch(prepared))
        return contractions.coded(x, parse_type(self.format), self.how)

    def _fused(self, x: Tensor, *others: Tensor) -> Codes | None:
        """The codes of what the source makes of the inputs, in one pass; None where that is not possible."""
        assert self.source is not None
        tensors = (x, *others)
        if switched_off() is not None or any(t.shape != x.shape or t.dtype != torch.float32 for t in tensors):
            return None
        prepared = _prepared(self.format, self.how, x.shape, x.dtype, self.source.factors)
        if isinstance(prepared, str) or not all(t.is_contiguous() for t in tensors):
            return None
        multiplied = self.source.multiplied(x, *others)
        return prepared(x, *_scratch(prepared), multiplied=multiplied)


class ExactExperts(ExactLayers):
    """Layers of experts: each row of the input times the weight of its own. The layers are the experts, in order."""

    def forward(self, input: Tensor, index: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """input [S, K], index [S] -> [S, N] f32."""
        if not torch.compiler.is_compiling() and is_plain(input):
            return self.chosen(input, index)
        return torch.ops.mxloom_kernels.exact_experts.default(input, index, self.handle)

    def chosen(self, input: Tensor, index: Tensor) -> Tensor:
        """The rows, each by its own expert."""
        codes = self.codes(input)
        result = torch.empty((input.shape[0], self.layers[0].columns), dtype=torch.float32, device=input.device)
        for number, layer in enumerate(self.layers):
            rows = (index == number).nonzero()[:, 0]
            if len(rows):
                result[rows] = layer(_rows_of(codes, rows))
        return result


def _rows_of(codes: Codes | Coded, rows: Tensor) -> Codes | Coded:
    if isinstance(codes, Coded):
        return contractions.rows_of(codes, rows)
    return codes._replace(codes=codes.codes[rows], scales=codes.scales[rows], sums=codes.sums[rows])


_HANDLES = count()
_GROUPS: WeakValueDictionary[int, ExactLayers] = WeakValueDictionary()
_local = threading.local()


@lru_cache(maxsize=4096)
def _prepared(format: str, how: Rounding, shape: Any, dtype: Any, factors: Factors) -> PreparedCodes | str:
    return prepare_codes(parse_type(format), how, tuple(shape), dtype, factors)


def _scratch(prepared: PreparedCodes) -> tuple[Tensor, Tensor, Tensor]:
    """Memory for codes, factors and sums that lives until the thread asks for some of the same shape again."""
    held: dict[Any, tuple[Tensor, Tensor, Tensor]] = _local.__dict__.setdefault("held", {})
    key = prepared.codes_shape, prepared.blocks_shape, prepared.code_dtype
    if key not in held:
        if len(held) >= _MOST_SHAPES:
            held.clear()
        held[key] = (
            torch.empty(prepared.codes_shape, dtype=prepared.code_dtype, device="cpu"),
            torch.empty(prepared.blocks_shape, dtype=torch.float32, device="cpu"),
            torch.empty(prepared.blocks_shape, dtype=torch.int32, device="cpu"),
        )
    return held[key]


_MOST_SHAPES = 16


def exact_layers(input: Tensor, layers: int) -> list[Tensor]:
    """What `mxloom_kernels::exact_layers` does: the layers behind a handle on their value."""
    group = _GROUPS[layers]
    codes = group.codes(input.detach().float())
    return [layer(codes) for layer in group.layers]


def _fake(input: Tensor, layers: int) -> list[Tensor]:
    columns = [layer.columns for layer in _GROUPS[layers].layers]
    return [input.new_empty((*input.shape[:-1], size), dtype=torch.float32) for size in columns]


def exact_experts(input: Tensor, index: Tensor, layers: int) -> Tensor:
    """What `mxloom_kernels::exact_experts` does: the experts behind a handle on their rows."""
    group = _GROUPS[layers]
    assert isinstance(group, ExactExperts)
    return group.chosen(input.detach().float(), index)


def _experts_fake(input: Tensor, index: Tensor, layers: int) -> Tensor:
    return input.new_empty((input.shape[0], _GROUPS[layers].layers[0].columns), dtype=torch.float32)


def _keep_experts(ctx: Any, inputs: tuple[Tensor, Tensor, int], output: Any) -> None:
    ctx.group, ctx.dtype = _GROUPS[inputs[2]], inputs[0].dtype
    ctx.save_for_backward(inputs[1])


def _experts_backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
    (index,) = ctx.saved_tensors
    found = torch.ops.mxloom_kernels.exact_experts_backward.default(gradient, index, ctx.group.handle)
    return found.to(ctx.dtype), None, None


def exact_experts_backward(gradient: Tensor, index: Tensor, layers: int) -> Tensor:
    """The gradient of the rows that experts read, from that of their results."""
    held = _GROUPS[layers].layers
    found = gradient.new_zeros((gradient.shape[0], held[0].size))
    for number, layer in enumerate(held):
        rows = (index == number).nonzero()[:, 0]
        found[rows] = gradient[rows] @ _weight_values(layer).to(gradient.device)
    return found


def _experts_backward_fake(gradient: Tensor, index: Tensor, layers: int) -> Tensor:
    return gradient.new_empty((gradient.shape[0], _GROUPS[layers].layers[0].size))


def _weight_values(layer: ExactLinear) -> Tensor:
    """The numbers that the weights of a layer stand for, [N, K] f32."""
    weight = layer.weight()
    return contractions.values_of(weight) * (1.0 if weight.over is None else weight.over)


def _keep(ctx: Any, inputs: tuple[Tensor, int], output: Any) -> None:
    """The group is kept too: the model may go before its gradients are asked for."""
    ctx.group, ctx.dtype = _GROUPS[inputs[1]], inputs[0].dtype


def _backward(ctx: Any, gradients: Sequence[Tensor]) -> tuple[Tensor, None]:
    """Gradients times the weights' values: rounding passes them straight through."""
    found = torch.ops.mxloom_kernels.exact_layers_backward.default(list(gradients), ctx.group.handle)
    return found.to(ctx.dtype), None


def exact_layers_backward(gradients: Sequence[Tensor], layers: int) -> Tensor:
    """The gradient of the value that layers read, from those of their results."""
    found: Tensor | None = None
    for layer, gradient in zip(_GROUPS[layers].layers, gradients, strict=True):
        part = gradient @ _weight_values(layer).to(gradient.device)
        found = part if found is None else found + part
    assert found is not None
    return found


def _backward_fake(gradients: Sequence[Tensor], layers: int) -> Tensor:
    return gradients[0].new_empty((*gradients[0].shape[:-1], _GROUPS[layers].layers[0].size))


def _batched(info: Any, in_dims: tuple[int | None, None], input: Tensor, layers: int) -> tuple[list[Tensor], list[int]]:
    """Under torch.vmap every sample is rounded by itself."""
    dim = in_dims[0]
    assert dim is not None
    results = [torch.ops.mxloom_kernels.exact_layers.default(sample, layers) for sample in input.unbind(dim)]
    return [torch.stack(list(parts)) for parts in zip(*results, strict=True)], [0] * len(results[0])


@cache
def register() -> object:
    """Define `mxloom_kernels::exact_layers` and `exact_experts`, once; returns what keeps them alive.

    In a namespace of its own: the text of a module may not name layers by their numbers.
    """
    library = torch.library.Library("mxloom_kernels", "FRAGMENT")
    library.define("exact_layers(Tensor input, int layers) -> Tensor[]")
    library.impl("exact_layers", torch_operators.untraced(exact_layers), "CompositeExplicitAutograd")
    torch.library.register_fake("mxloom_kernels::exact_layers", _fake, lib=library)
    torch.library.register_autograd("mxloom_kernels::exact_layers", _backward, setup_context=_keep, lib=library)
    library.define("exact_experts(Tensor input, Tensor index, int layers) -> Tensor")
    library.impl("exact_experts", torch_operators.untraced(exact_experts), "CompositeExplicitAutograd")
    torch.library.register_fake("mxloom_kernels::exact_experts", _experts_fake, lib=library)
    torch.library.register_autograd(
        "mxloom_kernels::exact_experts", _experts_backward, setup_context=_keep_experts, lib=library
    )
    library.define("exact_layers_backward(Tensor[] gradients, int layers) -> Tensor")
    library.impl("exact_layers_backward", torch_operators.untraced(exact_layers_backward), "CompositeExplicitAutograd")
    torch.library.register_fake("mxloom_kernels::exact_layers_backward", _backward_fake, lib=library)
    library.define("exact_experts_backward(Tensor gradient, Tensor index, int layers) -> Tensor")
    library.impl(
        "exact_experts_backward", torch_operators.untraced(exact_experts_backward), "CompositeExplicitAutograd"
    )
    torch.library.register_fake("mxloom_kernels::exact_experts_backward", _experts_backward_fake, lib=library)
    torch.library.register_vmap("mxloom_kernels::exact_layers", _batched, lib=library)
    return library
