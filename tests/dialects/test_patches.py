"""`mx.patches` against torch's unfold, and what it refuses."""

import pytest
import torch
from xdsl.utils.exceptions import VerifyException

from mxloom.backends.reference import Interpreter
from mxloom.backends.weight_store import WeightStore
from mxloom.dialects.mx import parse_module

X = "tensor<2x3x9x7xf32>"


def module(properties: str, result: str, given: str = X) -> str:
    return f"""func.func @f(%x: {given}) -> {result} {{
      %y = mx.patches %x, {properties} : ({given}) -> {result}
      func.return %y : {result}
    }}"""


@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "dilation"),
    [((1, 1), (1, 1), (0, 0), (1, 1)), ((3, 2), (2, 1), (1, 0), (1, 2)), ((5, 4), (3, 2), (2, 2), (1, 1))],
)
def test_patches_are_those_of_unfold_with_the_channels_last(
    kernel: tuple[int, int], stride: tuple[int, int], padding: tuple[int, int], dilation: tuple[int, int]
) -> None:
    x = torch.randn(2, 3, 9, 7, generator=torch.Generator().manual_seed(0))
    rows = torch.nn.functional.unfold(x, kernel, dilation, padding, stride)
    expected = rows.unflatten(1, (3, -1)).permute(0, 3, 2, 1).flatten(2)
    sizes = [
        (n + 2 * p - d * (k - 1) - 1) // s + 1
        for n, k, s, p, d in zip((9, 7), kernel, stride, padding, dilation, strict=True)
    ]
    names = ("kernel_size", "stride", "padding", "dilation")
    properties = ", ".join(f"{n} = {list(v)}" for n, v in zip(names, (kernel, stride, padding, dilation), strict=True))
    text = module(properties, f"tensor<2x{sizes[0]}x{sizes[1]}x{expected.shape[-1]}xf32>")
    (found,) = Interpreter(parse_module(text), WeightStore())(x)
    assert torch.equal(found.flatten(1, 2), expected)


def test_windows_of_one_dimension() -> None:
    """x_0 x_1 x_2 with windows of two, one zero around: (0 x_0) (x_0 x_1) (x_1 x_2) (x_2 0)."""
    text = module("kernel_size = [2], padding = [1]", "tensor<1x4x2xf32>", "tensor<1x1x3xf32>")
    (found,) = Interpreter(parse_module(text), WeightStore())(torch.tensor([[[1.0, 2.0, 3.0]]]))
    assert found.tolist() == [[[0, 1], [1, 2], [2, 3], [3, 0]]]


@pytest.mark.parametrize(
    ("properties", "reason"),
    [
        ("kernel_size = [3]", r"have 2 numbers each for \[2, 3, 9, 7\]"),
        ("kernel_size = [3, 3], stride = [1]", "have 2 numbers each"),
        ("kernel_size = [3, 2]", r"a result of shape \[2, 7, 6, 18\], but its type says \[2, 7, 5, 18\]"),
    ],
)
def test_what_does_not_fit_is_refused(properties: str, reason: str) -> None:
    with pytest.raises(VerifyException, match=reason):
        parse_module(module(properties, "tensor<2x7x5x18xf32>"))
