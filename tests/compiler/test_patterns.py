"""What looks like rms_norm or rope and is not stays what it is: the compiled model equals eager to the bit."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mxloom

torch.manual_seed(0)


class Written(nn.Module):
    """A module that computes `function(self, x)` with the tensors it holds."""

    def __init__(self, function: Callable[[Any, Tensor], Tensor], **held: Tensor) -> None:
        super().__init__()
        self.function = function
        for name, tensor in held.items():
            self.register_buffer(name, tensor)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def turned(x: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return torch.cat((-x[..., half:], x[..., :half]), -1)


def every_second(x: Tensor) -> Tensor:
    return torch.cat((-x[..., 4::2], x[..., :4:1]), -1)


def half_rope(parts: Sequence[Tensor], m: Any, **keywords: Any) -> Tensor:
    a, b = parts
    return torch.cat((torch.sub(a * m.c, b * m.d, **keywords), b * m.c + a * m.d), -1)


def norm(x: Tensor, **keywords: Any) -> Tensor:
    return x * torch.rsqrt(torch.add(x.pow(2).mean(-1, keepdim=True), 0.5, **keywords))


R = torch.randn
MODELS: dict[str, tuple[Written, Tensor]] = {
    "an odd width": (Written(lambda m, x: x * m.c + turned(x) * m.d, c=R(5), d=R(5)), R(4, 5)),
    "the inverse rotation": (
        Written(lambda m, x: torch.add(x * m.c, turned(x) * m.d, alpha=-1), c=R(8), d=R(8)),
        R(4, 8),
    ),
    "rope that broadcasts": (Written(lambda m, x: x * m.c + turned(x) * m.d, c=R(4, 8), d=R(4, 8)), R(8)),
    "rope that widens": (
        Written(lambda m, x: x * m.c + turned(x) * m.d, c=R(8), d=R(8)),
        R(4, 8).bfloat16(),
    ),
    "a step": (Written(lambda m, x: x[..., :6] * m.c + every_second(x) * m.d, c=R(6), d=R(6)), R(4, 8)),
    "half rope with alpha": (Written(lambda m, x: half_rope(x.chunk(2, -1), m, alpha=2), c=R(4), d=R(4)), R(4, 8)),
    "halves along another dimension": (Written(lambda m, x: half_rope(x.split(2, 1), m), c=R(2), d=R(2)), R(4, 4, 2)),
    "thirds": (Written(lambda m, x: half_rope(x.split(4, -1)[:2], m), c=R(4), d=R(4)), R(4, 12)),
    "a norm with alpha": (Written(lambda _, x: norm(x, alpha=2)), R(4, 8)),
    "a norm of bf16 with an f32 weight": (Written(lambda m, x: m.w * norm(x.bfloat16()), w=R(64)), R(4, 64)),
    "a norm with a weight for each row": (Written(lambda m, x: m.w * norm(x), w=R(4, 1)), R(4, 8)),
    "a norm with one number": (Written(lambda m, x: m.w * norm(x), w=R(1)), R(4, 8)),
    "a norm with a matrix": (Written(lambda m, x: norm(x) * m.w, w=R(4, 8)), R(8)),
    "batch norm of which all results are read": (
        Written(
            lambda m, x: torch.cat(
                [y.flatten() for y in torch.native_batch_norm(x, m.w, m.b, m.w, m.v, False, 0.1, 0.5)]
            ),
            w=R(8),
            b=R(8),
            v=R(8).abs(),
        ),
        R(4, 8),
    ),
    "bf16 plus an f32 number": (Written(lambda m, x: x.bfloat16() + m.c, c=torch.tensor(1.2345678)), R(64, 8)),
    "f32 plus an f64 number": (Written(lambda m, x: x * m.c.double() + m.c.double(), c=torch.tensor(1.3)), R(64, 8)),
    "dropout that is on": (Written(lambda _, x: x + torch.dropout(x, 1.0, True)), R(4, 8)),
}


@pytest.mark.parametrize("name", MODELS)
def test_what_looks_like_a_pattern_keeps_its_values(name: str) -> None:
    model, x = MODELS[name]
    compiled = mxloom.compile(model, example={"x": x}, dynamic=False)
    expected = model(x)
    assert compiled(x).shape == expected.shape
    assert torch.equal(compiled(x).float(), expected.float())


@pytest.mark.parametrize(
    ("name", "model", "x"),
    [
        ("mx.rope", Written(lambda m, x: x * m.c + turned(x) * m.d, c=R(8), d=R(8)), R(4, 8)),
        ("mx.rope", Written(lambda m, x: half_rope(x.chunk(2, -1), m), c=R(4), d=R(4)), R(4, 8)),
        ("mx.rms_norm", Written(lambda m, x: m.w * norm(x), w=R(8)), R(4, 8)),
    ],
)
def test_the_patterns_themselves_are_found(name: str, model: Written, x: Tensor) -> None:
    compiled = mxloom.compile(model, example={"x": x})
    assert [op.name for op in compiled.function.body.block.ops if op.name == name] == [name]
    assert torch.equal(compiled(x), model(x))
