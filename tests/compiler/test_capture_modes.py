"""Capture while other threads capture, and of models that set gradient modes."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor, nn

import mxloom
from mxloom.compiler.capture import CaptureError


class Modes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(32, 8)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            y = self.linear(x)
        with torch.set_grad_enabled(True):
            return self.linear(y.repeat(1, 4))


def test_gradient_modes_that_export_does_not_take_are_named() -> None:
    with pytest.raises(CaptureError, match=r"export does not take it \(IndexError.*gradient modes that a forward sets"):
        mxloom.compile(Modes(), example={"x": torch.ones(4, 32)})


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_threads_may_compile_at_once() -> None:
    models = [nn.Linear(8, width) for width in (1, 2, 3, 4)]
    x = torch.arange(16.0).reshape(2, 8)
    with ThreadPoolExecutor(4) as pool:
        compiled = list(pool.map(lambda model: mxloom.compile(model, example={"input": x}), models))
    for model, one in zip(models, compiled, strict=True):
        assert torch.equal(one(x), model(x))
