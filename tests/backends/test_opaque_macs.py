"""MACs of torch operators that are kept as they are: counted by formula, listed in the coverage, never left out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mxloom
from mxloom.backends.cost import OPAQUE, UNKNOWN

BATCH, TIME, IN, HIDDEN = 2, 5, 6, 7


class Calling(nn.Module):
    """A module called with one input; the first of several outputs is taken."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        result = self.inner(x)
        return result[0] if isinstance(result, tuple) else result


class Both(nn.Module):
    """A bilinear form of an input with itself."""

    def __init__(self) -> None:
        super().__init__()
        self.form = nn.Bilinear(IN, IN, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        return self.form(x, x)


@pytest.mark.filterwarnings("ignore:The tensor attributes")
@pytest.mark.parametrize(
    ("model", "shape", "macs"),
    [
        # four gates, each a product with the input and one with the state
        (nn.LSTM(IN, HIDDEN, batch_first=True), (BATCH, TIME, IN), BATCH * TIME * 4 * HIDDEN * (IN + HIDDEN)),
        (nn.GRU(IN, HIDDEN, batch_first=True), (BATCH, TIME, IN), BATCH * TIME * 3 * HIDDEN * (IN + HIDDEN)),
        (Both(), (BATCH, IN), BATCH * IN * IN * HIDDEN),
    ],
    ids=["lstm", "gru", "bilinear"],
)
def test_opaque_products_are_counted_and_listed(model: nn.Module, shape: tuple[int, ...], macs: int) -> None:
    compiled = mxloom.compile(Calling(model).eval(), example={"x": torch.randn(shape)}, dynamic=False)
    total = compiled.cost()
    assert total.macs == macs
    assert {c.why for c in total.contractions} == {OPAQUE}
    share = compiled.coverage()
    assert share.quantized_macs == 0 and sum(share.macs.values()) == pytest.approx(1)
    assert "100.0% of MACs: kept as a torch operator" in share.summary()


class Attends(nn.Module):
    """Attention as torch has it, masked or not."""

    def __init__(self, **how: Any) -> None:
        super().__init__()
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        heads = x.unsqueeze(1).expand(-1, 2, -1, -1)
        return nn.functional.scaled_dot_product_attention(heads, heads, heads, **self.how)


@pytest.mark.parametrize(
    "how", [{}, {"is_causal": True}, {"attn_mask": torch.ones(TIME, TIME).tril().bool()}], ids=["all", "causal", "mask"]
)
def test_attention_of_torch_is_counted_whole(how: dict[str, Any]) -> None:
    """Two products over all pairs of positions, each as wide as a head; nothing of it is unknown."""
    compiled = mxloom.compile(Attends(**how), example={"x": torch.randn(BATCH, TIME, IN)}, dynamic=False)
    assert compiled.cost().macs == 2 * BATCH * 2 * TIME * TIME * IN
    assert {why for _, _, why in compiled.coverage().wide} == {OPAQUE}
    assert UNKNOWN not in compiled.coverage().summary()


def test_an_operator_that_nobody_can_count_is_named() -> None:
    class Inverse(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.linalg.inv(x)

    compiled = mxloom.compile(Inverse(), example={"x": torch.eye(4).repeat(2, 1, 1)})
    assert [why for _, _, why in compiled.coverage().wide] == [UNKNOWN]
    assert UNKNOWN in compiled.coverage().summary()


def test_pointwise_operators_and_layouts_are_no_products() -> None:
    class Plain(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.roll(torch.atan2(x, x + 2), 1, -1).cumsum(-1).flip(-1).sort(-1).values

    compiled = mxloom.compile(Plain(), example={"x": torch.randn(2, 8)})
    assert compiled.cost().contractions == ()
