"""`Compiled.to_hf()`: the numerics of a typed module inside its Hugging Face model, `generate()` and cache included."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import deepcopy
from functools import cache, partial
from hashlib import sha256
from typing import TYPE_CHECKING, Any, cast

from xdsl.dialects.builtin import TensorType, f32
from xdsl.ir import Attribute, Operation, SSAValue, TypeAttribute

from ..backends.reference import constants
from ..dialects.errors import MxloomError
from ..dialects.formats import is_wide
from ..dialects.integer_attribute import IntegerMeaningAttr
from ..dialects.operations._operation import AsCodes
from ..dialects.operations.attention import AttentionOp
from ..dialects.operations.cast import CastOp
from ..dialects.operations.contraction import Contraction, ConvOp, EmbeddingOp, ExpertLinearOp, LinearOp
from ..dialects.operations.hadamard import HadamardOp
from ..dialects.operations.parameter import ParameterOp
from ..dialects.windows import WindowAttr
from ..passes._sites import module_name, root
from .capture import register
from .precision import widen

if TYPE_CHECKING:
    from torch import Tensor, nn

    from .compiled import Compiled

Round = Callable[["Tensor"], "Tensor"]

NEWEST = ("wide_key", "wide_value")
"""The operands of attention for the newest positions of a cache, which it does not round."""


def to_hf(compiled: Compiled) -> Any:
    """A Hugging Face model in f32 that rounds as the typed module does, with the cache and sampling of transformers.

    Each linear, convolution and embedding gets its rounded weight and rounds its input; attention rounds its operands
    behind the cache. A layer with an accumulator multiplies the codes of its weight, and raises MxloomError where the
    weight was changed since; inside torch.compile, which looks at no values, and where it is written through `.data`,
    of which torch keeps no count, it does not. `save_pretrained` is refused where anything but weights is rounded.
    Raises MxloomError, naming the operation, where a cast belongs to no module.
    """
    model: Any = compiled.source.loaded()
    model = deepcopy(model) if model is compiled.source.model else model
    if not hasattr(model, "set_attn_implementation"):
        raise MxloomError(f"{compiled.source.name} is no Hugging Face model; call the compiled model itself")
    widen(model.eval())
    model.config.dtype = next((tensor.dtype for tensor in model.parameters()), model.config.dtype)
    register()
    model.set_attn_implementation("mxloom")
    _untie(model)
    _set_changed(model, compiled)
    reached: set[Operation] = set()
    codes, own = _weight_codes(compiled), frozenset(compiled.source.state)
    for op in compiled.function.walk():
        if any(isinstance(stated, WindowAttr | IntegerMeaningAttr) for stated in op.properties.values()):
            raise MxloomError(
                f"%{op.results[0].name_hint or '?'} is computed in integers, as no Hugging Face module does; "
                "run the compiled model itself"
            )
        if isinstance(op, (Contraction, EmbeddingOp)):
            _transfer(op, model, compiled, reached, own)
        if isinstance(op, LinearOp | ExpertLinearOp) and op.acc is not None:
            _sum_exactly(op, model, compiled, codes)
    for op in compiled.function.walk():
        if isinstance(op, CastOp | HadamardOp) and op not in reached:
            what = "cast" if isinstance(op, CastOp) else "rotation"
            raise MxloomError(
                f"the {what} %{op.result.name_hint or '?'} changes a value between the modules of "
                f"{compiled.source.name}, which no Hugging Face module stands for; run the compiled model itself"
            )
        if isinstance(op, ParameterOp) and _is_made(op.result, own):
            _check_read(op.result, compiled)
    if any(hasattr(module, "round_input") or hasattr(module, "mxloom_attention") for module in model.modules()):
        model.save_pretrained = _no_folder
    return model


def _no_folder(*_: Any, **__: Any) -> None:
    """Refuse to write the model without what it rounds at run time."""
    raise MxloomError(
        "a Hugging Face folder holds no rounding of inputs, so the model that it loads would compute something else: "
        "use save() of the compiled model, which mxloom.load() reads, or keep the rounded weights by state_dict()"
    )


def _set_changed(model: nn.Module, compiled: Compiled) -> None:
    """The model's own parameters as passes have left them: gains of norms, biases, and weights under their own names.

    Others are those of contractions and look-ups, which `_transfer` sets.
    """
    import torch

    held, before = compiled.weights, compiled.source.weights
    if held is before:
        return
    for path, module in model.named_modules():
        for own in [name for name, _ in module.named_parameters(recurse=False)]:
            name = f"{path}.{own}" if path else own
            if name in held and name in before and not torch.equal(values := held.wide(name), before.wide(name)):
                setattr(module, own, torch.nn.Parameter(values.clone(), requires_grad=False))


def _transfer(
    op: Operation, model: nn.Module, compiled: Compiled, reached: set[Operation], own: frozenset[str]
) -> None:
    names = op.reduced() if isinstance(op, Contraction) else {"weight": (-1,)}
    casts = {name: _casts(getattr(op, name)) for name in names if name != "probabilities"}
    changed = any(casts.values()) or any(not is_wide(_element(getattr(op, n))) for n in casts)
    changed = changed or ("weight" in casts and _is_made(op.weight, own))  # pyright: ignore[reportAttributeAccessIssue]
    if isinstance(op, LinearOp | ConvOp) and op.bias is not None and _is_made(op.bias, own):
        _set_bias(_submodule(model, module_name(op), compiled), op.bias, compiled)
    if not changed and not getattr(op, "probabilities", None):
        return
    if isinstance(op, AttentionOp):
        casts |= {name: _casts(value) for name in NEWEST if (value := getattr(op, name)) is not None}
    for chain in casts.values():
        reached.update(chain)
    if isinstance(op, AttentionOp):
        _attention(op, _submodule(model, module_name(op), compiled, attention=True), casts)
        return
    module = _submodule(model, module_name(op), compiled)
    if "weight" in casts:
        _set_weight(module, op, compiled)
    if casts.get("input"):
        _round_input(module, _rounding(casts["input"]))


def _weight_codes(compiled: Compiled) -> dict[Any, Any]:
    """The weights of layers that state an accumulator, as codes."""
    if not any(isinstance(op, LinearOp) and op.acc is not None for op in compiled.function.walk()):
        return {}
    found = constants(compiled.function.body.block, compiled.weights)[0]
    return {key: value for key, value in found.items() if isinstance(key, AsCodes)}


def _sum_exactly(op: LinearOp | ExpertLinearOp, model: nn.Module, compiled: Compiled, codes: dict[Any, Any]) -> None:
    """Let the module of a layer sum as its accumulator says, from the codes of its weight and of its input."""
    from ..backends.kernels.contraction.exact_layers import ExactLayers, register
    from ..backends.kernels.contraction.exact_linear import ExactLinear

    register()
    module: Any = _submodule(model, module_name(op), compiled)
    weight, chain = codes.get(AsCodes(op.weight, op.transposed is not None)), _casts(op.input)
    last = chain[-1] if chain else None
    elsewhere = isinstance(op, ExpertLinearOp) or op.result.type != _wide_type(op)
    if elsewhere or not isinstance(last, CastOp) or weight is None or op.acc is None:
        raise MxloomError(
            f"%{module_name(op)} sums codes that no Hugging Face module has; run the compiled model itself"
        )
    bias = None if module.bias is None else module.bias.detach()
    layer = ExactLinear(weight, bias, op.acc, _element(op.input))
    module.__class__ = _exact(type(module))
    module.round_input = _rounding(chain[:-1])
    module.exact = ExactLayers([layer], str(_element(op.input)), last.how())
    module.packed_from, module.packed_name = _digest(module), module_name(op)
    module.packed_state = _state(module)


def _check_weights(module: Any) -> None:
    """Raise MxloomError where weight or bias are no longer those whose codes the layer multiplies."""
    import torch

    state = _state(module)
    if state == module.packed_state:
        return
    if module.weight.dtype != torch.float32:
        raise MxloomError(
            f"{module.packed_name} was converted to {module.weight.dtype}, but layers on codes sum in f32"
        )
    if _digest(module) != module.packed_from:
        raise MxloomError(
            f"the weight or bias of {module.packed_name} was changed, but the layer sums the codes of the old one: "
            "change the model, compile it anew, and take to_hf() of that"
        )
    module.packed_state = state


def _state(module: Any) -> tuple[Any, ...]:
    """What changes whenever the parameters may have changed, but by writes through `.data`."""
    held = [tensor for tensor in (module.weight, module.bias) if tensor is not None]
    return tuple((id(tensor), tensor.data_ptr(), _version(tensor)) for tensor in held if not tensor.is_meta)


def _version(tensor: Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version  # torch counts no versions of inference tensors


def _digest(module: Any) -> str:
    import torch

    held = [tensor for tensor in (module.weight, module.bias) if tensor is not None]
    if any(tensor.is_meta for tensor in held):
        return str(module.packed_from)
    content = [tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes() for tensor in held]
    return sha256(b"".join(content)).hexdigest()


def _wide_type(op: LinearOp) -> TensorType:
    return TensorType(f32, op.result.type.get_shape())


@cache
def _exact(kind: type[nn.Module]) -> type[nn.Module]:
    """`kind` whose sums are those of an accumulator; parameter names and everything else stay."""
    from torch.compiler import is_compiling

    def forward(self: Any, input: Tensor) -> Tensor:
        if not is_compiling():
            _check_weights(self)
        return self.exact(self.round_input(input))[0]

    return type(f"Exact{kind.__name__}", (kind,), {"forward": forward, "__doc__": f"{kind.__name__} on codes."})


def _element(value: SSAValue) -> Attribute:
    return value.type.element_type  # pyright: ignore[reportAttributeAccessIssue]


def _is_made(value: SSAValue, own: frozenset[str]) -> bool:
    """Whether a pass made a parameter from one of the `own` ones of the model, and named it after it."""
    owner = root(value).owner
    name = owner.source.data if isinstance(owner, ParameterOp) else ""
    return name not in own and any(name[:end] in own for end, mark in enumerate(name) if mark == ".")


def _check_read(value: SSAValue, compiled: Compiled) -> None:
    """MxloomError where something else than a module's weight or bias is a parameter that a pass made."""
    for use in value.uses:
        if isinstance(use.operation, CastOp):
            _check_read(use.operation.result, compiled)
        elif not isinstance(use.operation, Contraction | EmbeddingOp):
            raise MxloomError(
                f"%{value.name_hint}, which a pass made, is read by {use.operation.name}, and no module of "
                f"{compiled.source.name} has it as weight or bias; run the compiled model itself"
            )


def _set_bias(module: nn.Module, value: SSAValue, compiled: Compiled) -> None:
    import torch

    owner = cast(ParameterOp, root(value).owner)
    module.bias = torch.nn.Parameter(compiled.weights.wide(owner.source.data).clone(), requires_grad=False)


def _casts(value: SSAValue) -> list[CastOp | HadamardOp]:
    """What changes an operand before it is read: the casts and rotations above its root, the one next to it first."""
    chain: list[CastOp | HadamardOp] = []
    while isinstance(value.owner, CastOp | HadamardOp):
        chain.insert(0, value.owner)
        value = value.owner.input
    return chain


def _rounding(chain: Sequence[CastOp | HadamardOp]) -> Round:
    # The calls are made once, so that torch.compile meets operators and nothing of ours.
    return partial(_round, calls=[_changing(op) for op in chain])


def _changing(op: CastOp | HadamardOp) -> tuple[Callable[..., Tensor], tuple[Any, ...], dict[str, Any]]:
    """The operator that an operation means, with its arguments but for the first."""
    from ..dialects.torch_operators import quantize_call

    if isinstance(op, HadamardOp):
        call = op.call()
        return call.target, call.args[1:], call.kwargs
    operator, args, kwargs = quantize_call(None, cast(TensorType, op.result.type).element_type, op.how())
    return operator, args[1:], kwargs


def _round(x: Tensor, calls: list[tuple[Callable[..., Tensor], tuple[Any, ...], dict[str, Any]]]) -> Tensor:
    for operator, args, kwargs in calls:
        x = operator(x, *args, **kwargs)
    return x


def _submodule(model: nn.Module, name: str, compiled: Compiled, *, attention: bool = False) -> nn.Module:
    """The module that an operation stands for; attention belongs to the module that it was traced in."""
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        try:
            module = model.get_submodule(".".join(parts[:end]))
        except AttributeError:
            continue
        if end == len(parts) or attention:
            return module
        break
    raise MxloomError(
        f"%{name} is no module of {compiled.source.name}, so no Hugging Face model can round as it does; "
        "run the compiled model itself"
    )


def _set_weight(module: nn.Module, op: Any, compiled: Compiled) -> None:
    import torch

    value = op.weight
    held = compiled.weights
    base = root(value)
    if not isinstance(base.owner, ParameterOp):
        raise MxloomError(f"the weight of %{module_name(op)} is computed in the model and cannot be replaced")
    parameter = base.owner
    format = cast(TypeAttribute, parameter.result.type.element_type)
    name = parameter.source.data
    if is_wide(format):
        weight = held.wide(name)
    else:
        weight = held.encoded(name, format, parameter.result.type.get_shape()).decode()
    weight = _rounding(_casts(value))(weight)
    module.weight = torch.nn.Parameter(weight, requires_grad=False)


def _round_input(module: Any, rounding: Round) -> None:
    module.__class__ = _emulated(type(module))
    module.round_input = rounding


@cache
def _emulated(kind: type[nn.Module]) -> type[nn.Module]:
    """`kind` with its input rounded first; parameter names and everything else stay."""

    def forward(self: Any, input: Tensor) -> Tensor:
        return kind.forward(self, self.round_input(input))

    return type(
        f"Emulated{kind.__name__}", (kind,), {"forward": forward, "__doc__": f"{kind.__name__} on rounded input."}
    )


def _attention(op: AttentionOp, module: Any, casts: dict[str, list[CastOp | HadamardOp]]) -> None:
    """Leave the formats with the attention module, where the attention interface finds them."""
    rounding: dict[str, Any] = {name: _rounding(chain) for name, chain in casts.items() if chain or name in NEWEST}
    keywords: dict[str, Any] = {}
    if op.probabilities is not None:
        keywords = {
            "probabilities": str(op.probabilities),
            "scale_rule": op.scale_rule.data if op.scale_rule else None,
            "rounding": op.rounding.data if op.rounding else "rne",
        }
    for name in ("key_wide", "key_step", "value_wide", "value_step"):
        if (number := getattr(op, name)) is not None:
            keywords[name] = number.value.data
    if op.window is not None and max(keywords.get(name, 1) for name in ("key_step", "value_step")) > 1:
        raise MxloomError(
            f"the cache of %{module_name(op)} rounds several positions together, and transformers drops what has left "
            f"its window of {op.window.value.data} positions: what is left of a group cannot be rounded again; run the "
            "compiled model itself, or round this layer's keys and values per token"
        )
    module.mxloom_attention = rounding | ({"keywords": keywords} if keywords else {})


def _untie(model: nn.Module) -> None:
    """Give tied weights apart, so that one may be replaced without the other."""
    config = getattr(model, "config", None)
    if config is not None and getattr(config, "tie_word_embeddings", False):
        config.tie_word_embeddings = False
