"""What a model yields beside tensors: None comes back, anything else is refused; and what it holds is its own."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mxloom
from mxloom.dialects.errors import MxloomError, UsageError

X = torch.arange(8.0).reshape(2, 4)


class Yields(nn.Module):
    def __init__(self, function: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(x)


@pytest.mark.parametrize(
    ("function", "names"),
    [
        (lambda x: (x * 2, None), ("output_0", "output_1")),
        (lambda x: (None, x * 2), ("output_0", "output_1")),
        (lambda x: {"a": x * 2, "n": None, "b": x + 1}, ("a", "n", "b")),
        (lambda x: (x * 2, x.shape[0], None, x.shape[0] / 2), tuple(f"output_{place}" for place in range(4))),
    ],
)
def test_none_among_the_outputs_comes_back_in_its_place(
    function: Callable[[Tensor], Any], names: tuple[str, ...], tmp_path: Path
) -> None:
    """And sizes come back as those of the input."""
    compiled = mxloom.compile(Yields(function), example={"x": X})
    compiled.save(tmp_path / "saved")
    x = torch.arange(12.0).reshape(3, 4)
    expected = function(x)
    for model in (compiled, mxloom.load(tmp_path / "saved")):
        assert model.outputs == names
        found, wanted = model(x), expected.values() if isinstance(expected, dict) else expected
        for one, other in zip(found, wanted, strict=True):
            assert torch.equal(one, other) if isinstance(other, Tensor) else one == other


def test_attention_without_its_weights_yields_none_for_them() -> None:
    attention = nn.MultiheadAttention(8, 2, batch_first=True).eval()
    x = torch.randn(2, 5, 8)
    compiled = mxloom.compile(Yields(lambda x: attention(x, x, x, need_weights=False)), example={"x": x})
    found, weights = compiled(x)
    torch.testing.assert_close(found, attention(x, x, x, need_weights=False)[0])
    assert weights is None


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda x: (x * 2, 3.5), "the model yields 3.5 as output_1, and a module yields tensors"),
        (lambda x: {"x": x * 2, "name": "a"}, "the model yields 'a' as name,"),
        (lambda x: (x * 2, x.shape[1]), "the model yields 4 as output_1,"),
        (lambda x: 3.0, "the model yields 3.0, and a module yields tensors"),
        (lambda x: None, "the model yields no tensor"),
    ],
)
def test_what_is_no_tensor_is_refused(function: Callable[[Tensor], Any], message: str) -> None:
    with pytest.raises(MxloomError, match=message):
        mxloom.compile(Yields(function), example={"x": X})


def test_a_plain_tensor_attribute_is_part_of_the_snapshot() -> None:
    model = Yields(lambda x: x)
    factor = torch.full((4,), 3.0)
    model.factor = factor
    model.function = lambda x: x * model.factor
    compiled = mxloom.compile(model, example={"x": X})
    factor.mul_(2)
    assert torch.equal(compiled(X), X * 3)


def test_an_example_beside_an_opened_source_is_refused() -> None:
    source = mxloom.compile(Yields(lambda x: x * 2), example={"x": X}).source
    with pytest.raises(UsageError, match="Yields is opened already, with an example of its own"):
        mxloom.compile(source, example={"x": X[:, :2]})
