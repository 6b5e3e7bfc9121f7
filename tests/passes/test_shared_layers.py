"""`legalize-hardware{share=...}`: the same place of every layer gets one format, the widest that any of them needs."""

import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import mxloom
from mxloom.backends.reference import body
from mxloom.backends.weight_store import WeightStore
from mxloom.dialects.errors import MxloomError, UsageError
from mxloom.dialects.mx import parse_module
from mxloom.dialects.operations._operation import Operation
from mxloom.dialects.operations._shapes import element_of
from mxloom.dialects.operations._values import hint_of
from mxloom.dialects.operations.attention import AttentionOp
from mxloom.passes._ranges import Ranges
from mxloom.passes._shared_layers import share_ranges
from mxloom.passes._sites import module_name


class Gated(nn.Module):
    """A residual layer whose weights have a size of their own."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(24), nn.Linear(24, 40), nn.Linear(40, 24)
        with torch.no_grad():
            self.up.weight.mul_(scale)
            self.norm.weight.mul_(scale)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(self.norm(x))))


class Stack(nn.Module):
    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def compiled(model: nn.Module, option: str, format: str = "mxint8") -> mxloom.Compiled:
    recipe = {
        "version": 1,
        "quantize": [{"weights": format, "activations": format}],
        "passes": [f"legalize-hardware{option}"],
    }
    example = torch.randn((3, 24), generator=torch.Generator().manual_seed(0))
    return mxloom.compile(model.eval(), recipe, example={"x": example})


def stack() -> Stack:
    torch.manual_seed(0)
    return Stack(*(Gated(scale) for scale in (0.5, 4.0, 1.0)))


def formats(found: mxloom.Compiled) -> list[dict[str, str]]:
    """The type of every place of each layer, by its name in the layer."""
    layers: list[dict[str, str]] = [{}, {}, {}]
    for op in body(found.module).ops:
        match = re.fullmatch(r"layers\.(\d)\.(.*)", module_name(op)) if isinstance(op, Operation) else None
        if match:
            layers[int(match[1])][match[2]] = str(element_of(op.results[0]))
    return layers


@pytest.mark.parametrize("format", ["mxint8", "nvfp4"])
def test_every_place_has_the_widest_format_of_all_layers(format: str) -> None:
    """What was one format stays; where layers differ the format with the fewest bits behind the point is all theirs."""
    own, shared = formats(compiled(stack(), "", format)), formats(compiled(stack(), '{share="layers"}', format))
    assert shared[0] == shared[1] == shared[2] and len(shared[0]) > 6
    assert own[0] != own[1], "the layers' ranges differ"
    if format == "nvfp4":  # factors of tensors move points themselves
        return
    for place, found in shared[0].items():
        points = [re.search(r"fixed<(\d+), (-?\d+)>$", layer[place]) for layer in own]
        if place.endswith(("down", "up", "relu", "norm", "add")):
            widest = min(int(point[2]) for point in points if point)
            assert found == f"!mx.fixed<24, {widest}>", place
    inputs = compiled(stack(), '{share="layers"}').function.body.block.args
    assert str(element_of(inputs[0])) == shared[2]["add"], "what a layer gives is what the next one takes"


def test_attention_scores_are_shared() -> None:
    shape = "tensor<1x2x3x4xf32>"
    lines = [
        f"  %a{layer} = mx.attention %x, %x, %x, scale = 0.5 : ({shape}, {shape}, {shape}) -> {shape}"
        for layer in range(3)
    ]
    text = "\n".join([f"func.func @forward(%x: {shape}) -> {shape} {{", *lines, f"  func.return %a2 : {shape}", "}"])
    ops = [op for op in body(parse_module(text)).ops if isinstance(op, AttentionOp)]
    for layer, op in enumerate(ops):
        op.result.name_hint = hint_of(f"layers.{layer}.attention")
    ranges = Ranges(scores=dict(zip(ops, (5.0, 1.0, 7.0), strict=True)))
    share_ranges(ops, ranges, ("layers",), WeightStore.from_state_dict({}))
    assert list(ranges.scores.values()) == [7.0, 7.0, 7.0]


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(24, 40), nn.Linear(40, 24)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.up(x))


REFUSED: dict[str, tuple[Callable[[], nn.Module], str, str]] = {
    "one layer": (lambda: Stack(Gated(1.0)), "layers", '"layers" is no list of layers: 1 modules named layers.N'),
    "no list": (stack, "layers.0", '"layers.0" is no list of layers: 0 modules'),
    "two kinds": (lambda: Stack(Gated(1.0), Plain()), "layers", r"layers.0.norm is mx.layer_norm on 3 operands, and "
                  r"layers.1.up, in its place, mx.linear"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_shared_is_named(case: str) -> None:
    model, name, message = REFUSED[case]
    with pytest.raises((MxloomError, UsageError), match=message):
        compiled(model(), f'{{share="{name}"}}')
