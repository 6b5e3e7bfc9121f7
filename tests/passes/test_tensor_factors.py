"""NVFP4 for hardware: the factor of a tensor is a power of two, and multiplies exactly."""

import math

import pytest
import torch
from torch import Tensor, nn
from xdsl.dialects.builtin import FloatAttr

import mxloom
from mxloom.backends.dataflow.lowering import lower
from mxloom.backends.reference import body
from mxloom.backends.weight_store import WeightStore
from mxloom.dialects.errors import MxloomError
from mxloom.dialects.formats import quantize
from mxloom.dialects.instances import format_of
from mxloom.dialects.mx import parse_module
from mxloom.dialects.operations.cast import CastOp
from mxloom.dialects.operations.parameter import ParameterOp
from mxloom.dialects.operations.pointwise import MulOp

REACH = 6 * 448
BLOCKS = format_of("!mx.block<16xf4E2M1FN, f8E4M3FN>", rank=2)
X = torch.randn(4, 48, generator=torch.Generator().manual_seed(0)) * 3


class Pair(nn.Module):
    """Two layers that read one value, as query and key do."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(48, 20), nn.Linear(48, 20, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) + self.b(x)


def legalized(model: nn.Module, x: Tensor = X) -> mxloom.Compiled:
    recipe = {
        "version": 1,
        "quantize": [{"weights": "nvfp4", "activations": "nvfp4"}],
        "passes": ["legalize-hardware"],
    }
    return mxloom.compile(model.eval(), recipe, example={"x": x})


def test_factors_are_the_next_powers_of_two_and_one_cast_serves_both_layers() -> None:
    """Of twice the largest input, and of the largest weight, over 6 x 448."""
    model, compiled = Pair(), legalized(Pair())
    ops = list(body(compiled.module).ops)
    scalars = [op.scalar.value.data for op in ops if isinstance(op, MulOp) and isinstance(op.scalar, FloatAttr)]
    k = math.ceil(math.log2(2 * float(X.abs().max()) / REACH))
    own = [math.ceil(math.log2(float(layer.weight.detach().abs().max()) / REACH)) for layer in (model.a, model.b)]
    assert sorted(scalars) == sorted([2.0**-k, 2.0 ** (k + own[0]), 2.0 ** (k + own[1])])
    casts = [op for op in ops if isinstance(op, CastOp) and "f8E4M3FN" in str(op.result.type)]
    assert sum(not isinstance(op.input.owner, ParameterOp) for op in casts) == 1 and len(casts) == 3


def test_a_layer_computes_on_blocks_times_powers_of_two() -> None:
    """The sums of the scaled blocks' values in f64, but for the rounding of the window and of the result."""
    model, compiled = Pair(), legalized(Pair())
    k = math.ceil(math.log2(2 * float(X.abs().max()) / REACH))
    expected = model.a.bias.detach().double()
    x = quantize(X * 2.0**-k, BLOCKS).double() * 2.0**k
    for layer in (model.a, model.b):
        own = math.ceil(math.log2(float(layer.weight.detach().abs().max()) / REACH))
        expected = expected + x @ (quantize(layer.weight.detach() * 2.0**-own, BLOCKS).double() * 2.0**own).T
    assert (compiled(X).double() - expected).abs().max() <= 2.0**-17


@pytest.mark.parametrize("factor", [1e-6, 1.0, 1e5])
@pytest.mark.parametrize("headroom", [1, 2])
def test_a_power_of_two_costs_no_accuracy(factor: float, headroom: int) -> None:
    """The noise of blocks of normal numbers is that of NVFP4, whose factor is the tensor's own, within 0.05 dB."""
    x = torch.randn(512, 512, generator=torch.Generator().manual_seed(0)) * factor
    k = math.ceil(math.log2(headroom * float(x.abs().max()) / REACH))
    folded = quantize(x * 2.0**-k, BLOCKS) * 2.0**k
    noise = [float((found - x).double().norm()) for found in (quantize(x, format_of("nvfp4", rank=2)), folded)]
    assert abs(20 * math.log10(noise[1] / noise[0])) <= 0.05


def test_a_factor_that_is_made_from_the_values_is_refused() -> None:
    text = """func.func @f(%x: tensor<4x32x!mx.fixed<24, 12>>) -> tensor<4x8x!mx.fixed<24, 12>> {
  %w = mx.parameter "w" : tensor<8x32xf32>
  %b = mx.cast %w : tensor<8x32xf32> to tensor<8x32x!mx.block<16xf4E2M1FN, f8E4M3FN, f32>>
  %q = mx.cast %x : tensor<4x32x!mx.fixed<24, 12>> to tensor<4x32x!mx.block<16xf4E2M1FN, f8E4M3FN, f32>>
  %y = mx.linear %q, %b, window = #mx.window<36, -20>
    : (tensor<4x32x!mx.block<16xf4E2M1FN, f8E4M3FN, f32>>, tensor<8x32x!mx.block<16xf4E2M1FN, f8E4M3FN, f32>>)
    -> tensor<4x8x!mx.fixed<24, 12>>
  func.return %y : tensor<4x8x!mx.fixed<24, 12>>
}"""
    weights = WeightStore.from_state_dict({"w": torch.ones(8, 32)})
    with pytest.raises(MxloomError, match=r"y \(mx\.linear\): .*a factor of the whole tensor, made from its values"):
        lower(parse_module(text), weights)
