"""The torch operators that stand for our own operations: attention, rms_norm, rope, expert_linear, quantize, hadamard.

Each has a meaning, a fake kernel (shapes alone) and a backward, so that a captured model stays differentiable.
Rounding passes its gradient straight through.
"""

from __future__ import annotations

import math
import operator as python_operator
from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Any

from .errors import MxloomError
from .hadamard import hadamard

if TYPE_CHECKING:
    from torch import Tensor
    from xdsl.ir import Attribute

    from .formats import Rounding

_SCHEMAS = {
    "attention": "(Tensor query, Tensor key, Tensor value, Tensor? padding=None, Tensor? bias=None, "
    "Tensor? sinks=None, Tensor? wide_key=None, Tensor? wide_value=None, *, float scale, bool causal, "
    "int? window=None, float? softcap=None, str? probabilities=None, str? scale_rule=None, "
    'str rounding="rne", int key_wide=0, int key_step=1, int value_wide=0, int value_step=1) -> Tensor',
    "rms_norm": "(Tensor input, Tensor? weight, float eps, bool unit_offset) -> Tensor",
    "rope": "(Tensor input, Tensor cos, Tensor sin, bool halves) -> Tensor",
    "expert_linear": "(Tensor input, Tensor weight, Tensor index, Tensor? bias, bool transposed) -> Tensor",
    "quantize": '(Tensor input, str format, str? scale_rule=None, str rounding="rne", float? clip=None, int seed=0, '
    "float? threshold=None, bool exact=False, Tensor? sensitivity=None) -> Tensor",
    "convert": "(Tensor input, ScalarType dtype, str rounding, int seed=0) -> Tensor",
    "hadamard": "(Tensor input, int size, int dim=-1, int? seed=None) -> Tensor",
}

_SIZE_FUNCTIONS: dict[str, Callable[..., Any]] = {
    **{
        f"operator.{name}": getattr(python_operator, name)
        for name in [
            "add",
            "sub",
            "mul",
            "floordiv",
            "truediv",
            "mod",
            "neg",
            "pow",
            "eq",
            "ne",
            "lt",
            "le",
            "gt",
            "ge",
            "and_",
            "or_",
            "not_",
        ]
    },
    **{f"math.{name}": getattr(math, name) for name in ["ceil", "floor", "trunc", "sqrt"]},
}


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    padding: Tensor | None = None,
    bias: Tensor | None = None,
    sinks: Tensor | None = None,
    wide_key: Tensor | None = None,
    wide_value: Tensor | None = None,
    *,
    scale: float,
    causal: bool,
    window: int | None = None,
    softcap: float | None = None,
    probabilities: str | None = None,
    scale_rule: str | None = None,
    rounding: str = "rne",
    key_wide: int = 0,
    key_step: int = 1,
    value_wide: int = 0,
    value_step: int = 1,
) -> Tensor:
    """The eager attention of transformers, operation for operation, so that wholly masked rows agree too.

    query [B, H, Q, D], key and value [B, G, K, D], padding [B, K] bool, bias [B, 1 or H, Q, K], sinks [H]
    -> [B, H, Q, Dv]. Where `wide_key` or `wide_value` (like key and value) is given, a query reads from it the
    positions that `narrowed` leaves out, and all of a step that padding is in. The scores, and their products with the
    value, are then computed twice.
    """
    import torch

    rows, columns, heads = query.shape[2], key.shape[2], query.shape[1]
    scores = torch.matmul(query, _shared_heads(key, heads).transpose(2, 3)) * scale
    if wide_key is not None:
        wide = torch.matmul(query, _shared_heads(wide_key, heads).transpose(2, 3)) * scale
        narrow = _narrow(narrowed(rows, columns, key_wide, key_step, query.device), key_step, padding)
        scores = torch.where(narrow, scores, wide)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    allowed = visible(rows, columns, causal, window, padding, query.device)
    if allowed is not None:
        lowest = torch.finfo(scores.dtype).min
        mask = torch.where(allowed, torch.zeros((), dtype=scores.dtype, device=scores.device), lowest)
        bias = mask if bias is None else bias + mask
    if bias is not None:
        scores = scores + bias
    if sinks is not None:
        column = sinks.reshape(1, -1, 1, 1).expand(scores.shape[0], -1, rows, -1)
        scores = torch.cat([scores, column], -1)
        scores = scores - scores.max(-1, keepdim=True).values
    weights = torch.softmax(scores, -1, dtype=torch.float32).to(query.dtype)
    if sinks is not None:
        weights = weights[..., :columns]
    if probabilities is not None:
        weights = torch.ops.mxloom.quantize(weights, probabilities, scale_rule, rounding)
    if wide_value is None:
        return torch.matmul(weights, _shared_heads(value, heads))
    narrow = _narrow(narrowed(rows, columns, value_wide, value_step, query.device), value_step, padding)
    newest = torch.matmul(weights.masked_fill(narrow, 0.0), _shared_heads(wide_value, heads))
    return torch.matmul(weights.masked_fill(~narrow, 0.0), _shared_heads(value, heads)) + newest


def narrowed(rows: int, columns: int, wide: int, step: int, device: Any) -> Tensor:
    """Which key each query finds rounded in the cache, [Q, K] bool: those whose `step` has left the `wide` newest.

    The queries are the last of the positions. The one at position t, which counts from 0, sees t + 1 of them, of which
    the newest `wide` (its own is the first of these) are as they were computed. The others are rounded `step` at a
    time, from the first on: position s is rounded where step * (s // step + 1) <= t + 1 - wide.
    """
    import torch

    seen = torch.arange(rows, device=device)[:, None] + (columns - rows + 1)
    ends = (torch.arange(columns, device=device)[None] // step + 1) * step
    return ends <= seen - wide


def _narrow(narrowed: Tensor, step: int, padding: Tensor | None) -> Tensor:
    """Of [Q, K], or [B, 1, Q, K], the steps without padding: what stands there must not decide about a scale."""
    import torch

    if padding is None or step == 1:
        return narrowed
    columns = padding.shape[1]
    whole = torch.nn.functional.pad(padding, (0, -columns % step), value=True).unflatten(1, (-1, step)).all(-1)
    return narrowed & whole.repeat_interleave(step, 1)[:, None, None, :columns]


def _shared_heads(shared: Tensor, heads: int) -> Tensor:
    """[B, G, K, D] as [B, heads, K, D], each head used heads / G times, laid out as transformers' repeat_kv lays it.

    One shared head stays a view, and a matrix product may sum a view in another order than a copy.
    """
    batch, groups, positions, width = shared.shape
    if groups == heads:
        return shared
    expanded = shared[:, :, None].expand(batch, groups, heads // groups, positions, width)
    return expanded.reshape(batch, heads, positions, width)


def visible(
    rows: int, columns: int, causal: bool, window: int | None, padding: Tensor | None, device: Any
) -> Tensor | None:
    """Which key each query may see, [B or 1, 1, Q or 1, K] bool; None where it may see all."""
    import torch

    allowed = None
    if causal or window is not None:
        row = torch.arange(rows, device=device)[:, None] + (columns - rows)
        column = torch.arange(columns, device=device)[None]
        allowed = column <= row if causal else torch.ones_like(column <= row)
        if window is not None:
            allowed = allowed & ((column > row - window) if causal else ((row - column).abs() <= window))
        allowed = allowed[None, None]
    if padding is None:
        return allowed
    padding = padding[:, None, None, :]
    return padding if allowed is None else allowed & padding


def rms_norm(input: Tensor, weight: Tensor | None, eps: float, unit_offset: bool) -> Tensor:
    """input / sqrt(mean(input²) + eps) · weight, or · (1 + weight) with `unit_offset`; along the last dimension."""
    import torch

    normalized = input * torch.rsqrt(input.pow(2).mean(-1, keepdim=True) + eps)
    if weight is None:
        return normalized
    return normalized * (1.0 + weight if unit_offset else weight)


def rope(input: Tensor, cos: Tensor, sin: Tensor, halves: bool) -> Tensor:
    """Rotary embedding of [..., D]; cos and sin have D columns, or D / 2 with `halves`."""
    import torch

    first, second = input.chunk(2, -1)
    if halves:
        return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)
    return input * cos + torch.cat((-second, first), -1) * sin


def expert_linear(input: Tensor, weight: Tensor, index: Tensor, bias: Tensor | None, transposed: bool) -> Tensor:
    """Row s of input [S, K] times the weight of expert index[s].

    weight [E, N, K] ([E, K, N] when `transposed`), bias [E, N] -> [S, N].
    """
    import torch

    result = input.new_empty(input.shape[0], weight.shape[2 if transposed else 1])
    for expert in range(weight.shape[0]):
        rows = (index == expert).nonzero()[:, 0]
        if len(rows):
            matrix = weight[expert].T if transposed else weight[expert]
            product = torch.nn.functional.linear(input[rows], matrix)
            result[rows] = product if bias is None else product + bias[expert]
    return result


def quantize(
    input: Tensor,
    format: str,
    scale_rule: str | None = None,
    rounding: str = "rne",
    clip: float | None = None,
    seed: int = 0,
    threshold: float | None = None,
    exact: bool = False,
    sensitivity: Tensor | None = None,
) -> Tensor:
    """The input rounded into a format given by its text; `sensitivity` is that of a mixed format's blocks."""
    from . import formats
    from .mx import parse_type

    how, type = formats.Rounding(scale_rule, rounding, clip, seed, threshold, exact), parse_type(format)
    if sensitivity is not None:
        assert isinstance(type, formats.MixedType)
        return type.quantize(input, how, sensitivity).contiguous()
    return formats.quantize(input, type, how).contiguous()


def convert(input: Tensor, dtype: Any, rounding: str, seed: int = 0) -> Tensor:
    """The input in a float dtype of torch, rounded in another way than torch's own, to nearest even."""
    import torch

    from . import formats
    from .operations._values import element_type

    how = formats.Rounding(rounding=rounding, seed=seed)
    wide = input if input.dtype == torch.float64 else input.to(torch.float32)
    return formats.quantize(wide, element_type(dtype), how).to(dtype)


def _quantize_fake(input: Tensor, *_: Any, **__: Any) -> Tensor:
    import torch

    return torch.empty_like(input, memory_format=torch.contiguous_format)


def quantize_call(
    value: Any, element: Attribute, how: Rounding, sensitivity: Any = None
) -> tuple[Callable[..., Any], tuple[Any, ...], dict]:
    """Operator, arguments and keywords that round `value` into a format, or convert it into a wide type."""
    from . import formats
    from .operations._values import torch_dtype

    if formats.is_wide(element):
        if how.rounding == "rne" or not torch_dtype(element).is_floating_point:
            return operator("aten._to_copy.default"), (value,), {"dtype": torch_dtype(element)}
        return operator("mxloom.convert.default"), (value, torch_dtype(element), how.rounding, how.seed), {}
    arguments = (value, str(element), how.scale_rule, how.rounding, how.clip, how.seed, how.threshold)
    if how.exact or sensitivity is not None:
        arguments = (*arguments, how.exact, sensitivity)
    return operator("mxloom.quantize.default"), arguments, {}


@cache
def operator(name: str) -> Any:
    """The torch operator `namespace.operator.overload`.

    Raises MxloomError for a name that does not exist, and for operators that change their arguments or touch files:
    the text of a module may come from anyone.
    """
    import torch

    register()
    namespace, _, rest = name.partition(".")
    base, _, overload = rest.partition(".")
    if namespace not in ("aten", "mxloom"):
        raise MxloomError(f'operator "{name}": only those of aten and mxloom may stand in a module')
    found = getattr(getattr(getattr(torch.ops, namespace), base, None), overload or "default", None)
    if not isinstance(found, torch._ops.OpOverload):
        raise MxloomError(f'operator "{name}" is not known to torch {torch.__version__}')
    if found._schema.is_mutable or any(argument.name == "filename" for argument in found._schema.arguments):
        raise MxloomError(f'operator "{name}" changes its arguments or touches files, which no operation may')
    return found


def size_function(name: str) -> Callable[..., Any]:
    """A function on sizes by its name; raises MxloomError for one that is not on the list."""
    import torch

    known = {**_SIZE_FUNCTIONS, **{f"torch.{f}": getattr(torch, f) for f in dir(torch) if f.startswith("sym_")}}
    if name not in known:
        raise MxloomError(f'"{name}" is not arithmetic on sizes; known: {", ".join(known)}')
    return known[name]


@cache
def register() -> object:
    """Define the operators in torch, once; returns what keeps them alive."""
    import torch

    library = torch.library.Library("mxloom", "FRAGMENT")
    for name, schema in _SCHEMAS.items():
        library.define(name + schema)
    library.impl("rms_norm", rms_norm, "CompositeImplicitAutograd")
    library.impl("rope", rope, "CompositeImplicitAutograd")
    library.impl("hadamard", hadamard, "CompositeImplicitAutograd")
    _define(library, "attention", attention, _attention_fake, _recompute(attention))
    _define(library, "expert_linear", expert_linear, _expert_fake, _expert_backward)
    _define(library, "convert", convert, lambda input, dtype, *_: torch.empty_like(input, dtype=dtype), _converted_back)
    _define(library, "quantize", quantize, _quantize_fake, _straight_through)
    return library


def untraced(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """`kernel`, whose frames torch.compile leaves alone where they run beside a compiled graph.

    Where a graph breaks, torch compiles every Python frame that runs, those of operators' kernels too; what is exact
    here may not be so there, and some dtypes it does not know. (What `torch.compiler.disable` does costs each call
    some microseconds and a second of imports.)
    """
    from torch._C._dynamo import eval_frame

    skip = eval_frame._FrameAction.SKIP
    code = kernel.__code__
    eval_frame.set_code_exec_strategy(code, eval_frame._FrameExecStrategy(skip, skip))
    return kernel


def _define(library: Any, name: str, kernel: Any, fake: Any, backward: Any) -> None:
    import torch

    library.impl(name, untraced(kernel), "CompositeExplicitAutograd")
    torch.library.register_fake(f"mxloom::{name}", fake, lib=library)
    torch.library.register_autograd(f"mxloom::{name}", backward, setup_context=_keep, lib=library)


def _keep(
    ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any] | None = None, output: Any = None
) -> None:
    """Save what the backward needs: tensors apart, the rest beside them."""
    import torch

    ctx.keywords = keyword_only_inputs or {}
    ctx.others = [None if isinstance(value, torch.Tensor) else value for value in inputs]
    ctx.places = [place for place, value in enumerate(inputs) if isinstance(value, torch.Tensor)]
    ctx.save_for_backward(*[inputs[place] for place in ctx.places])


def _kept(ctx: Any) -> list[Any]:
    """The inputs that `_keep` saved, in their places."""
    values = list(ctx.others)
    for place, tensor in zip(ctx.places, ctx.saved_tensors, strict=True):
        values[place] = tensor
    return values


def _recompute(kernel: Callable[..., Tensor]) -> Callable[..., Any]:
    """A backward that runs the kernel again with gradients on."""

    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        import torch

        inputs = [
            value.detach().requires_grad_() if isinstance(value, torch.Tensor) and value.is_floating_point() else value
            for value in _kept(ctx)
        ]
        wanted = [value for value in inputs if isinstance(value, torch.Tensor) and value.requires_grad]
        with torch.enable_grad():
            output = kernel(*inputs, **ctx.keywords)
        found = iter(torch.autograd.grad(output, wanted, gradient, allow_unused=True))
        return tuple(
            next(found) if isinstance(value, torch.Tensor) and value.requires_grad else None for value in inputs
        )

    return backward


def _attention_fake(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
    return query.new_empty((*query.shape[:3], value.shape[-1]))


def _expert_fake(input: Tensor, weight: Tensor, index: Tensor, bias: Tensor | None, transposed: bool) -> Tensor:
    return input.new_empty(input.shape[0], weight.shape[2 if transposed else 1])


def _expert_backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
    import torch

    input, weight, index, bias, transposed = _kept(ctx)
    to_input, to_weight = torch.empty_like(input), torch.zeros_like(weight)
    to_bias = None if bias is None else torch.zeros_like(bias)
    for expert in range(weight.shape[0]):
        rows = (index == expert).nonzero()[:, 0]
        part, given = gradient[rows], input[rows]
        to_input[rows] = part @ (weight[expert].T if transposed else weight[expert])
        to_weight[expert] = given.T @ part if transposed else part.T @ given
        if to_bias is not None:
            to_bias[expert] = part.sum(0)
    return to_input, to_weight, None, to_bias, None


def _converted_back(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
    return gradient.to(ctx.saved_tensors[0].dtype), None, None, None


def _straight_through(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
    return gradient, *[None] * 8
