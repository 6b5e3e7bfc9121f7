"""The text form keeps every bit: floats, dynamic sizes among numbers, names."""

import math
import struct

import pytest
from xdsl.dialects.builtin import DenseIntOrFPElementsAttr, FloatAttr, f32, f64
from xdsl.ir import SSAValue

from mxloom.dialects.mx import OPERATIONS, parse_module
from mxloom.dialects.operations._values import hint_of, path_of


def bits(number: float, format: str) -> bytes:
    return struct.pack(format, number)


def attribute(text: str) -> object:
    """An attribute that has been through print and parse once more."""
    source = f'func.func @f() {{\n  %p = mx.parameter "p" {{value = {text}}} : tensor<1xf32>\n  func.return\n}}'
    module = parse_module(source)
    again = parse_module(str(module))
    assert str(again) == str(module)
    (parameter, _) = again.body.block.first_op.body.block.ops  # type: ignore[union-attr]
    return parameter.attributes["value"]


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("0x7FC00000 : f32", 0x7FC00000),
        ("0xFF800000 : f32", 0xFF800000),
        ("0xFFC00001 : f32", 0xFFC00001),
        ("-0.0 : f32", 0x80000000),
        ("1.0e-45 : f32", 0x00000001),
        ("0.1 : f32", 0x3DCCCCCD),
        ("0x7F7FFFFF : f32", 0x7F7FFFFF),
    ],
)
def test_a_float_in_an_attribute_keeps_its_bits(text: str, word: int) -> None:
    """Field case C4."""
    value = attribute(text)
    assert isinstance(value, FloatAttr)
    assert value.type == f32
    assert f32.pack([value.value.data]) == struct.pack("<I", word)


def test_dense_hex_data_is_little_endian() -> None:
    """Field case C4."""
    value = attribute('dense<"0x0000803F000000C0"> : tensor<2xf32>')
    assert isinstance(value, DenseIntOrFPElementsAttr)
    assert list(value.get_values()) == [1.0, -2.0]


NUMBERS = [
    0.1,
    -0.0,
    1e-45,
    5e-324,
    1e300,
    1e22,
    1e-06,
    123456789.123456789,
    -3.4028234663852886e38,
    math.inf,
    -math.inf,
]


@pytest.mark.parametrize("number", NUMBERS)
def test_an_operations_own_number_keeps_its_bits(number: float) -> None:
    """eps, scale and the like are f64 and come back as they were, infinities in angle brackets."""
    spelled = repr(number) if "." in repr(number) else f"{number:.17e}"
    if math.isinf(number):
        spelled = f"<0x{bits(number, '>d').hex()} : f64>"
    module = parse_module(
        f"func.func @f(%x: tensor<2xf32>) {{\n  %y = mx.clamp %x, min = {spelled} : (tensor<2xf32>) -> tensor<2xf32>\n"
        "  func.return\n}"
    )
    again = parse_module(str(module))
    assert str(again) == str(module)
    clamp = again.body.block.first_op.body.block.first_op  # type: ignore[union-attr]
    held = clamp.properties["min"]
    assert held.type == f64
    assert bits(held.value.data, "<d") == bits(number, "<d")


def test_two_and_two_point_zero_stay_apart() -> None:
    """A whole number and a float are different arguments of torch's operators."""
    text = (
        "func.func @f(%x: tensor<2xf32>) {\n"
        "  %a = mx.pow %x, exponent = 2 : (tensor<2xf32>) -> tensor<2xf32>\n"
        "  %b = mx.pow %x, exponent = 2.0 : (tensor<2xf32>) -> tensor<2xf32>\n"
        "  func.return\n}"
    )
    one, two, _ = parse_module(text).body.block.first_op.body.block.ops  # type: ignore[union-attr]
    assert [repr(op.call().args[1]) for op in (one, two)] == ["2", "2.0"]


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.q_proj"),
        ("0.weight", "_0.weight"),
        ("conv_1", "conv_1."),
        ("model.layers.0.down_proj", "model.layers.0.down_proj"),
    ],
)
def test_a_module_path_survives_as_a_name(path: str, name: str) -> None:
    """xDSL cuts `_1` off a name and refuses a leading digit; the path comes back nevertheless, through text too."""
    assert hint_of(path) == name
    module = parse_module(f'func.func @f() {{\n  %{name} = mx.parameter "p" : tensor<1xf32>\n  func.return\n}}')
    result = parse_module(str(module)).body.block.first_op.body.block.first_op.results[0]  # type: ignore[union-attr]
    assert isinstance(result, SSAValue)
    assert path_of(result) == path


def test_every_operation_says_what_it_is() -> None:
    names = {operation.name for operation in OPERATIONS}
    assert {"mx.parameter", "mx.cast", "mx.linear", "mx.matmul", "mx.conv", "mx.attention", "mx.aten"} <= names
    assert all(operation.__doc__ for operation in OPERATIONS)
