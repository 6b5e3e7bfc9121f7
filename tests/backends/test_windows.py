"""Sums into windows, in the interpreter and in the emulation, against exact fractions."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import pytest
import torch
from torch import Tensor
from xdsl.utils.exceptions import VerifyException

from mxloom.backends.emulate import build
from mxloom.backends.reference import Interpreter
from mxloom.dialects import formats
from mxloom.dialects.instances import format_of
from mxloom.dialects.mx import parse_module, parse_type


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
    (other,) = build(again, store)(*given)
    assert torch.equal(found.nan_to_num(7e9), other.nan_to_num(7e9))
    return found


def nearest(value: Fraction, width: int) -> int:
    return min(max(round(value), -(1 << (width - 1))), (1 << (width - 1)) - 1)


def window_sum(
    products: list[list[Fraction]], start: Fraction, width: int, lsb: int, result: tuple[int, int], over: Fraction
) -> float:
    """What the window says, in exact arithmetic: `products` are those of each segment."""
    unit = Fraction(2) ** -lsb
    total = nearest(start * unit, width)
    for segment in products:
        term = nearest(sum(segment, Fraction(0)) * unit, width)
        total = nearest(Fraction(total + term), width)
    value = total / unit * over
    return nearest(value * Fraction(2) ** result[1], result[0]) * 2.0 ** -result[1]


def expected(
    x: Tensor, w: Tensor, bias: Tensor | None, length: int, width: int, lsb: int, result: tuple[int, int],
    over: Fraction = Fraction(1),
) -> Tensor:  # fmt: skip
    """x [M, K] and w [N, K] as values of their formats (without factors of the whole tensor)."""
    xs, ws = ([[Fraction(v) for v in row] for row in t.double().tolist()] for t in (x, w))
    rows = []
    for a in xs:
        row = []
        for n, b in enumerate(ws):
            products = [p * q for p, q in zip(a, b, strict=True)]
            segments = [products[i : i + length] for i in range(0, len(products), length)]
            start = Fraction(0) if bias is None else Fraction(float(bias[n]))
            row.append(window_sum(segments, start, width, lsb, result, over))
        rows.append(row)
    return torch.tensor(rows)


def linear(input: str, weight: str, window: str, bias: bool = False, cast: str = "", k: int = 64) -> str:
    return f"""func.func @forward(%x: tensor<5x{k}xf32>) -> tensor<5x7x!mx.fixed<20, 12>> {{
      %p = mx.parameter "w" : tensor<7x{k}xf32>
      %b = mx.parameter "b" : tensor<7xf32>
      %w = mx.cast %p : tensor<7x{k}xf32> to tensor<7x{k}x{weight}>
      %a = mx.cast %x {cast} : tensor<5x{k}xf32> to tensor<5x{k}x{input}>
      %y = mx.linear %a, %w{", %b" if bias else ""}, window = #mx.window<{window}>
        : (tensor<5x{k}x{input}>, tensor<7x{k}x{weight}>{", tensor<7xf32>" if bias else ""})
        -> tensor<5x7x!mx.fixed<20, 12>>
      func.return %y : tensor<5x7x!mx.fixed<20, 12>>
    }}"""


BLOCK = "!mx.block<32x{}>"


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("input", "weight", "length"),
    [
        (BLOCK.format("f4E2M1FN"), BLOCK.format("f4E2M1FN"), 32),
        (BLOCK.format("!mx.fixed<8, 6>"), BLOCK.format("f8E4M3FN"), 32),
        (BLOCK.format("f8E5M2"), BLOCK.format("f8E5M2"), 32),
        ("!mx.fixed<8, 5>", "!mx.block<16xf4E2M1FN>", 16),
        ("!mx.fixed<16, 12>", "!mx.fixed<8, 5>", 64),
        (BLOCK.format("!mx.fixed<8, 6>"), "!mx.block<?xi8, f32>", 32),
        (BLOCK.format("!mx.fixed<8, 6>"), "!mx.block<16xi4, f32>", 16),
        ("f8E4M3FN", "!mx.ternary", 64),
    ],
)
@pytest.mark.parametrize("window", [(40, -20), (16, -9), (40, -3)])
def test_a_window_sums_segment_by_segment(
    input: str, weight: str, length: int, window: tuple[int, int], bias: bool
) -> None:
    """A wide window, one that saturates, and one whose lowest bit is coarse: each rounding happens where it is said."""
    x, w, b = random(5, 64) * 3, random(7, 64, seed=1), random(7, seed=2) * 5
    got = both(linear(input, weight, f"{window[0]}, {window[1]}", bias), x, w=w, b=b)
    values = formats.quantize(x, parse_type(input)), formats.quantize(w, parse_type(weight))
    exact = [v.double() for v in values]
    if "f32" in weight:  # the f32 scale times the code, not rounded to f32
        e = formats.encode_tensor(w, parse_type(weight))  # type: ignore[arg-type]
        scales = e.parts.scales.double().repeat_interleave(64 // e.parts.scales.shape[-1], -1)  # type: ignore[union-attr]
        exact[1] = (values[1].double() / scales).round() * scales
    assert torch.equal(got, expected(exact[0], exact[1], b if bias else None, length, *window, (20, 12)))


def test_nvfp4_multiplies_the_scale_of_the_tensor_once_and_rounds_once() -> None:
    x, w = random(5, 64) * 3, random(7, 64, seed=1)
    nvfp4 = format_of("nvfp4")
    got = both(linear(str(nvfp4), str(nvfp4), "40, 0"), x, w=w, b=random(7))
    parts = [formats.encode_tensor(t, nvfp4) for t in (x, w)]
    overs = [Fraction(float(p.parts.global_scale)) for p in parts]  # type: ignore[arg-type]
    inner = []
    for part in parts:
        assert part.parts.scales is not None
        ones = torch.ones(())
        inner.append(formats.Encoded.of(nvfp4, type(part.parts)(part.parts.codes, part.parts.scales, ones)).decode())
    assert torch.equal(got, expected(inner[0], inner[1], None, 16, 40, 0, (20, 12), overs[0] * overs[1]))


def test_a_mixed_operand_has_the_codes_of_each_block_in_its_own_element() -> None:
    mixed = "!mx.mixed<!mx.block<32xf4E2M1FN>, !mx.block<32xf8E4M3FN>>"
    x, w = random(5, 128) * 3, random(7, 128, seed=1)
    x[:, :32] *= 4
    text = linear(mixed, "!mx.block<32xf4E2M1FN>", "40, -20", cast="{threshold = 2.0}", k=128)
    got = both(text, x, w=w, b=random(7))
    type = parse_type(mixed)
    value = formats.quantize(x, type, formats.Rounding(threshold=2.0))
    assert not torch.equal(value, formats.quantize(x, type.low)) and not torch.equal(  # type: ignore[attr-defined]
        value,
        formats.quantize(x, type.high),  # type: ignore[attr-defined]
    )
    assert torch.equal(got, expected(value, formats.quantize(w, type.low), None, 32, 40, -20, (20, 12)))  # type: ignore[attr-defined]


def test_a_product_of_two_values_sums_along_the_columns_of_the_second() -> None:
    one, other = "!mx.block<32xf4E2M1FN>", "!mx.block<32x1x!mx.fixed<8, 6>>"
    x, y = random(2, 3, 5, 64), random(2, 3, 64, 7, seed=1)
    result = "tensor<2x3x5x7x!mx.fixed<20, 12>>"
    got = both(
        f"""func.func @forward(%x: tensor<2x3x5x64xf32>, %y: tensor<2x3x64x7xf32>) -> {result} {{
          %a = mx.cast %x : tensor<2x3x5x64xf32> to tensor<2x3x5x64x{one}>
          %b = mx.cast %y : tensor<2x3x64x7xf32> to tensor<2x3x64x7x{other}>
          %z = mx.matmul %a, %b, window = #mx.window<40, -20>
            : (tensor<2x3x5x64x{one}>, tensor<2x3x64x7x{other}>) -> {result}
          func.return %z : {result}
        }}""",
        x,
        y,
    )
    a, b = formats.quantize(x, parse_type(one)), formats.quantize(y, parse_type(other))
    for i in range(2):
        for j in range(3):
            assert torch.equal(got[i, j], expected(a[i, j], b[i, j].T, None, 32, 40, -20, (20, 12)))


def test_a_row_that_meets_a_nan_is_nan() -> None:
    x, w = random(5, 64), random(7, 64, seed=1)
    x[2, 40] = torch.nan
    mxfp4 = BLOCK.format("f4E2M1FN")
    got = both(linear(mxfp4, mxfp4, "40, -20"), x, w=w, b=random(7))
    assert got.isnan().all(-1).tolist() == [False, False, True, False, False]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (linear("!mx.block<32xf4E2M1FN>", "!mx.block<32xf4E2M1FN>", "51, 0"), "8 to 50 bits"),
        (linear("!mx.block<32xf4E2M1FN>", "!mx.block<32xf4E2M1FN>", "40, 900"), "2\\^-200 and 2\\^200"),
        (linear("f32", "!mx.block<32xf4E2M1FN>", "40, 0"), "the input: it is f32"),
        (linear("!mx.block<32xf4E2M1FN>", "!mx.block<32xf4E2M1FN>", "40, 0>, acc = #mx.accumulator<f32"), "not both"),
        (linear("!mx.block<?xi8, f32>", "!mx.block<?xi8, f32>", "40, 0"), "digits"),
    ],
)
def test_what_has_no_exact_meaning_is_refused(text: str, message: str) -> None:
    with pytest.raises(VerifyException, match=message):
        parse_module(text)
