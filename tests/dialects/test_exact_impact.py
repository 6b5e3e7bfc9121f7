"""The impact of mixed blocks of fixed-point numbers is exact: in the definition, the interpreter and the emulation."""

from fractions import Fraction
from math import nextafter

import pytest
import torch

from mxloom.backends.emulate import build
from mxloom.backends.reference import Interpreter
from mxloom.dialects.formats import MixedType, Rounding, block_impact, quantize
from mxloom.dialects.instances import format_of
from mxloom.dialects.mx import parse_module


def mixed(block: int) -> MixedType:
    found = format_of(f"mixed<!mx.block<{block}xf4E2M1FN>, !mx.block<{block}xf8E4M3FN>>", rank=1)
    assert isinstance(found, MixedType)
    return found


def fixed_point(rows: int, size: int) -> torch.Tensor:
    """Numbers of 24 bits, 12 of them behind the point."""
    generator = torch.Generator().manual_seed(0)
    return (torch.randn(rows, size, generator=generator) * 4096 * 3).round() / 4096


def impact_by_hand(x: torch.Tensor, block: int) -> list[Fraction]:
    """The sum over each block of (Q_low - Q_high)^2, in exact arithmetic; FGMP, section 3.1."""
    type = mixed(block)
    low, high = (quantize(x, part).reshape(-1, block).tolist() for part in (type.low, type.high))
    return [
        sum(((Fraction(a) - Fraction(b)) ** 2 for a, b in zip(*rows, strict=True)), Fraction())
        for rows in zip(low, high, strict=True)
    ]


@pytest.mark.parametrize("block", [16, 32])
def test_the_impact_is_exact_in_f64(block: int) -> None:
    x = fixed_point(40, 64)
    found = block_impact(x, mixed(block), how=Rounding(exact=True))
    assert found.dtype == torch.float64
    assert [Fraction(each) for each in found.flatten().tolist()] == impact_by_hand(x, block)


@pytest.mark.parametrize("block", [16, 32])
def test_a_block_whose_impact_is_the_threshold_stays_low(block: int) -> None:
    """The module decides by the exact sum, also where the threshold is the very sum, or one step of f64 below it."""
    x, type = fixed_point(4, block), mixed(block)
    module = """func.func @forward(%x: tensor<4x{0}x!mx.fixed<24, 12>>) -> tensor<4x{0}x{1}> {{
      %y = mx.cast %x {{threshold = {2} : f64}} : tensor<4x{0}x!mx.fixed<24, 12>> to tensor<4x{0}x{1}>
      func.return %y : tensor<4x{0}x{1}>
    }}"""
    for row, impact in enumerate(impact_by_hand(x, block)):
        for threshold, part in ((float(impact), type.low), (nextafter(float(impact), 0.0), type.high)):
            parsed = parse_module(module.format(block, type, repr(threshold)))
            (found,) = Interpreter(parsed, {})(x)  # pyright: ignore[reportArgumentType]
            (other,) = build(parsed, {})(x)  # pyright: ignore[reportArgumentType]
            assert torch.equal(found, other)
            assert torch.equal(found[row], quantize(x[row], part))
