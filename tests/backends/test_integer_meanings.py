"""Operations computed in integers, in the interpreter and in the emulation: what their functions give on codes."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import pytest
import torch
from torch import Tensor
from xdsl.utils.exceptions import VerifyException

from mxloom.backends.emulate import build
from mxloom.backends.reference import Interpreter
from mxloom.dialects import formats, integer
from mxloom.dialects.integer import Point, Table
from mxloom.dialects.mx import parse_module


class Store(dict[str, Tensor]):
    """Weights by name."""

    def wide(self, name: str) -> Tensor:
        return self[name]

    def encoded(self, name: str, format: Any, shape: Any) -> formats.Encoded:
        return formats.encode_tensor(self[name], format, formats.Rounding())


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def both(text: str, *given: Tensor, **weights: Tensor) -> Tensor:
    """The one result of the interpreter, which the emulation and the module's own text give too."""
    module, store = parse_module(text), Store(weights)
    (found,) = Interpreter(module, store)(*given)
    again = parse_module(str(module))
    assert str(again) == str(module)
    for emulated in (build(module, store), build(again, store)):
        (other,) = emulated(*given)
        assert torch.equal(found.nan_to_num(7e9), other.nan_to_num(7e9))
        assert found.dtype == other.dtype
    return found


def unary(line: str, given: str = "4x32x!mx.fixed<24, 16>", result: str = "4x32x!mx.fixed<20, 12>") -> str:
    return f"""func.func @forward(%x: tensor<{given}>) -> tensor<{result}> {{
      %y = {line} : (tensor<{given}>) -> tensor<{result}>
      func.return %y : tensor<{result}>
    }}"""


def on_grid(x: Tensor, fraction: int) -> Tensor:
    return (x.double() * 2**fraction).round()


X = random(4, 32) * 5
CODES = on_grid(X, 16).long()
GIVEN, RESULT = Point(24, 16), Point(20, 12)


@pytest.mark.parametrize(
    ("line", "name"),
    [
        ("mx.silu %x, integer = #mx.integer<8>", "silu"),
        ("mx.gelu %x, integer = #mx.integer<8>", "gelu"),
        ('mx.gelu %x, approximate = "tanh", integer = #mx.integer<8>', "gelu_tanh"),
        ("mx.tanh %x, integer = #mx.integer<8>", "tanh"),
        ("mx.sigmoid %x, integer = #mx.integer<8>", "sigmoid"),
    ],
)
def test_a_curve_is_read_from_its_table(line: str, name: str) -> None:
    expected = Table(name, GIVEN, RESULT, 8)(CODES)
    assert torch.equal(both(unary(line), X).double() * 2**12, expected.double())


def test_softmax_and_exponential_are_their_integer_functions() -> None:
    got = both(unary("mx.softmax %x, dim = -1, integer = #mx.integer<8>"), X)
    assert torch.equal(got.double() * 2**12, integer.softmax(CODES, GIVEN, RESULT, 8).double())
    got = both(unary("mx.exp %x, integer = #mx.integer<6>"), X)
    assert torch.equal(got.double() * 2**12, integer.exponential(CODES, GIVEN, RESULT, 6).double())


def test_rms_norm_and_layer_norm_are_their_integer_functions() -> None:
    fixed, weights = "!mx.fixed<24, 16>", "!mx.fixed<16, 12>"
    w, b = random(32, seed=1), random(32, seed=2)
    own, bias = on_grid(w, 12).long(), on_grid(b, 16).long()
    head = f"""func.func @forward(%x: tensor<4x32x{fixed}>) -> tensor<4x32x{fixed}> {{
      %w = mx.parameter "w" : tensor<32x{weights}>
      %b = mx.parameter "b" : tensor<32x{fixed}>
      %y = """
    tail = f"\n func.return %y : tensor<4x32x{fixed}> }}"
    types = f": (tensor<4x32x{fixed}>, tensor<32x{weights}>) -> tensor<4x32x{fixed}>"
    got = both(head + f"mx.rms_norm %x, %w, eps = 1.0e-6, integer = #mx.integer<8> {types}" + tail, X, w=w, b=b)
    expected = integer.rms_norm(CODES, own, GIVEN, Point(16, 12), GIVEN, 1e-6)
    assert torch.equal(got.double() * 2**16, expected.double())
    line = f"""mx.layer_norm %x, %w, %b, normalized_shape = [32], eps = 1.0e-6, integer = #mx.integer<8>
      : (tensor<4x32x{fixed}>, tensor<32x{weights}>, tensor<32x{fixed}>) -> tensor<4x32x{fixed}>"""
    got = both(head + line + tail, X, w=w, b=b)
    expected = integer.layer_norm(CODES, own, bias, GIVEN, Point(16, 12), GIVEN, GIVEN, 1e-6)
    assert torch.equal(got.double() * 2**16, expected.double())


def half_up(value: Fraction) -> int:
    return (2 * value.numerator + value.denominator) // (2 * value.denominator)


def test_means_are_exact_and_rounded_half_up() -> None:
    codes = CODES.reshape(1, 2, 8, 8)
    given = X.reshape(1, 2, 8, 8)
    four, fixed = "1x2x8x8x!mx.fixed<24, 16>", "!mx.fixed<20, 12>"
    got = both(
        unary("mx.mean %x, dim = [-1, -2], integer = #mx.integer<8>", four, f"1x2x{fixed}"),
        given,
    )
    expected = [half_up(Fraction(int(part.sum()), 64 * 16)) for part in codes[0]]
    assert (got[0].double() * 2**12).tolist() == expected
    line = "mx.window_pool %x, kernel_size = [3], stride = [2], integer = #mx.integer<8>"
    got = both(unary(line, four, f"1x2x3x3x{fixed}"), given)
    windows = codes.unfold(2, 3, 2).unfold(3, 3, 2).sum((-1, -2)).reshape(-1).tolist()
    assert (got.double() * 2**12).reshape(-1).tolist() == [half_up(Fraction(total, 9 * 16)) for total in windows]
    line = "mx.avg_pool %x, output_size = [2, 4], integer = #mx.integer<8>"
    got = both(unary(line, four, f"1x2x2x4x{fixed}"), given)
    windows = codes.unfold(2, 4, 4).unfold(3, 2, 2).sum((-1, -2)).reshape(-1).tolist()
    assert (got.double() * 2**12).reshape(-1).tolist() == [half_up(Fraction(total, 8 * 16)) for total in windows]


def nearest(value: Fraction, width: int) -> int:
    """Rounded to a whole number, ties to even, and saturated."""
    return min(max(round(value), -(1 << (width - 1))), (1 << (width - 1)) - 1)


@pytest.mark.parametrize("operation", ["add", "sub", "mul"])
def test_arithmetic_on_fixed_point_is_exact_and_rounded_once(operation: str) -> None:
    """24 bits times 24 bits are 48: f32 would round the product before the one rounding that counts."""
    a, b = "!mx.fixed<24, 20>", "!mx.fixed<24, 17>"
    x = torch.randint(-(1 << 23), 1 << 23, (500,), generator=torch.Generator().manual_seed(1))
    y = torch.randint(-(1 << 23), 1 << 23, (500,), generator=torch.Generator().manual_seed(2))
    got = both(
        f"""func.func @forward(%x: tensor<500x{a}>, %y: tensor<500x{b}>) -> tensor<500x!mx.fixed<24, 15>> {{
          %z = mx.{operation} %x, %y : (tensor<500x{a}>, tensor<500x{b}>) -> tensor<500x!mx.fixed<24, 15>>
          func.return %z : tensor<500x!mx.fixed<24, 15>>
        }}""",
        x.double() * 2.0**-20,
        y.double() * 2.0**-17,
    )
    meaning = {"add": lambda p, q: p + q, "sub": lambda p, q: p - q, "mul": lambda p, q: p * q}[operation]
    pairs = zip(x.tolist(), y.tolist(), strict=True)
    exact = [meaning(Fraction(p, 1 << 20), Fraction(q, 1 << 17)) for p, q in pairs]
    assert (got.double() * 2**15).tolist() == [nearest(value * 2**15, 24) for value in exact]


def test_movement_keeps_codes_and_rotation_is_exact() -> None:
    fixed, angles = "!mx.fixed<20, 12>", "!mx.fixed<16, 14>"
    x, cos, sin = random(3, 8), random(3, 8, seed=1).clamp(-1, 1), random(3, 8, seed=2).clamp(-1, 1)
    got = both(
        f"""func.func @forward(%x: tensor<3x8x{fixed}>, %c: tensor<3x8x{angles}>, %s: tensor<3x8x{angles}>)
            -> tensor<8x3x{fixed}> {{
          %r = mx.rope %x, %c, %s
            : (tensor<3x8x{fixed}>, tensor<3x8x{angles}>, tensor<3x8x{angles}>) -> tensor<3x8x{fixed}>
          %y = mx.transpose %r, dim0 = 0, dim1 = 1 : (tensor<3x8x{fixed}>) -> tensor<8x3x{fixed}>
          func.return %y : tensor<8x3x{fixed}>
        }}""",
        x,
        cos,
        sin,
    )
    xs, cs, ss = (on_grid(t, f).long().tolist() for t, f in ((x, 12), (cos, 14), (sin, 14)))
    for row in range(3):
        turned = [-value for value in xs[row][4:]] + xs[row][:4]
        for column in range(8):
            exact = Fraction(xs[row][column] * cs[row][column] + turned[column] * ss[row][column], 1 << 14)
            assert got[column, row].item() * 2**12 == nearest(exact, 20)


def test_casts_into_fixed_point_round_as_they_say() -> None:
    """Field case H1, and 8.99 and -8.5 into fixed<10, 6>."""
    for rounding, expected in (("rne", [-2, -1, 0, 2]), ("rna", [-2, -1, -1, 2]), ("rtz", [-1, -1, 0, 1])):
        got = both(
            f"""func.func @forward(%x: tensor<4x!mx.fixed<16, 3>>) -> tensor<4x!mx.fixed<16, 0>> {{
              %y = mx.cast %x {{rounding = "{rounding}"}} : tensor<4x!mx.fixed<16, 3>> to tensor<4x!mx.fixed<16, 0>>
              func.return %y : tensor<4x!mx.fixed<16, 0>>
            }}""",
            torch.tensor([-12, -11, -4, 12]) / 8,
        )
        assert got.tolist() == expected
    type = "tensor<2x!mx.fixed<10, 6>>"
    text = f"func.func @forward(%x: {type}) -> {type} {{ func.return %x : {type} }}"
    got = both(text, torch.tensor([8.99, -8.5]))
    assert got.tolist() == [7.984375, -8.0]


def test_a_nan_is_seen() -> None:
    x = X.clone()
    x[1, 3] = torch.nan
    assert both(unary("mx.silu %x, integer = #mx.integer<8>"), x).isnan().sum() == 1
    assert both(unary("mx.softmax %x, dim = -1, integer = #mx.integer<8>"), x).isnan().any(-1).tolist() == [
        False,
        True,
        False,
        False,
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (unary("mx.silu %x, integer = #mx.integer<8>", "4xf32", "4x!mx.fixed<20, 12>"), "its input is !mx.fixed"),
        (unary("mx.silu %x, integer = #mx.integer<8>", result="4x32x!mx.fixed<28, 12>"), "at most 24 bits"),
        (unary("mx.softmax %x, dim = 0, integer = #mx.integer<8>"), "last dimension"),
        (unary("mx.silu %x, integer = #mx.integer<13>"), "2\\^2 to 2\\^12"),
        (unary("mx.exp %x, integer = #mx.integer<8>", "4x32x!mx.fixed<24, 64>"), "point is too far"),
        (unary("mx.rms_norm %x, eps = 1.0e-6, unit_offset, integer = #mx.integer<8>"), "1 \\+ weight"),
        (unary("mx.rms_norm %x, eps = 1.0, integer = #mx.integer<8>", "4x32x!mx.fixed<24, 40>"), "62 bits"),
        (
            unary(
                "mx.rms_norm %x, eps = 1.0e-6, integer = #mx.integer<8>",
                "1x20000x!mx.fixed<16, 8>",
                "1x20000x!mx.fixed<16, 8>",
            ),
            "rows have at most 16384",
        ),
        (
            unary(
                "mx.window_pool %x, kernel_size = [2], padding = [1], integer = #mx.integer<8>",
                "1x2x8x8x!mx.fixed<8, 4>",
                "1x2x5x5x!mx.fixed<8, 4>",
            ),
            "no padding",
        ),
    ],
)
def test_what_integers_do_not_compute_is_refused(text: str, message: str) -> None:
    with pytest.raises(VerifyException, match=message):
        parse_module(text)
