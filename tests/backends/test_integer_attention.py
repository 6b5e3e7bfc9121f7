"""Attention in integers, in the interpreter and in the emulation: step by step in exact arithmetic, and near torch."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from torch import Tensor
from xdsl.utils.exceptions import VerifyException

from mxloom.backends.emulate import build
from mxloom.backends.reference import Interpreter
from mxloom.dialects import formats, integer
from mxloom.dialects.integer import Point
from mxloom.dialects.mx import parse_module, parse_type


class Nothing:
    """A module without parameters."""

    def wide(self, name: str) -> Tensor:
        raise KeyError(name)

    def encoded(self, name: str, format: object, shape: object) -> formats.Encoded:
        raise KeyError(name)


QUERY, VALUE, ROW = "!mx.block<32x!mx.fixed<8, 6>>", "!mx.fixed<8, 5>", "!mx.block<32x!mx.fixed<8, 6>>"


def attention(
    extra: str = "causal, ",
    value: str = VALUE,
    padding: bool = False,
    integer: str = "integer = #mx.integer<8>, ",
    heads: int = 4,
    probabilities: str = f"probabilities = {ROW}, ",
) -> str:
    q, k, v = (f"tensor<2x{h}x9x32x{f}>" for h, f in ((heads, QUERY), (2, QUERY), (2, value)))
    result = f"tensor<2x{heads}x9x32x!mx.fixed<20, 12>>"
    wide = [t.replace(f, "f32") for t, f in ((q, QUERY), (k, QUERY), (v, value))]
    mask = ", padding = %p" if padding else ""
    return f"""func.func @forward(%q: {wide[0]}, %k: {wide[1]}, %v: {wide[2]}, %p: tensor<2x9xi1>) -> {result} {{
      %a = mx.cast %q : {wide[0]} to {q}
      %b = mx.cast %k : {wide[1]} to {k}
      %c = mx.cast %v : {wide[2]} to {v}
      %y = mx.attention %a, %b, %c{mask}, scale = 0.17677669529663687, {extra}{probabilities}{integer}
        scores = !mx.fixed<24, 14>, score_window = #mx.window<40, -20>, value_window = #mx.window<40, -20>
        : ({q}, {k}, {v}{", tensor<2x9xi1>" if padding else ""}) -> {result}
      func.return %y : {result}
    }}"""


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


Q, K, V = random(2, 4, 9, 32) * 2, random(2, 2, 9, 32, seed=1) * 2, random(2, 2, 9, 32, seed=2)
MASK = torch.ones(2, 9, dtype=torch.bool)
MASK[0, :3] = False


def both(text: str) -> Tensor:
    module = parse_module(text)
    (found,) = Interpreter(module, Nothing())(Q, K, V, MASK)
    again = parse_module(str(module))
    assert str(again) == str(module)
    (other,) = build(again, Nothing())(Q, K, V, MASK)
    assert torch.equal(found, other)
    return found


def test_each_step_is_exact_and_rounded_where_it_is_said() -> None:
    """One head of one batch entry, by fractions: scores, softmax, probabilities, the second product."""
    got = both(attention())
    q, k = (formats.quantize(x, parse_type(QUERY)).double() for x in (Q, K))
    v = formats.quantize(V, parse_type(VALUE)).double()
    for batch, head in ((0, 0), (1, 3)):
        group = head // 2
        rows = [[Fraction(x) for x in row] for row in q[batch, head].tolist()]
        columns = [[Fraction(x) for x in row] for row in k[batch, group].tolist()]
        scores = torch.zeros(9, 9, dtype=torch.long)
        for i in range(9):
            for j in range(9):
                total = sum((a * b for a, b in zip(rows[i], columns[j], strict=True)), Fraction(0))
                in_window = Fraction(round(total * 2**20), 2**20)
                scores[i, j] = round(in_window * 2**14)
        keep = torch.ones(9, 9, dtype=torch.bool).tril()
        weights = integer.softmax(scores, Point(24, 14), Point(24, 22), 8, 32**-0.5, keep)
        narrow = formats.quantize(weights.double() / 2**22, parse_type(ROW))
        exact = [[Fraction(x) for x in row] for row in narrow.tolist()]
        values = [[Fraction(x) for x in row] for row in v[batch, group].T.tolist()]
        for i in range(9):
            for n in range(32):
                total = sum((a * b for a, b in zip(exact[i], values[n], strict=True)), Fraction(0))
                code = round(Fraction(round(total * 2**20), 2**20) * 2**12)
                assert got[batch, head, i, n].item() == code / 2**12


@pytest.mark.parametrize("extra", ["", "causal, ", "causal, window = 4, ", "window = 3, "])
@pytest.mark.parametrize("padding", [False, True])
def test_it_is_near_attention_in_float(extra: str, padding: bool) -> None:
    """Within what 8 bits of the probabilities (at most 1/128 of the largest) and of the result allow."""
    got = both(attention(extra, padding=padding))
    plain = attention(extra, padding=padding, integer="", probabilities="")
    plain = plain.split("scale =")[0] + "scale = 0.17677669529663687" + (", " + extra.rstrip(", ") if extra else "")
    tail = attention(extra, padding=padding).split("#mx.window<40, -20>\n")[1].replace("!mx.fixed<20, 12>", "f32")
    head, rest = plain.split("{", 1)
    (wide,) = Interpreter(parse_module(head.replace("!mx.fixed<20, 12>", "f32") + "{" + rest + "\n" + tail), Nothing())(
        Q, K, V, MASK
    )
    seen = torch.ones(2, 1, 9, 1, dtype=torch.bool)
    if padding:  # padded rows mean nothing: torch gives them the mean of all values
        seen[0, :, :3] = False
    assert ((got - wide).abs() * seen).max() <= 9 * 2.0**-8 * float(V.abs().max())
    assert ((got - wide).abs() * seen).mean() <= 0.01


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (attention(integer=""), "it states integer, scores"),
        (attention("softcap = 30.0, "), "no softcap"),
        (attention(value="!mx.block<32xf4E2M1FN>"), "no blocks along its width"),
        (attention(value="!mx.block<32xi8, f32>"), "no powers of two"),
        (attention(probabilities=""), "states the format of its probabilities"),
    ],
)
def test_what_integers_do_not_compute_is_refused(text: str, message: str) -> None:
    with pytest.raises(VerifyException, match=message):
        parse_module(text)


def test_values_in_blocks_along_their_positions_are_taken() -> None:
    value = "!mx.block<8x1xf4E2M1FN>"
    got = both(attention(value=value))
    q, k = (formats.quantize(x, parse_type(QUERY)).double() for x in (Q, K))
    v = formats.quantize(V, parse_type(value)).double()
    k, v = (x.repeat_interleave(2, 1) for x in (k, v))
    wide = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    assert (got - wide).abs().max() <= 9 * 2.0**-8 * float(v.abs().max())
