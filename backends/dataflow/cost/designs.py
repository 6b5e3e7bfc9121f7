"""Designs written as one line each, and the lists of those that the cost model is fitted on and tested with.

A line is a kind and its numbers: `dot a=int8 b=e2m1 lanes=8 segment=32 window=32`. An operand is its elements (`int5`,
`e4m3`, `trit`, or `e2m1/e4m3` where each block is of one of two kinds), and behind colons its scale and block length
where they are not E8M0 and 32: `e2m1:e4m3:16`, `int4:bf16:4x32` (four rows share a scale), `int8:none`. Numbers between
stages have so many bits, half of them behind the point, or as many as stand behind the dot: `24.22`. Sums go into a
window, or with `acc=f32 partials=4 segments=6` into partial sums in f32.
"""

from __future__ import annotations

import re
from math import prod
from pathlib import Path

from ....dialects.errors import MxloomError
from ....dialects.integer import Point, Table
from ..codes import E8M0, F32, ElementCode, OperandCode, ScaleCode
from ..dot_product import Accumulator, DotProduct
from ..float_sum import FloatSum
from ..stages._stream import Stage
from ..stages.contraction import Contraction
from ..stages.normalize import Normalize
from ..stages.patches import Patches, Sliding
from ..stages.pointwise import Binary, Convert
from ..stages.pool import Pool
from ..stages.quantize import Quantize
from ..stages.quantize_mixed import QuantizeMixed
from ..stages.quantize_scaled import QuantizeScaled
from ..stages.rope import Rope
from ..stages.route import Axis, Fifo, Fork, Reorder
from ..stages.select import Select
from ..stages.softmax import Softmax
from ..stages.table import Activation
from ..window import Window

BF16 = ScaleCode(16, 8, 7, -126 - 7, "exponent")
SCALES = {"e8m0": E8M0, "f32": F32, "bf16": BF16, "none": None}


def element_code(text: str) -> ElementCode:
    """`int8` (as in MXINT8, between -2 and 2), `trit`, or `e4m3`, with the NaNs of the OCP formats of those names."""
    if text == "trit":
        return ElementCode(2, 0, 0, 0, 1)
    if found := re.fullmatch(r"int(\d+)", text):
        bits = int(found[1])
        return ElementCode(bits, 0, 0, 2 - bits, 1 << (bits - 1))
    if found := re.fullmatch(r"e(\d)m(\d)", text):
        exponent, mantissa = int(found[1]), int(found[2])
        nan = {"e4m3": "code", "e5m2": "exponent"}.get(text, "none")
        most = (1 << (mantissa + 1)) - 1 - (nan == "code")
        largest = most << ((1 << exponent) - 2 - (nan == "exponent"))
        unit = 2 - (1 << (exponent - 1)) - mantissa
        return ElementCode(1 + exponent + mantissa, exponent, mantissa, unit, largest, nan)
    raise MxloomError(f'"{text}" is no element: int8, e4m3, trit are')


def operand(text: str) -> OperandCode:
    """An operand as the lists write it."""
    elements, _, rest = text.partition(":")
    scale_text, _, block_text = rest.partition(":")
    if scale_text in SCALES:
        scale = SCALES[scale_text]
    elif scale_text:
        number = element_code(scale_text)
        scale = ScaleCode(number.bits, number.exponent_bits, number.mantissa_bits, number.unit, number.nan)
    else:
        scale = E8M0
    block, rows = _block(elements, scale_text, block_text)
    return OperandCode(text, tuple(element_code(part) for part in elements.split("/")), scale, block, block_rows=rows)


def _block(elements: str, scale: str, shape: str) -> tuple[int | None, int | None]:
    """(numbers along the sum, rows) that share a scale, None for all: of `16`, `4x32`, `?x?`, or what is usual."""
    if shape:
        rows, _, length = shape.rpartition("x")
        return None if length == "?" else int(length), None if rows == "?" else int(rows or 1)
    if scale in ("", "e8m0"):
        return 32, 1
    # A ternary tensor has one scale, other numbers one for each row.
    return None, None if elements == "trit" and scale != "none" else 1


def design_of(line: str) -> DotProduct | Stage:
    """The unit or stage that a line describes. Raises MxloomError for a line that describes none."""
    kind, *words = line.split()
    given = dict(word.split("=", 1) for word in words)
    if kind not in _KINDS:
        raise MxloomError(f'"{kind}" is no kind of design: {", ".join(_KINDS)} are')
    return _KINDS[kind](given)


def _point(given: dict[str, str], name: str, width: int = 24) -> Point:
    bits, _, fraction = given.get(name, str(width)).partition(".")
    return Point(int(bits), int(fraction or int(bits) // 2))


def _dot(given: dict[str, str]) -> DotProduct:
    a, b = operand(given["a"]), operand(given.get("b", given["a"]))
    lanes, segment = int(given["lanes"]), int(given.get("segment", 32))
    bias = Point(int(given["bias"]), int(given["bias"]) - 8) if "bias" in given else None
    return DotProduct(a, b, lanes, segment, _accumulator(given, segment), bias)


def _accumulator(given: dict[str, str], segment: int) -> Accumulator:
    match given.get("acc", "window"):
        case "window":
            return Window(int(given["window"]), int(given.get("lsb", -16)))
        case "f32":
            segments = -(-int(given["size"]) // segment) if "size" in given else int(given["segments"])
            return FloatSum(int(given["partials"]), segments, _point(given, "result"))
        case other:
            raise MxloomError(f'"acc={other}" is no accumulator: window and f32 are')


def _contraction(given: dict[str, str]) -> Contraction:
    return Contraction(
        _dot(given),
        int(given.get("rows", 16)),
        int(given["columns"]),
        int(given["size"]),
        _point(given, "result"),
        int(given.get("copies", 1)),
        given.get("dynamic") == "1",
    )


def _quantize(given: dict[str, str]) -> Quantize:
    code, size = operand(given["to"]), int(given["size"])
    return Quantize(_point(given, "given"), code, int(given["lanes"]), 16, size, given.get("rule", "floor"))


def _quantize_mixed(given: dict[str, str]) -> QuantizeMixed:
    code = operand(given["to"])
    lanes = code.block or int(given["size"])
    return QuantizeMixed(_point(given, "given"), code, lanes, 16, int(given["size"]), float(given["threshold"]))


def _quantize_scaled(given: dict[str, str]) -> QuantizeScaled:
    code, size = operand(f"e2m1:e4m3:{given['block']}"), int(given["size"])
    return QuantizeScaled(_point(given, "given"), code, int(given["block"]), 16, size)


def _normalize(given: dict[str, str]) -> Normalize:
    weight = _point(given, "weight") if "weight" in given else None
    bias = _point(given, "bias") if "bias" in given else None
    centred = given.get("centred") == "1"
    return Normalize(
        _point(given, "given"), _point(given, "result"), 16, int(given["size"]), 1e-5, weight, bias, centred
    )


def _softmax(given: dict[str, str]) -> Softmax:
    size, causal = int(given["size"]), given.get("causal") == "1"
    result = Point(int(given["result"]), int(given["result"]) - 2)
    return Softmax(_point(given, "given"), result, size, size, int(given["bits"]), 0.125, causal, size if causal else 1)


def _activation(given: dict[str, str]) -> Activation:
    return Activation(Table(given["curve"], _point(given, "given"), _point(given, "result"), int(given["bits"])), 64)


def _rope(given: dict[str, str]) -> Rope:
    table = Point(int(given["table"]), int(given["table"]) - 2)
    return Rope(_point(given, "given"), _point(given, "result"), table, 16, int(given["size"]), 16)


def _binary(given: dict[str, str]) -> Binary:
    return Binary(given["operation"], _point(given, "a"), _point(given, "b"), _point(given, "result"), 64)


def _convert(given: dict[str, str]) -> Convert:
    factor = int(given.get("factor", 1))
    return Convert(_point(given, "given"), _point(given, "result"), 64, factor, max(0, factor.bit_length() - 1))


def _reorder(given: dict[str, str]) -> Reorder:
    sizes = [int(size) for size in given["axes"].split("x")]
    axes, stride = list[Axis](), 1
    for size in sizes:  # a transpose: the first axis moves by one word, the next by a whole row of those
        axes.append(Axis(size, stride))
        stride *= size
    return Reorder(int(given["width"]), prod(sizes), tuple(axes))


def _select(given: dict[str, str]) -> Select:
    size, inner, first, kept = (int(given[name]) for name in ("size", "inner", "first", "kept"))
    return Select(int(given["width"]), 1, size, inner, first, kept)


def _patches(given: dict[str, str]) -> Patches:
    size, kernel = (int(given[name]) for name in ("size", "kernel"))
    sliding = Sliding(size, kernel, int(given["stride"]), int(given["padding"]))
    by_channel = given.get("by_channel") == "1"
    return Patches(int(given["width"]), int(given["channels"]), sliding, sliding, by_channel=by_channel)


def _pool(given: dict[str, str]) -> Pool:
    count, inner = int(given["count"]), int(given.get("inner", 1))
    return Pool(given["operation"], _point(given, "given"), _point(given, "result"), 16, count, inner)


_KINDS = {
    "dot": _dot,
    "contraction": _contraction,
    "quantize": _quantize,
    "quantizemixed": _quantize_mixed,
    "quantizescaled": _quantize_scaled,
    "normalize": _normalize,
    "softmax": _softmax,
    "activation": _activation,
    "rope": _rope,
    "binary": _binary,
    "convert": _convert,
    "fork": lambda given: Fork(int(given["width"]), int(given["ways"]), 64),
    "fifo": lambda given: Fifo(int(given["width"]), int(given["depth"]), 64),
    "reorder": _reorder,
    "select": _select,
    "patches": _patches,
    "pool": _pool,
}


def fit_designs() -> list[str]:
    """The designs whose measurements the coefficients come from."""
    return _lines("fit")


def held_out_designs() -> list[str]:
    """The designs that no coefficient has seen: other formats, lanes, windows and sizes."""
    return _lines("held out")


def blind_designs() -> list[str]:
    """Units that were written down before any run of theirs, and that no weight or feature was chosen with."""
    return _lines("blind")


def quick_designs() -> list[str]:
    """A few small designs of each kind, which show that calibration works."""
    found = dict[str, list[str]]()
    for line in fit_designs():
        found.setdefault(line.split()[0], []).append(line)
    return [line for lines in found.values() for line in sorted(lines, key=len)[:2]]


def _lines(part: str) -> list[str]:
    text = Path(__file__).with_name("designs.txt").read_text(encoding="utf-8")
    found: list[str] = []
    current = ""
    for line in text.splitlines():
        if line.startswith("# "):
            current = line[2:].strip()
        elif line.strip() and current == part:
            found.append(line.strip())
    return found
