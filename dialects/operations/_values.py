"""Python values as attributes and back; torch dtypes as element types and back; SSA names from module paths."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from xdsl.dialects import builtin
from xdsl.dialects.builtin import ArrayAttr, FloatAttr, IntegerAttr, NoneType, StringAttr, UnitAttr
from xdsl.ir import Attribute, SSAValue, TypeAttribute

from ..errors import MxloomError

if TYPE_CHECKING:
    import torch

ELEMENT_TYPES: dict[str, TypeAttribute] = {
    "float64": builtin.f64,
    "float32": builtin.f32,
    "bfloat16": builtin.bf16,
    "float16": builtin.f16,
    "int64": builtin.i64,
    "int32": builtin.i32,
    "int16": builtin.i16,
    "int8": builtin.i8,
    "uint8": builtin.IntegerType(8, builtin.Signedness.UNSIGNED),
    "bool": builtin.i1,
}
DTYPE_NAMES: dict[Attribute, str] = {element: name for name, element in ELEMENT_TYPES.items()}


def element_type(dtype: torch.dtype) -> TypeAttribute:
    """The element type that means `dtype`; raises MxloomError for one that the dialect does not read."""
    name = str(dtype).removeprefix("torch.")
    if name not in ELEMENT_TYPES:
        raise MxloomError(f"torch.{name} is not a type that can be imported; known: {', '.join(ELEMENT_TYPES)}")
    return ELEMENT_TYPES[name]


def torch_dtype(element: Attribute) -> torch.dtype:
    """How a tensor of `element` is held at run time: builtin wide types as they are, every other format as f32."""
    import torch

    return getattr(torch, DTYPE_NAMES.get(element, "float32"))


def encode(value: Any, symbols: list[SSAValue] | None = None) -> Attribute:
    """A Python value as an attribute. An SSA value goes to `symbols` and leaves `unit` in its place.

    Raises TypeError for what has no attribute form, an SSA value without `symbols` included.
    """
    match value:
        case SSAValue() if symbols is not None:
            symbols.append(value)
            return UnitAttr()
        case None:
            return NoneType()
        case bool():
            return IntegerAttr(int(value), 1)
        case int():
            return IntegerAttr(value, 64)
        case float():
            return FloatAttr(value, 64)
        case str():
            return StringAttr(value)
        case list() | tuple():
            return ArrayAttr([encode(item, symbols) for item in value])
        case Attribute():
            return value
    if str(value).startswith("torch.") and str(value).removeprefix("torch.") in ELEMENT_TYPES:
        return element_type(value)
    raise TypeError(f"{type(value).__name__} {value} has no attribute form")


def decode(attribute: Attribute, symbols: Iterator[SSAValue]) -> Any:
    """The inverse of `encode`: `unit` takes the next of `symbols`."""
    match attribute:
        case UnitAttr():
            return next(symbols)
        case NoneType():
            return None
        case IntegerAttr():
            number = attribute.value.data
            return bool(number) if attribute.type == builtin.i1 else number
        case FloatAttr():
            return attribute.value.data
        case StringAttr():
            return attribute.data
        case ArrayAttr():
            return [decode(item, symbols) for item in attribute]
    return torch_dtype(attribute)


def hint_of(path: str) -> str:
    """A module path as an SSA name: `_` before a leading digit, `.` after a final `_3`, which xDSL would cut off."""
    name = re.sub(r"[^A-Za-z0-9_.$-]", "_", path)
    name = name if re.match(r"[A-Za-z_$.-]", name) else "_" + name
    return name + "." if re.search(r"_\d+$", name) else name


def path_of(value: SSAValue) -> str:
    """The module path behind a value's name; the inverse of `hint_of`."""
    name = (value.name_hint or "").removesuffix(".")
    return name[1:] if re.match(r"_\d", name) else name
