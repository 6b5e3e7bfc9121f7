"""Curves that models spell out become the operation that hardware has a table for; what looks like one does not."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import mxloom
from mxloom.backends.reference import body
from mxloom.dialects.errors import MxloomError
from mxloom.dialects.operations.pointwise import GeluOp

X = torch.randn(4, 32, generator=torch.Generator().manual_seed(0)) * 3


class Written(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def legalized(function: Callable[[Tensor], Tensor]) -> mxloom.Compiled:
    return mxloom.compile(Written(function), {"version": 1, "passes": ["legalize-hardware"]}, example={"x": X})


ROOT = math.sqrt(2 / math.pi)
SPELLED: dict[str, tuple[str, Callable[[Tensor], Tensor]]] = {
    "gpt2's": ("mx.gelu", lambda x: 0.5 * x * (1.0 + torch.tanh(ROOT * (x + 0.044715 * torch.pow(x, 3.0))))),
    "the fast one": ("mx.gelu", lambda x: 0.5 * x * (1.0 + torch.tanh(x * 0.7978845608 * (1.0 + 0.044715 * x * x)))),
    "silu": ("mx.silu", lambda x: torch.sigmoid(x) * x),
}


@pytest.mark.parametrize("name", SPELLED)
def test_a_spelled_curve_is_one_operation(name: str) -> None:
    kind, function = SPELLED[name]
    compiled = legalized(function)
    operations = [op for op in body(compiled.module).ops if op.name.startswith("mx.")]
    assert [op.name for op in operations] == [kind]
    (found,) = operations
    if isinstance(found, GeluOp):
        assert found.approximate is not None and found.approximate.data == "tanh"
    assert (compiled(X) - function(X)).abs().max() < 2e-3


def test_a_curve_of_what_another_operation_gives_is_found() -> None:
    compiled = legalized(lambda x: SPELLED["gpt2's"][1](torch.relu(x) * 2.0) - x)
    assert [op.name for op in body(compiled.module).ops if op.name.startswith("mx.")] == [
        "mx.relu", "mx.mul", "mx.gelu", "mx.sub",
    ]  # fmt: skip


def test_what_only_looks_like_a_curve_is_refused() -> None:
    """Another constant is another function, and a power has no hardware."""
    with pytest.raises(MxloomError, match=r"mx\.pow has no meaning in integers"):
        legalized(lambda x: 0.5 * x * (1.0 + torch.tanh(ROOT * (x + 0.05 * torch.pow(x, 3.0)))))
