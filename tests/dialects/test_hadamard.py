"""`mx.hadamard`: matrices against definition and literature, values against plain products, text, refusals."""

# Operations are looked up by name, so their fields are not known to the type checker.
# pyright: reportAttributeAccessIssue=false, reportOptionalMemberAccess=false

from itertools import product

import pytest
import torch
from xdsl.utils.exceptions import VerifyException

from mxloom.backends.cost import cost
from mxloom.backends.emulate import build
from mxloom.backends.reference import Interpreter
from mxloom.backends.weight_store import WeightStore
from mxloom.dialects.hadamard import additions, core, factor, hadamard, signs, sizes
from mxloom.dialects.mx import parse_module

WITHOUT_PALEY = (
    "92 116 156 172 184 188 232 236 260 268 292 324 356 372 376 404 412 428 436 452 472 476 508 520 532 536 584 596 "
    "604 612 652 668 712 716 732 756 764 772 808 836 852 856 872 876 892 904 932 940 944 952 956 964 980 988 996"
)
"""OEIS A046116: the multiples of 4 below 1000 without a matrix by Paley's constructions and doubling."""


def matrix(size: int) -> torch.Tensor:
    """What the operation multiplies with, f64: the images of the unit vectors stand in its columns."""
    return hadamard(torch.eye(size, dtype=torch.float64), size).T


def test_orders_are_those_of_the_literature() -> None:
    missing = [order for order in range(4, 1000, 4) if factor(order) is None]
    assert missing == [int(order) for order in WITHOUT_PALEY.split()]
    assert [order for order in range(1, 40) if factor(order)] == [1, 2, 4, 8, 12, 16, 20, 24, 28, 32, 36]
    # 36 = 2 (17 + 1), 12 = 11 + 1, 76 = 2 (37 + 1), 344 = 7^3 + 1.
    assert [factor(width) for width in (576, 1536, 4864, 11008, 2048)] == [36, 12, 76, 344, 1]


@pytest.mark.parametrize("order", [12, 20, 28, 36, 52, 76, 100, 164, 244])
def test_matrices_are_of_ones_with_orthogonal_rows(order: int) -> None:
    """Primes, squares (25, 49), 3^4 and 3^5, by both of Paley's constructions."""
    entries = core(order)
    assert {entry for row in entries for entry in row} == {1, -1}
    held = torch.tensor(entries, dtype=torch.int64)
    assert torch.equal(held @ held.T, order * torch.eye(order, dtype=torch.int64))


def test_golden() -> None:
    """QuaRot's transform of order 4: normalized, in Sylvester's order."""
    given = torch.tensor([[8.0, 0, 0, 0], [1, 2, 3, 4]])
    assert hadamard(given, 4).tolist() == [[4, 4, 4, 4], [5, -1, -2, 0]]


@pytest.mark.parametrize("size", [2, 8, 32])
def test_powers_of_two_are_sylvesters(size: int) -> None:
    """Entry i, j is -1 to the number of ones that i and j share."""
    entries = [[(-1) ** (i & j).bit_count() for j in range(size)] for i in range(size)]
    wanted = torch.tensor(entries, dtype=torch.float64) / size**0.5
    assert torch.allclose(matrix(size), wanted, rtol=0, atol=1e-15)


@pytest.mark.parametrize(("size", "k"), [(24, 12), (40, 20), (576, 36), (1536, 12)])
def test_other_sizes_are_products_of_two_matrices(size: int, k: int) -> None:
    doubled = torch.tensor([[(-1) ** (i & j).bit_count() for j in range(size // k)] for i in range(size // k)])
    wanted = torch.kron(torch.tensor(core(k)).double(), doubled.double()) / size**0.5
    found = matrix(size)
    assert torch.allclose(found, wanted, rtol=0, atol=1e-14)
    assert torch.allclose(found @ found.T, torch.eye(size, dtype=torch.float64), rtol=0, atol=1e-13)


@pytest.mark.parametrize("dim", [0, 1, -1])
def test_each_block_along_a_dimension_alone(dim: int) -> None:
    x = torch.randn(24, 36, 48, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    wanted = x.movedim(dim, -1).unflatten(-1, (-1, 12)) @ matrix(12).T
    assert torch.allclose(hadamard(x, 12, dim), wanted.flatten(-2).movedim(-1, dim), atol=1e-13)


def test_seeds_change_signs_of_the_input() -> None:
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    flipped = x * torch.tensor(signs(7, 32) * 2)
    assert torch.equal(hadamard(x, 32, -1, 7), hadamard(flipped, 32))
    assert signs(7, 32) != signs(8, 32)
    assert set(signs(7, 32)) == {1, -1}


def test_additions_are_those_of_butterflies_and_columns() -> None:
    """32 elements: 5 stages; 576 = 36 x 16: 35 additions for a sum of 36, then 4 stages."""
    assert [additions(size) for size in (2, 32, 12, 576)] == [1, 5, 11, 39]


def test_sizes_that_divide_a_width() -> None:
    assert sizes(100) == [2, 4, 20, 100]
    assert sizes(96) == [2, 4, 8, 12, 16, 24, 32, 48, 96]
    assert sizes(7) == []


TEXT = """
func.func @f(%x: tensor<?x?x64xf32>, %y: tensor<2x36x5xf32>) -> (tensor<?x?x64xf32>, tensor<2x36x5xf32>) {
  %a = mx.hadamard %x, size = 32 : (tensor<?x?x64xf32>) -> tensor<?x?x64xf32>
  %b = mx.hadamard %y, size = 12, dim = 1, seed = 3 : (tensor<2x36x5xf32>) -> tensor<2x36x5xf32>
  func.return %a, %b : tensor<?x?x64xf32>, tensor<2x36x5xf32>
}
"""


def test_text_comes_back() -> None:
    module = parse_module(TEXT)
    assert "mx.hadamard %y, size = 12, dim = 1, seed = 3 : " in str(module)
    assert str(parse_module(str(module))) == str(module)


def test_the_interpreter_and_the_emulation_are_one() -> None:
    module, weights = parse_module(TEXT), WeightStore()
    x, y = torch.randn(2, 3, 64), torch.randn(2, 36, 5)
    found = Interpreter(module, weights)(x, y)
    for one, other, wanted in zip(
        found, build(module, weights)(x, y), (hadamard(x, 32), hadamard(y, 12, 1, 3)), strict=True
    ):
        assert torch.equal(one, other)
        assert torch.equal(one, wanted)


def test_gradients_are_turned_back() -> None:
    """The adjoint of an orthogonal matrix is its inverse: the gradient of |R x|^2 / 2 is x."""
    from mxloom.dialects.torch_operators import operator

    x = torch.randn(2, 24, dtype=torch.float64, requires_grad=True)
    operator("mxloom.hadamard.default")(x, 12, -1, 5).pow(2).sum().div(2).backward()
    assert x.grad is not None
    assert torch.allclose(x.grad, x.detach(), atol=1e-14)


def test_additions_are_counted_and_told() -> None:
    found = cost(parse_module(TEXT), WeightStore(), [(1, 10, 64), (2, 36, 5)])
    assert found.additions == 640 * 5 + 360 * 11
    assert f"{found.additions:,} additions of rotations" in found.summary()
    assert found.bytes == 0
    assert found.to_json()["additions"] == found.additions


REFUSED = {
    "size = 32": "[2, 100] has 100 elements along -1, no multiple of 32; fit: 2, 4, 20, 100",
    "size = 32, dim = 0": "[2, 100] has 2 elements along 0, no multiple of 32; fit: 2",
    "size = 92": "there is no Hadamard matrix of order 92",
    "size = 1": "there is no Hadamard matrix of order 1",
    "size = -4": "there is no Hadamard matrix of order -4",
    "size = 4611686018427387904": "there is no Hadamard matrix of order 4611686018427387904",
    "size = 4, dim = 2": "dimension 2 is not one of the 2 there are",
    "size = 4, seed = -1": "a seed is 0 or more",
}


@pytest.mark.parametrize(("properties", "reason"), REFUSED.items())
def test_refused(properties: str, reason: str) -> None:
    with pytest.raises(VerifyException) as refused:
        parse_module(
            f"func.func @f(%x: tensor<2x100xf32>) {{\n  %y = mx.hadamard %x, {properties} : "
            "(tensor<2x100xf32>) -> tensor<2x100xf32>\n  func.return\n}"
        )
    assert f"mx.hadamard: {reason}" in str(refused.value)


def test_a_matrix_is_orthogonal_for_every_small_width() -> None:
    for size, seed in product((4, 12, 20, 24, 28, 40, 60), (None, 1)):
        images = hadamard(torch.eye(size, dtype=torch.float64), size, -1, seed)
        assert torch.allclose(images @ images.T, torch.eye(size, dtype=torch.float64), atol=1e-14)
