"""What a compiled model is called with: checked against the types of its inputs, in words."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from xdsl.dialects.builtin import TensorType
from xdsl.ir import SSAValue

from ..dialects.arguments import came
from ..dialects.errors import UsageError
from ..dialects.names import identifier, unique
from ..dialects.operations._shapes import element_of, fits, shape_of, text
from ..dialects.operations._values import torch_dtype

if TYPE_CHECKING:
    from torch import Tensor

    from .model_source import ModelSource


def fitted(given: Any, argument: SSAValue, what: str) -> Any:
    """`given` as the module reads it; `what` names the input in errors.

    A float tensor of another dtype is converted: exact from bf16 and f16, to nearest from f64. Integers and booleans
    are converted where every value survives. Raises UsageError for anything else, and for sizes that do not fit.
    """
    import torch

    if not isinstance(argument.type, TensorType):
        return given
    wanted = f"wanted: a tensor {text(shape_of(argument))} of {element_of(argument)}"
    if not isinstance(given, torch.Tensor):
        raise UsageError(f"{what} is {came(given)}; {wanted}")
    if given.is_nested or given.layout != torch.strided:
        raise UsageError(f"{what} is a nested or sparse tensor; {wanted}")
    if given.is_meta:
        raise UsageError(f"{what} lies on the meta device and has no values; {wanted}")
    if not fits(shape_of(argument), tuple(given.shape)):
        raise UsageError(f"{what} has the shape {list(given.shape)}; {wanted} (a size without ? was fixed in capture)")
    dtype = torch_dtype(element_of(argument))
    if given.dtype == dtype:
        return given
    if given.is_complex() or given.is_floating_point() != dtype.is_floating_point:
        raise UsageError(f"{what} holds {given.dtype}; {wanted}")
    return given.to(dtype) if dtype.is_floating_point else _whole(given, dtype, f"{what} holds {given.dtype}; {wanted}")


def _whole(given: Tensor, dtype: Any, refusal: str) -> Tensor:
    """Integers or booleans in another dtype. Raises UsageError where a value would change."""
    converted = given.to(dtype)
    if not bool((converted.to(given.dtype) == given).all()):
        raise UsageError(f"{refusal}, and not all of its values are of that type")
    return converted


def completed(given: Mapping[str, Any], names: Sequence[str], config: Any) -> dict[str, Any]:
    """The inputs, and those that follow from the tokens where they are left out: nothing is padding, one segment."""
    from .example_inputs import has_segments

    found: dict[str, Any] = dict(given)
    ids: Any = given.get("input_ids")
    if hasattr(ids, "new_ones"):
        if "attention_mask" in names:
            found.setdefault("attention_mask", ids.new_ones(ids.shape))
        if "token_type_ids" in names and has_segments(config):
            found.setdefault("token_type_ids", ids.new_zeros(ids.shape))
    return found


def not_captured(source: ModelSource, name: str) -> str:
    """What to do about an input that the model takes and that it was captured without; nothing where it takes none."""
    if name not in inspect.signature(source.model.forward).parameters:
        return ""
    return (
        f". {type(source.model).__name__} takes {name!r} too, but was captured without it: name it, as a tensor, in "
        "the inputs to compile with, mxloom.compile(..., example={...})"
    )


def field_names(names: Sequence[str]) -> list[str]:
    """The names of outputs as those of a named tuple's fields: Python names, none twice, none with `_` in front."""
    fields: list[str] = []
    for name in names:
        plain = identifier(name)
        fields.append(unique(f"output{plain}" if plain.startswith("_") else plain, fields.__contains__))
    return fields
