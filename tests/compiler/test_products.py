"""Every spelling of one product with a weight: the same roles, shares and blocks, and eager's values to the bit."""

# Operations are looked up by name, so their fields are not known to the type checker.
# pyright: reportAttributeAccessIssue=false, reportOptionalMemberAccess=false, reportArgumentType=false

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from mxloom.compiler.compiled import Compiled
from mxloom.compiler.driver import compile
from mxloom.passes._sites import sites

IN, OUT = 64, 32

Spelling = Callable[[Tensor, Tensor], Tensor]

ROWS: dict[str, Spelling] = {
    "linear": lambda x, w: nn.functional.linear(x, w),
    "x @ w.t()": lambda x, w: x @ w.t(),
    "x @ w.T": lambda x, w: x @ w.T,
    "x @ w.mT": lambda x, w: x @ w.mT,
    "x @ w.transpose": lambda x, w: x @ w.transpose(0, 1),
    "x @ w.permute": lambda x, w: x @ w.permute(1, 0),
    "mm of w.t()": lambda x, w: torch.mm(x, w.t()),
    "einsum bi,oi": lambda x, w: torch.einsum("bi,oi->bo", x, w),
    "inner": lambda x, w: torch.inner(x, w),
    "tensordot": lambda x, w: torch.tensordot(x, w, dims=([1], [1])),
    "w @ x.t()": lambda x, w: (w @ x.t()).t(),
    "reshaped": lambda x, w: x @ w.unsqueeze(0)[0].reshape(OUT, IN).t(),
    "t of t": lambda x, w: x @ w.t().t().t(),
}
"""Spellings with a weight [OUT, IN]."""

COLUMNS: dict[str, Spelling] = {
    "x @ w": lambda x, w: x @ w,
    "mm": lambda x, w: torch.mm(x, w),
    "linear of w.t()": lambda x, w: nn.functional.linear(x, w.t()),
    "einsum bi,io": lambda x, w: torch.einsum("bi,io->bo", x, w),
    "matmul": lambda x, w: torch.matmul(x, w),
}
"""Spellings with a weight [IN, OUT]."""

BIASED: dict[str, tuple[Callable[[Tensor, Tensor, Tensor], Tensor], tuple[int, int]]] = {
    "linear": (lambda x, w, b: nn.functional.linear(x, w, b), (OUT, IN)),
    "addmm": (lambda x, w, b: torch.addmm(b, x, w), (IN, OUT)),
    "addmm of w.t()": (lambda x, w, b: torch.addmm(b, x, w.t()), (OUT, IN)),
    "linear of w.t()": (lambda x, w, b: nn.functional.linear(x, w.t(), b), (IN, OUT)),
}


class Product(nn.Module):
    def __init__(self, spelling: Callable[..., Tensor], *shapes: tuple[int, ...]) -> None:
        super().__init__()
        make = torch.Generator().manual_seed(0)
        self.weights = nn.ParameterList([torch.randn(shape, generator=make) for shape in shapes])
        self.spelling = spelling
        self.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.spelling(x, *self.weights)


def example(rows: int = 3) -> Tensor:
    return torch.randn(rows, IN, generator=torch.Generator().manual_seed(rows))


def spelled(name: str) -> Product:
    return Product(ROWS[name], (OUT, IN)) if name in ROWS else Product(COLUMNS[name], (IN, OUT))


def quantized(model: nn.Module) -> Compiled:
    return compile(model, weights="mxfp4", activations="mxint8", example={"x": example()})


@pytest.mark.parametrize("name", [*ROWS, *COLUMNS])
def test_a_spelling_of_a_linear_gives_eagers_bits(name: str) -> None:
    model = spelled(name)
    compiled = compile(model, example={"x": example()})
    for rows in (1, 2, 5, 17):
        assert torch.equal(compiled(example(rows)), model(example(rows)))


@pytest.mark.parametrize("name", [*ROWS, *COLUMNS])
def test_every_spelling_has_the_roles_the_shares_and_the_blocks_of_a_linear(name: str) -> None:
    """A weight and an activation in blocks of 32 along what is summed over: IN, so the values are those of a linear."""
    compiled, plain = quantized(spelled(name)), quantized(spelled("linear"))
    assert sorted(site.role for site in sites(compiled.module)) == ["activation", "weight"]
    assert compiled.coverage().macs == {"mxfp4 x mxint8": 1.0}
    assert compiled.coverage().quantized_macs == 1.0
    assert compiled.coverage().bytes == plain.coverage().bytes == {"mxfp4": 1.0}
    assert compiled.cost().bytes == plain.cost().bytes == OUT * IN * 4.25 / 8
    assert compiled.cost().macs == OUT * IN
    assert {site.shape[site._reduced()[0]] for site in sites(compiled.module)} == {IN}
    if name in ROWS:
        assert torch.allclose(compiled(example()), plain(example()), atol=1e-5)
    else:
        other = Product(ROWS["linear"], (OUT, IN))
        other.weights[0].copy_(spelled(name).weights[0].t())
        assert torch.allclose(compiled(example()), quantized(other)(example()), atol=1e-5)


@pytest.mark.parametrize("name", BIASED)
def test_a_spelling_with_a_bias_is_a_linear(name: str) -> None:
    spelling, shape = BIASED[name]
    model = Product(spelling, shape, (OUT,))
    compiled = compile(model, example={"x": example()})
    assert [op.name for op in compiled.function.walk() if op.name in ("mx.linear", "mx.aten")] == ["mx.linear"]
    assert torch.equal(compiled(example(5)), model(example(5)))
    assert quantized(model).coverage().macs == {"mxfp4 x mxint8": 1.0}


@pytest.mark.parametrize("shape", [(3, OUT), (1, OUT), (1,), (3, 1)])
def test_an_addmm_whose_bias_is_no_vector_of_outputs_stays_what_it_is(shape: tuple[int, ...]) -> None:
    """As a linear it would not verify; its MACs are counted all the same."""
    model = Product(lambda x, w, b: torch.addmm(b, x, w), (IN, OUT), shape)
    compiled = compile(model, example={"x": example()}, dynamic=False)
    compiled.module.verify()
    assert torch.equal(compiled(example()), model(example()))
    assert compiled.cost().macs == 3 * IN * OUT
    scaled = Product(lambda x, w, b: torch.addmm(b, x, w, alpha=2.0, beta=0.5), (IN, OUT), (OUT,))
    assert torch.equal(compile(scaled, example={"x": example()})(example(4)), scaled(example(4)))


def test_a_linear_over_a_vector_of_weights_runs() -> None:
    model = Product(lambda x, w: nn.functional.linear(x, w), (IN,))
    compiled = compile(model, example={"x": example()})
    assert torch.equal(compiled(example(4)), model(example(4)))
    assert compiled.cost().macs == IN


def test_a_weight_through_types_and_scalings_is_a_weight() -> None:
    for spelling in (
        lambda x, w: x @ (w.bfloat16().float() * 0.5).t(),
        lambda x, w: x @ torch.cat([w[:7], w[7:] + 1.0]).t(),
        lambda x, w: nn.functional.linear(x, w / w.abs().clamp(min=1.0)),
    ):
        found = {site.operand: site.role for site in sites(quantized(Product(spelling, (OUT, IN))).module)}
        assert found == {"input": "activation", "weight": "weight"}


def test_two_computed_values_are_attention_and_an_outer_product_is_no_site() -> None:
    both = compile(Product(lambda x, w: (x @ w) @ (x @ w).t(), (IN, OUT)), example={"x": example()})
    assert [site.role for site in sites(both.module)] == ["activation", "weight"] * 2 + ["attention"] * 2
    angles = Product(lambda x, w: w[None, :, None] @ x[:, None, :1].float(), (IN,))
    module = compile(angles, example={"x": example()})
    assert sites(module.module) == []
    assert {why for _, _, why in module.coverage().wide} == {"its product sums over one value"}


def test_integers_have_no_sites() -> None:
    class Counts(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x @ x.t()

    assert sites(compile(Counts(), example={"x": torch.ones(3, 4, dtype=torch.long)}).module) == []


def test_einsum_over_several_dimensions_is_a_product_with_eagers_bits() -> None:
    model = Product(lambda x, w: torch.einsum("bti,hio->bhto", x.reshape(-1, 4, 16), w), (3, 16, 8))
    compiled = compile(model, example={"x": example()})
    assert not [op for op in compiled.function.walk() if op.name == "mx.aten"]
    for rows in (1, 4):
        assert torch.equal(compiled(example(rows)), model(example(rows)))
    assert compiled.cost(batch=2).macs == 2 * 4 * 16 * 3 * 8
    narrow = quantized(model)
    assert narrow.coverage().macs == {"mxfp4 x mxint8": 1.0}
