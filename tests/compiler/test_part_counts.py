"""Splits along a dimension that may change: refused where the captured number of parts holds for some sizes only."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import mxloom
from mxloom.compiler.capture import CaptureError


class Applied(nn.Module):
    """A function as a model."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def doubled(parts: object) -> Tensor:
    return torch.cat([part * 2 for part in parts], 0)  # pyright: ignore[reportGeneralTypeIssues]


VARYING: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "split": (lambda x: doubled(x.split(2)), "split"),
    "split by a third": (lambda x: doubled(x.split(x.shape[0] // 3)), "split"),
    "unsafe_split": (lambda x: doubled(torch.unsafe_split(x, 2)), "split"),
    "chunk": (lambda x: doubled(x.chunk(3)), "chunk"),
    "unsafe_chunk": (lambda x: doubled(torch.unsafe_chunk(x, 3)), "chunk"),
    "tensor_split": (lambda x: doubled(x.tensor_split(3)), "tensor_split"),
    "vsplit": (lambda x: doubled(x.vsplit(3)), "tensor_split"),
    "of a part": (lambda x: doubled(x[1:].split(3)), "split"),
}


@pytest.mark.parametrize("name", VARYING)
def test_parts_whose_number_depends_on_a_dynamic_size_are_refused(name: str) -> None:
    """The error names the operation and the dimension to fix, and what it advises works."""
    function, operation = VARYING[name]
    x = torch.randn(6, 7)
    with pytest.raises(CaptureError, match=operation) as caught:
        mxloom.compile(Applied(function), example={"x": x})
    assert "x.shape[0]" in str(caught.value) and "dynamic={'x': []}" in str(caught.value)
    fixed = mxloom.compile(Applied(function), example={"x": x}, dynamic=False)
    assert torch.equal(fixed(x), function(x))


def test_one_part_as_large_as_the_example_is_refused() -> None:
    """Sizes far beyond the example's count too."""
    with pytest.raises(CaptureError, match="split made 1 parts"):
        mxloom.compile(Applied(lambda x: doubled(x.split(10_000))), example={"x": torch.randn(6, 7)})


def test_a_sequence_of_integers_is_refused_too() -> None:
    """Its length is dynamic without a word."""
    model = Applied(lambda x: torch.cat([part + 1 for part in x.split(4, 1)], 1))
    with pytest.raises(CaptureError, match=r"split made 2 parts.*x.shape\[1\]") as caught:
        mxloom.compile(model, example={"x": torch.arange(16).reshape(2, 8)})
    assert "dynamic={'x': [0]}" in str(caught.value)


CONSTANT: dict[str, Callable[[Tensor], Tensor]] = {
    "two chunks": lambda x: doubled(x.chunk(2)),
    "thrice the size in thirds": lambda x: doubled(torch.cat([x, x, x]).chunk(3)),
    "split by the size": lambda x: doubled(torch.cat([x, x]).split(x.shape[0])),
    "given sizes": lambda x: doubled(x.split([2, x.shape[0] - 2])),
    "places": lambda x: doubled(x.tensor_split([1, 3])),
    "another dimension": lambda x: torch.cat([part * 2 for part in x.split(3, 1)], 1),
    "tensor_split of another dimension": lambda x: torch.cat([part * 2 for part in x.tensor_split(3, 1)], 1),
}


@pytest.mark.parametrize("name", CONSTANT)
def test_parts_that_make_up_every_size_are_kept(name: str) -> None:
    function = CONSTANT[name]
    compiled = mxloom.compile(Applied(function), example={"x": torch.randn(6, 7)})
    for size in (4, 5, 6, 7, 9, 12):
        x = torch.randn(size, 7)
        assert torch.equal(compiled(x), function(x)), size


def test_a_list_of_one_part_is_a_list() -> None:
    class Parts(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.cat([part * 2 for part in (*x.split(100), *x.chunk(1, 1))])

    x = torch.arange(9.0).reshape(3, 3)
    assert torch.equal(mxloom.compile(Parts(), example={"x": x}, dynamic=False)(x), torch.cat([x * 2, x * 2]))
