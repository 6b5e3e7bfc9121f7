"""The reference interpreter: one rounding for each result, casts as they say, parameters in their formats."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from xdsl.utils.exceptions import VerifyException

from mxloom.backends.reference import Interpreter
from mxloom.dialects import formats
from mxloom.dialects.errors import MxloomError
from mxloom.dialects.instances import format_of
from mxloom.dialects.mx import parse_module

MXFP4 = format_of("mxfp4")


class Store(dict[str, Tensor]):
    """Weights by name, as a test has them."""

    def wide(self, name: str) -> Tensor:
        return self[name]

    def encoded(self, name: str, format: Any, shape: Any) -> formats.Encoded:
        return formats.encode_tensor(self[name], format, formats.Rounding())


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def run(text: str, *given: Tensor, **weights: Tensor) -> list[Tensor]:
    return Interpreter(parse_module(text), Store(weights))(*given)


def test_a_result_is_rounded_once_into_its_type() -> None:
    """Computed in f32, then one rounding: not the product of rounded parts."""
    x, w = random(3, 64), random(32, 64, seed=1)
    (got,) = run(
        """func.func @forward(%x: tensor<?x64xf32>) -> tensor<?x32x!mx.block<32xf4E2M1FN>> {
             %w = mx.parameter "w" : tensor<32x64xf32>
             %y = mx.linear %x, %w : (tensor<?x64xf32>, tensor<32x64xf32>) -> tensor<?x32x!mx.block<32xf4E2M1FN>>
             func.return %y : tensor<?x32x!mx.block<32xf4E2M1FN>>
           }""",
        x,
        w=w,
    )
    assert torch.equal(got, formats.quantize(x @ w.T, MXFP4))
    assert not torch.equal(got, x @ w.T)


def test_a_cast_rounds_as_its_properties_say_and_only_once() -> None:
    """floor saturates where even does not; a second, default rounding would hide that."""
    x = random(4, 64) * 7
    (got,) = run(
        """func.func @forward(%x: tensor<?x64xf32>) -> tensor<?x64x!mx.block<32xf4E2M1FN>> {
             %y = mx.cast %x {scale_rule = "floor", rounding = "rtz", clip = 0.75}
               : tensor<?x64xf32> to tensor<?x64x!mx.block<32xf4E2M1FN>>
             func.return %y : tensor<?x64x!mx.block<32xf4E2M1FN>>
           }""",
        x,
    )
    how = formats.Rounding(scale_rule="floor", rounding="rtz", clip=0.75)
    assert torch.equal(got, formats.quantize(x, MXFP4, how))
    assert not torch.equal(got, formats.quantize(x, MXFP4))


def test_a_parameter_in_a_format_is_what_its_codes_mean() -> None:
    x, w = random(3, 64), random(32, 64, seed=1)
    (got,) = run(
        """func.func @forward(%x: tensor<?x64xf32>) -> tensor<?x32xf32> {
             %w = mx.parameter "w" : tensor<32x64x!mx.block<32xf4E2M1FN>>
             %y = mx.linear %x, %w : (tensor<?x64xf32>, tensor<32x64x!mx.block<32xf4E2M1FN>>) -> tensor<?x32xf32>
             func.return %y : tensor<?x32xf32>
           }""",
        x,
        w=w,
    )
    assert torch.equal(got, x @ formats.quantize(w, MXFP4).T)


def test_operands_of_different_widths_meet_in_the_widest() -> None:
    """bf16 activations against weights of a format: the products are summed in f32 and rounded once into bf16."""
    x, w = random(3, 64), random(32, 64, seed=1)
    (got,) = run(
        """func.func @forward(%x: tensor<?x64xf32>) -> tensor<?x32xbf16> {
             %w = mx.parameter "w" : tensor<32x64x!mx.block<32xf4E2M1FN>>
             %a = mx.cast %x : tensor<?x64xf32> to tensor<?x64xbf16>
             %y = mx.linear %a, %w : (tensor<?x64xbf16>, tensor<32x64x!mx.block<32xf4E2M1FN>>) -> tensor<?x32xbf16>
             func.return %y : tensor<?x32xbf16>
           }""",
        x,
        w=w,
    )
    assert got.dtype == torch.bfloat16
    assert torch.equal(got, (x.bfloat16().float() @ formats.quantize(w, MXFP4).T).bfloat16())


def test_probabilities_of_attention_are_rounded_before_they_meet_the_value() -> None:
    query, key, value = (random(1, 2, 32, 8, seed=seed) for seed in range(3))
    type = "tensor<1x2x32x8xf32>"
    (got,) = run(
        f"""func.func @forward(%q: {type}, %k: {type}, %v: {type}) -> {type} {{
             %y = mx.attention %q, %k, %v, scale = 0.5, probabilities = !mx.block<32xf4E2M1FN>, scale_rule = "ceil"
               : ({type}, {type}, {type}) -> {type}
             func.return %y : {type}
           }}""",
        query,
        key,
        value,
    )
    weights = torch.softmax(query @ key.transpose(2, 3) * 0.5, -1)
    weights = formats.quantize(weights, MXFP4, formats.Rounding(scale_rule="ceil"))
    assert torch.equal(got, weights @ value)


TWO_LAYERS = """func.func @forward(%x: tensor<?x64xf32>) -> tensor<?x64xf32> {
  %w = mx.parameter "w" : tensor<64x64xf32>
  %c = mx.cast %w : tensor<64x64xf32> to tensor<64x64x!mx.block<32xf4E2M1FN>>
  %a = mx.linear %x, %c : (tensor<?x64xf32>, tensor<64x64x!mx.block<32xf4E2M1FN>>) -> tensor<?x64xf32>
  %b = mx.relu %a : (tensor<?x64xf32>) -> tensor<?x64xf32>
  %d = mx.linear %b, %c : (tensor<?x64xf32>, tensor<64x64x!mx.block<32xf4E2M1FN>>) -> tensor<?x64xf32>
  func.return %d : tensor<?x64xf32>
}"""


def test_casts_of_parameters_are_computed_once_and_the_wide_weight_is_let_go() -> None:
    interpreter = Interpreter(parse_module(TWO_LAYERS), Store(w=random(64, 64)))
    assert [value.name_hint for value in interpreter.constants] == ["c"]
    seen: list[str] = []
    interpreter(random(2, 64), observe=lambda value, _: seen.append(value.name_hint or ""))
    assert seen == ["x", "a", "b", "d"], "the cast is not among what a run computes"


def test_a_value_is_let_go_after_its_last_use() -> None:
    import weakref

    interpreter = Interpreter(parse_module(TWO_LAYERS), Store(w=random(64, 64)))
    held: dict[str, Any] = {}

    def observe(value: Any, tensor: Tensor) -> None:
        if value.name_hint == "d":
            assert held["a"]() is None
        held[value.name_hint] = weakref.ref(tensor)

    interpreter(random(2, 64), observe=observe)
    assert held["b"]() is None


def test_a_parameter_that_is_also_read_wide_is_kept() -> None:
    (got,) = run(
        """func.func @forward(%x: tensor<?x64xf32>) -> tensor<?x64xf32> {
             %w = mx.parameter "w" : tensor<64xf32>
             %c = mx.cast %w : tensor<64xf32> to tensor<64x!mx.block<32xf4E2M1FN>>
             %a = mx.mul %x, %c : (tensor<?x64xf32>, tensor<64x!mx.block<32xf4E2M1FN>>) -> tensor<?x64xf32>
             %b = mx.add %a, %w : (tensor<?x64xf32>, tensor<64xf32>) -> tensor<?x64xf32>
             func.return %b : tensor<?x64xf32>
           }""",
        x := random(3, 64),
        w=(w := random(64, seed=1)),
    )
    assert torch.equal(got, x * formats.quantize(w, MXFP4) + w)


def test_a_parameter_of_another_shape_is_refused_by_name() -> None:
    with pytest.raises(MxloomError, match=r'parameter "w" has shape \[64, 32\], the module says \[64, 64\]'):
        Interpreter(parse_module(TWO_LAYERS), Store(w=random(64, 32)))


def test_an_input_of_another_shape_or_number_is_refused() -> None:
    interpreter = Interpreter(parse_module(TWO_LAYERS), Store(w=random(64, 64)))
    with pytest.raises(MxloomError, match=r'input "x" must have shape \[\?, 64\], got \[2, 32\]'):
        interpreter(random(2, 32))
    with pytest.raises(MxloomError, match=r"takes 1 inputs \['x'\], got 2"):
        interpreter(random(2, 64), random(2, 64))


def test_an_operation_of_another_dialect_is_refused() -> None:
    module = parse_module("func.func @f() {\n  func.call @f() : () -> ()\n  func.return\n}")
    with pytest.raises(MxloomError, match=r"func\.call is not an operation of mx"):
        Interpreter(module, Store())


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("aten.from_file.default", "changes its arguments or touches files"),
        ("aten.add_.Tensor", "changes its arguments or touches files"),
        ("prims.add.default", "only those of aten and mxloom"),
        ("aten.no_such_thing.default", "is not known to torch"),
    ],
)
def test_a_module_from_anyone_cannot_name_every_operator(target: str, message: str) -> None:
    """The text of a module is read from a folder: it may run mathematics, nothing else."""
    text = (
        f'func.func @f(%x: tensor<2xf32>) {{\n  %y = mx.aten "{target}"(%x) {{self}} : (tensor<2xf32>) -> tensor<2xf32>'
        "\n  func.return\n}"
    )
    with pytest.raises(VerifyException, match=message):
        parse_module(text)


def test_a_module_from_anyone_cannot_name_every_function_on_sizes() -> None:
    text = 'func.func @f() {\n  %n = mx.sym "os.getpid"() {} : () -> index\n  func.return\n}'
    with pytest.raises(VerifyException, match=r'"os\.getpid" is not arithmetic on sizes'):
        parse_module(text)


def test_an_opaque_operation_with_an_argument_that_its_target_lacks_is_refused() -> None:
    text = (
        'func.func @f(%x: tensor<2xf32>) {\n  %y = mx.aten "aten.cos.default"(%x) {self, speed = 1 : i64} '
        ": (tensor<2xf32>) -> tensor<2xf32>\n  func.return\n}"
    )
    with pytest.raises(VerifyException, match=r"has no argument speed"):
        parse_module(text)
