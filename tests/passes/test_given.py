"""Weights whose codes a pass decided: the module, the store and the artefact hold them, the source stays as it was."""

# pyright: reportOptionalMemberAccess=false, reportAttributeAccessIssue=false, reportArgumentType=false
# pyright: reportOptionalSubscript=false, reportOptionalOperand=false

from pathlib import Path

import pytest
import torch
from torch import nn

import mxloom
from mxloom.backends.reference import Interpreter
from mxloom.compiler.driver import import_source, run_pipeline
from mxloom.compiler.model_source import open_model
from mxloom.dialects.errors import UsageError
from mxloom.dialects.formats import encode_tensor
from mxloom.passes._given import forget_wide, given_encoding, narrow_weights, set_given, wide_weight


class _Two(nn.Module):
    """A linear, and one whose weight is stored transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(64, 32)
        self.second = nn.Parameter(torch.randn(32, 16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.first(x).relu() @ self.second


def _typed():
    torch.manual_seed(0)
    source = open_model(_Two(), example={"x": torch.randn(2, 64)})
    module, weights = import_source(source).clone(), source.weights.copy()
    run_pipeline(module, weights, "quantize{weights=mxfp4 activations=mxint8}")
    return source, module, weights


def test_a_decided_weight_is_what_the_module_computes_with():
    source, module, weights = _typed()
    x = torch.randn(2, 64)
    before = Interpreter(module, weights)(x)[0]
    for site in narrow_weights(module):
        value = encode_tensor(wide_weight(site, weights), site.format)  # what the cast does
        set_given(site, weights, value)
        assert given_encoding(site, weights).codes.equal(value.codes)
    assert Interpreter(module, weights)(x)[0].equal(before)
    for site in narrow_weights(module):
        doubled = encode_tensor(2 * wide_weight(site, weights), site.format)
        set_given(site, weights, doubled)
        assert given_encoding(site, weights).decode().equal(doubled.decode())
    assert not Interpreter(module, weights)(x)[0].equal(before)
    assert source.weights["second"].equal(source.model.second)


def test_wide_values_are_kept_until_they_are_forgotten():
    source, module, weights = _typed()
    (first, second) = narrow_weights(module)
    for site in (first, second):
        set_given(site, weights, encode_tensor(wide_weight(site, weights), site.format))
        assert wide_weight(site, weights).equal(source.weights.wide(site.value.owner.source.data))
    forget_wide(weights)
    with pytest.raises(UsageError, match=r"first.weight is packed as mxfp4.*before `pack`"):
        wide_weight(first, weights)


def test_a_tied_weight_keeps_its_wide_reader(tmp_path: Path):
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(40, 32)

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return nn.functional.linear(self.table(ids), self.table.weight)

    torch.manual_seed(0)
    ids = torch.randint(40, (2, 5))
    compiled = mxloom.compile(Tied(), weights="mxfp4", activations="mxint8", example={"ids": ids})
    (site,) = narrow_weights(compiled.module)
    expected = compiled(ids)
    set_given(site, compiled.weights, encode_tensor(wide_weight(site, compiled.weights), site.format))
    assert site.value.owner.source.data == "table.weight.as.mxfp4"
    del compiled.emulation
    assert compiled(ids).equal(expected)
    forget_wide(compiled.weights)
    assert mxloom.load(compiled.save(tmp_path / "typed"))(ids).equal(expected)
