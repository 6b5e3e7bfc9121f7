"""The table of named formats: each a spelling of a type. One more instance is one more line."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache

from xdsl.context import Context
from xdsl.dialects.builtin import DYNAMIC_INDEX, Builtin, FunctionType
from xdsl.ir import Attribute, TypeAttribute
from xdsl.utils.exceptions import ParseError, VerifyException

from .arguments import came
from .errors import UsageError, did_you_mean
from .formats import FAMILIES, BlockType, FixedType, MixedType, bits, default_scale_rule, refusal
from .parsing import ModuleParser

OCP = "OCP Microscaling Formats (MX) v1.0"
NVIDIA = "NVIDIA NVFP4; arXiv 2510.25602"
BLOCK_FORM = "block<sizes x element, scale, scale of the tensor>, such as block<32xf4E2M1FN> or block<?xi8, f32>,"
LINEAR = "uniform quantization; arXiv 2106.08295"


@dataclass(frozen=True)
class Instance:
    """One named format: the text of its type for a matrix whose last dimension is reduced."""

    name: str
    text: str
    note: str
    source: str

    @property
    def type(self) -> TypeAttribute:
        return parse_format(self.text)

    @property
    def bits(self) -> float:
        """Bits per element, scales, zero points and metadata included."""
        return bits(self.type)

    @property
    def default_scale_rule(self) -> str | None:
        return default_scale_rule(self.type)


def _table(rows: Iterable[tuple[str, str, str, str]]) -> dict[str, Instance]:
    return {row[0]: Instance(*row) for row in rows}


INSTANCES = _table(
    [
        ("mxfp8_e4m3", "!mx.block<32xf8E4M3FN>", "MXFP8, more mantissa", OCP),
        ("mxfp8_e5m2", "!mx.block<32xf8E5M2>", "MXFP8, more range", OCP),
        ("mxfp6_e2m3", "!mx.block<32xf6E2M3FN>", "MXFP6, more mantissa", OCP),
        ("mxfp6_e3m2", "!mx.block<32xf6E3M2FN>", "MXFP6, more range", OCP),
        ("mxfp4", "!mx.block<32xf4E2M1FN>", "MXFP4", OCP),
        ("mxint8", "!mx.block<32x!mx.fixed<8, 6>>", "MXINT8, without -128", OCP),
        ("mxint6", "!mx.block<32x!mx.fixed<6, 4>>", "MXINT8 with 6-bit elements", "arXiv 2510.25602"),
        ("mxint4", "!mx.block<32x!mx.fixed<4, 2>>", "MXINT8 with 4-bit elements", "arXiv 2510.25602"),
        ("mxint3", "!mx.block<32x!mx.fixed<3, 1>>", "MXINT8 with 3-bit elements", "arXiv 2510.25602"),
        ("mxint2", "!mx.block<32x!mx.fixed<2, 0>>", "MXINT8 with 2-bit elements: -1, 0, 1", "arXiv 2510.25602"),
        ("nvfp4", "!mx.block<16xf4E2M1FN, f8E4M3FN, f32>", "E4M3 block scales under a tensor scale", NVIDIA),
        ("nvint4", "!mx.block<16xi4, f8E4M3FN, f32>", "NVFP4 with integer elements", NVIDIA),
        ("bfp16", "!mx.block<8x!mx.fixed<8, 6>>", "block floating point: 9 bits, one exponent for 8", "AMD XDNA BFP16"),
        ("int8_tensor", "!mx.block<?x?xi8, f32>", "symmetric, one scale", LINEAR),
        ("int8_channel", "!mx.block<?xi8, f32>", "symmetric, one scale per output channel or token", LINEAR),
        ("int8_affine", "!mx.block<?x?xi8, f32, zero i8>", "zero point, one scale", LINEAR),
        ("int8_channel_affine", "!mx.block<?xi8, f32, zero i8>", "zero point, per channel or token", LINEAR),
        ("int4_channel", "!mx.block<?xi4, f32>", "symmetric, one scale per output channel or token", LINEAR),
        ("int4_g32", "!mx.block<32xi4, bf16>", "symmetric, groups of 32", LINEAR),
        ("int4_g32_affine", "!mx.block<32xi4, bf16, zero i4>", "zero point, groups of 32", LINEAR),
        ("int4_g128", "!mx.block<128xi4, bf16>", "symmetric, groups of 128", LINEAR),
        ("int4_g128_affine", "!mx.block<128xi4, bf16, zero i4>", "zero point, groups of 128", LINEAR),
        ("int2_g64", "!mx.block<64xi2, bf16>", "symmetric, groups of 64: -1, 0, 1", LINEAR),
        ("int2_g64_affine", "!mx.block<64xi2, bf16, zero i2>", "zero point, groups of 64", LINEAR),
        ("fp8_e4m3_tensor", "!mx.block<?x?xf8E4M3FN, f32>", "one scale", "arXiv 2209.05433"),
        ("fp8_e5m2_tensor", "!mx.block<?x?xf8E5M2, f32>", "one scale", "arXiv 2209.05433"),
        ("fixed<8,6>", "!mx.fixed<8, 6>", "any fixed<width, fraction>: no scale", "two's complement"),
        ("ternary", "!mx.block<?x?x!mx.ternary, f32>", "BitNet b1.58, five trits a byte", "arXiv 2402.17764"),
        ("bf16", "bf16", "bfloat16", "truncated IEEE 754 binary32"),
        ("f16", "f16", "half", "IEEE 754 binary16"),
        ("f32", "f32", "single", "IEEE 754 binary32"),
    ]
)

MIXTURES = _table(
    [
        (
            "fgmp",
            "!mx.mixed<!mx.block<16xf4E2M1FN, f8E4M3FN, f32>, !mx.block<?x?xf8E4M3FN, f32>>",
            "each block NVFP4, or FP8 under a scale of the tensor",
            "arXiv 2504.14152",
        ),
        (
            "mxfp4_mxfp8",
            "!mx.mixed<!mx.block<32xf4E2M1FN>, !mx.block<32xf8E4M3FN>>",
            "each block MXFP4 or MXFP8",
            "arXiv 2504.14152",
        ),
        (
            "mxint4_mxint8",
            "!mx.mixed<!mx.block<32x!mx.fixed<4, 2>>, !mx.block<32x!mx.fixed<8, 6>>>",
            "each block MXINT4 or MXINT8",
            "arXiv 2504.14152",
        ),
    ]
)
"""Formats of which a tensor has two, block by block: a threshold or the pass `mix` says which."""

_NAMED = {**INSTANCES, **MIXTURES}


def format_of(format: str | Instance | Attribute, *, rank: int = 2, dims: Sequence[int] = (-1,)) -> TypeAttribute:
    """A format, laid out for a tensor of `rank` dimensions whose reduced ones are `dims`.

    `format` is the name of an instance, `fixed<8,4>`, a type's text, a type, or an instance. A block lies along the
    first of `dims`; `?` takes every one of `dims` whole; a scale for the tensor takes all of them. A block of several
    dimensions, not all of them `?`, stands as it is written. Raises UsageError for an unknown name, a wrong text, and a
    type into which nothing is rounded (`i8`, `f64`).
    """
    if not all(-rank <= dim < rank for dim in dims) or not dims:
        raise UsageError(f"dimensions {list(dims)} do not lie in a tensor of {rank} dimensions")
    reduced = [dim if dim < 0 else dim - rank for dim in dims]
    return _laid_out(_spelled(format), rank, reduced)


def _spelled(format: str | Instance | Attribute) -> TypeAttribute:
    """The type as it was given, before it is laid out."""
    if isinstance(format, Instance):
        return format.type
    if isinstance(format, str):
        return parse_format(_NAMED[format].text if format in _NAMED else format)
    if not isinstance(format, TypeAttribute):
        raise UsageError(
            f"a format is a name, a type's text or a type, got {came(format)}; `mxloom formats` lists them"
        )
    if reason := refusal(format):
        raise UsageError(f"{format} is not a format: {reason}")
    return format


def name_of(fmt: Attribute) -> str:
    """The name of the instance that `fmt` is a layout of; the type's text where there is none."""
    if isinstance(fmt, FixedType):
        return f"fixed<{fmt.width.data},{fmt.fraction.data}>"
    return _names().get(_canonical(fmt), str(fmt))


@lru_cache(maxsize=1024)
def parse_format(text: str) -> TypeAttribute:
    """The format type that a text spells (`!mx.` may be left out). Raises UsageError."""
    spelled = re.sub(r"^(fixed|float|block|mixed)<", r"!mx.\1<", text.strip())
    context = Context()
    context.load_dialect(Builtin)
    for family in FAMILIES:
        context.load_attr_or_type(family)
    try:  # as the one input of a function type, so that nothing may follow it
        found = ModuleParser(context, f"({spelled}) -> ()", "<format>").parse_type()
    except VerifyException as error:
        raise UsageError(f"{text!r} is not a format: {error}") from error
    except ParseError as error:
        if "<" in text:
            raise UsageError(f"{text!r} is not the text of a format: {_reason(error)}{_forms(text)}") from error
        near = did_you_mean(text, _NAMED) or "; `mxloom formats` lists them"
        raise UsageError(f"unknown format {text!r}{near}{_forms(text)}") from error
    if not isinstance(found, FunctionType) or len(found.inputs) != 1 or len(found.outputs):
        raise UsageError(f"{text!r} is not the text of one format")
    (fmt,) = found.inputs
    if reason := refusal(fmt):
        raise UsageError(f"{text!r} is not a format: {reason}")
    assert isinstance(fmt, TypeAttribute)
    return fmt


def _reason(error: ParseError) -> str:
    lines = [line.strip(" ^") for line in str(error).splitlines()]
    return next((line for line in reversed(lines) if line), "it does not parse")


def _forms(text: str) -> str:
    """How the families of formats that the text names are written: `fixed<width,fraction>`."""
    if (name := text.partition("<")[0].strip()) in INSTANCES:
        return f"; the form is {name} alone"
    forms: list[str] = []
    for family in FAMILIES:
        name = family.name.removeprefix("mx.")
        definition = family.get_irdl_definition()  # pyright: ignore[reportAttributeAccessIssue]
        parameters = ",".join(parameter for parameter, _ in definition.parameters)
        if parameters and re.search(rf"\b{name}\b", text, re.IGNORECASE):
            forms.append(BLOCK_FORM if family is BlockType else f"{name}<{parameters}>")
    return f"; the form is {' and '.join(forms).rstrip(',')}" if forms else ""


@lru_cache(maxsize=1)
def _names() -> dict[Attribute, str]:
    return {_canonical(instance.type): instance.name for instance in _NAMED.values()}


def _canonical(fmt: Attribute) -> Attribute:
    """A layout as it stands in the table: `32x1` as `32`, `1x?x?` as `?`, `?x?x?` as `?x?`."""
    if isinstance(fmt, MixedType):
        return MixedType(_canonical(fmt.low), _canonical(fmt.high))  # pyright: ignore[reportArgumentType]
    if not isinstance(fmt, BlockType):
        return fmt
    sizes = [dim for dim in fmt.dims if dim != 1]
    if len(sizes) > 1 and set(sizes) == {DYNAMIC_INDEX}:
        return fmt.with_dims(sizes[:1] if 1 in fmt.dims else sizes[:2])
    return fmt.with_dims(sizes) if len(sizes) == 1 else fmt


def _laid_out(fmt: TypeAttribute, rank: int, reduced: Sequence[int]) -> TypeAttribute:
    if isinstance(fmt, MixedType):
        return MixedType(_laid_out(fmt.low, rank, reduced), _laid_out(fmt.high, rank, reduced))
    if not isinstance(fmt, BlockType):
        return fmt
    if len(fmt.dims) == 1:
        return fmt.with_dims(_along(fmt.dims[0], rank, reduced))
    return fmt.with_dims([DYNAMIC_INDEX] * rank) if set(fmt.dims) == {DYNAMIC_INDEX} else fmt


def _along(step: int, rank: int, reduced: Sequence[int]) -> list[int]:
    """Block sizes of the last dimensions: `step` along the reduced ones, 1 elsewhere."""
    if step != DYNAMIC_INDEX:
        return [step, *[1] * (-reduced[0] - 1)]
    if len(reduced) == 1:
        return [step, *[1] * (-reduced[0] - 1)]
    return [DYNAMIC_INDEX if dim in reduced else 1 for dim in range(-rank, 0)]
