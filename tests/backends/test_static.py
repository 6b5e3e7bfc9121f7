"""Modules of one size: what happens to padding masks."""

import pytest
import torch

from mxloom.backends.static import static
from mxloom.backends.weight_store import WeightStore
from mxloom.dialects.errors import MxloomError
from mxloom.dialects.mx import parse_module

TEXT = """func.func @f(%x: tensor<?x3x5x16xf32>) -> tensor<?x3x5x16xf32> {
  %mask = mx.parameter "mask" : tensor<1x5xi1>
  %y = mx.attention %x, %x, %x, %mask, scale = 0.25
    : (tensor<?x3x5x16xf32>, tensor<?x3x5x16xf32>, tensor<?x3x5x16xf32>, tensor<1x5xi1>) -> tensor<?x3x5x16xf32>
  func.return %y : tensor<?x3x5x16xf32>
}"""


def test_a_mask_that_hides_nothing_is_left_out() -> None:
    weights = WeightStore.from_state_dict({"mask": torch.ones(1, 5, dtype=torch.bool)})
    module, _, assumed = static(parse_module(TEXT), weights, [(1, 3, 5, 16)])
    assert "mask" not in str(module) and not assumed


def test_a_mask_that_hides_a_position_is_refused() -> None:
    weights = WeightStore.from_state_dict({"mask": torch.tensor([[True] * 4 + [False]])})
    with pytest.raises(MxloomError, match="y: its padding mask leaves positions out"):
        static(parse_module(TEXT), weights, [(1, 3, 5, 16)])
