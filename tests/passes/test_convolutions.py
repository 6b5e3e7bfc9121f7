"""`legalize-hardware` on convolutions: what they compute as linear layers on patches, and which have no hardware."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mxloom
from mxloom.backends.reference import Interpreter, body
from mxloom.dialects.errors import MxloomError
from mxloom.dialects.operations.contraction import Contraction, LinearOp


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def compiled(layer: nn.Module, x: Tensor) -> mxloom.Compiled:
    rules = [{"weights": "mxint8", "activations": "mxint8"}]
    recipe = {"version": 1, "quantize": rules, "passes": ["legalize-hardware"]}
    return mxloom.compile(layer.eval(), recipe, example={"input": x})


def mxint8(x: Tensor) -> Tensor:
    """Blocks of 32 along the last dimension: a power of two, 6 bits behind the point, ties to even (OCP MX, 6.3)."""
    size = x.shape[-1]
    blocks = nn.functional.pad(x.double(), (0, -size % 32)).unflatten(-1, (-1, 32))
    largest = blocks.abs().amax(-1, keepdim=True).clamp(min=2.0**-100)
    unit = 2.0 ** (largest.log2().floor() - 6)
    return ((blocks / unit).round().clamp(-127, 127) * unit).flatten(-2)[..., :size]


def along_channels(x: Tensor) -> Tensor:
    return mxint8(x.movedim(1, -1)).movedim(-1, 1)


def bias_of(layer: nn.Conv1d | nn.Conv2d) -> Tensor:
    return torch.zeros(layer.out_channels).double() if layer.bias is None else layer.bias.detach().double()


def tolerance(layer: LinearOp) -> float:
    """Half a step of the result, and half a step of the window for each segment and the bias."""
    assert layer.window is not None
    step = 2.0**layer.window.lsb.data
    segments = -(-layer.macs(lambda _: (1,)) // 32)
    return step / 2 * (2**8 + segments + 1)


@pytest.mark.parametrize(
    "options",
    [
        {"kernel_size": 3, "padding": 1},
        {"kernel_size": (2, 3), "stride": (2, 1), "padding": (0, 2), "bias": False},
        {"kernel_size": 3, "dilation": 2, "stride": 3},
    ],
)
def test_with_whole_blocks_of_channels_the_operands_are_those_of_the_convolution(options: dict[str, Any]) -> None:
    """32 channels: every block lies within one tap, and the rewriting rounds nothing in another way."""
    torch.manual_seed(0)
    layer = nn.Conv2d(32, 5, **options)
    x = random(2, 32, 8, 9)
    found = compiled(layer, x)
    (linear,) = (op for op in body(found.module).ops if isinstance(op, Contraction))
    assert isinstance(linear, LinearOp)
    expected = nn.functional.conv2d(
        along_channels(x),
        along_channels(layer.weight.detach()),
        bias_of(layer),
        layer.stride,
        layer.padding,
        layer.dilation,
    )
    assert float((found(x).double() - expected).abs().max()) <= tolerance(linear)


@pytest.mark.parametrize("channels", [3, 20])
def test_otherwise_blocks_run_along_the_patch(channels: int) -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(channels, 6, 3, padding=1, stride=2)
    x = random(2, channels, 7, 8)
    found = compiled(layer, x)
    (linear,) = (op for op in body(found.module).ops if isinstance(op, LinearOp))
    rows = nn.functional.unfold(x, 3, 1, 1, 2).unflatten(1, (channels, 9)).permute(0, 3, 2, 1).flatten(2)
    weight = layer.weight.detach().movedim(1, -1).flatten(1)
    expected = mxint8(rows) @ mxint8(weight).T + bias_of(layer)
    got = found(x).double().flatten(2).transpose(1, 2)
    assert float((got - expected).abs().max()) <= tolerance(linear)
    assert torch.equal(found(x), Interpreter(found.module, found.weights)(x)[0])


def test_a_convolution_of_one_dimension() -> None:
    torch.manual_seed(0)
    layer = nn.Conv1d(32, 4, 3, padding=1)
    x = random(2, 32, 10)
    found = compiled(layer, x)
    (linear,) = (op for op in body(found.module).ops if isinstance(op, LinearOp))
    expected = nn.functional.conv1d(along_channels(x), along_channels(layer.weight.detach()), bias_of(layer), padding=1)
    assert float((found(x).double() - expected).abs().max()) <= tolerance(linear)


def test_the_layer_keeps_its_name_its_rule_and_its_multiplications() -> None:
    x = random(2, 4, 6, 6)
    found = compiled(nn.Sequential(nn.Conv2d(4, 8, 3, padding=1), nn.ReLU()), x)
    (linear,) = (op for op in body(found.module).ops if isinstance(op, LinearOp))
    assert linear.result.name_hint == "_0." and "rule" in linear.attributes
    assert linear.macs(lambda value: (2, 6, 6, 8)) == 2 * 36 * 8 * 4 * 9
    assert "0.weight" not in found.weights or "0.weight.rows" in found.weights


@pytest.mark.parametrize(
    ("layer", "shape", "reason"),
    [
        (nn.Conv2d(4, 4, 3, groups=2), (2, 4, 6, 6), "2 groups have no hardware"),
        (nn.Conv2d(4, 4, 3, groups=4), (2, 4, 6, 6), "4 groups have no hardware"),
        (nn.Conv3d(2, 2, 3), (2, 2, 5, 5, 5), "windows of three dimensions have no hardware"),
    ],
)
def test_what_has_no_hardware_is_named(layer: nn.Module, shape: tuple[int, ...], reason: str) -> None:
    with pytest.raises(MxloomError, match=f"conv: {reason}"):
        compiled(layer, random(*shape))


def test_operands_that_are_not_quantized_are_named() -> None:
    recipe = {"version": 1, "quantize": [{"weights": "mxint8"}], "passes": ["legalize-hardware"]}
    with pytest.raises(
        MxloomError, match=r"mx\.conv: its input is rounded by no cast of wide numbers: quantize it before"
    ):
        mxloom.compile(nn.Conv2d(4, 4, 3).eval(), recipe, example={"input": random(2, 4, 6, 6)})
