"""What a compiled model is called with: refused in words or converted; models of other floats; names of outputs."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import mxloom
from mxloom.compiler.inputs import field_names
from mxloom.dialects.errors import MxloomError, UsageError

FORMATS: list[dict[str, str]] = [{}, {"weights": "mxfp4", "activations": "mxint8"}]
QUANTIZED = pytest.mark.parametrize("formats", FORMATS, ids=["wide", "quantized"])


def recipe(formats: dict[str, str]) -> dict[str, Any] | None:
    return {"quantize": [formats]} if formats else None


def layers(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 64), nn.LayerNorm(64), nn.GELU(), nn.Linear(64, 8)).to(dtype)


class Chosen(nn.Module):
    """Inputs of every kind: tokens, which of them count, floats; outputs under any names."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.layer = nn.Embedding(10, 32), nn.Linear(32, 4)
        self.register_buffer("shift", torch.linspace(0, 1, 32))
        self.register_buffer("tilt", torch.linspace(0, 3, 32), persistent=False)

    def forward(self, ids: torch.Tensor, keep: torch.Tensor, x: torch.Tensor) -> dict[str, torch.Tensor]:
        hidden = (self.table(ids) + x[:, None]) * self.shift + self.tilt
        return {"class": self.layer(hidden.masked_fill(~keep[..., None], 0.0)), "a b": hidden, "a_b": hidden + 1}


@QUANTIZED
@pytest.mark.parametrize(
    ("given", "message"),
    [
        (torch.randn(2, 16), r"has the shape \[2, 16\]; wanted: a tensor \[\?, 32\] of f32"),
        (torch.randn(2, 3, 32), r"has the shape \[2, 3, 32\]"),
        (torch.randn(32), r"has the shape \[32\]"),
        (torch.ones(2, 32, dtype=torch.long), "holds torch.int64"),
        (torch.ones(2, 32, dtype=torch.bool), "holds torch.bool"),
        (torch.ones(2, 32, dtype=torch.complex64), "holds torch.complex64"),
        (torch.ones(2, 32, device="meta"), "lies on the meta device"),
        (torch.ones(2, 32).to_sparse(), "is a nested or sparse tensor"),
        (None, "is None"),
        ("x", "is 'x'"),
        ([[1.0] * 32] * 2, "is a list"),
    ],
)
def test_an_input_of_another_type_is_refused(formats: dict[str, str], given: Any, message: str) -> None:
    compiled = mxloom.compile(layers(), recipe(formats), example={"input": torch.randn(2, 32)})
    with pytest.raises(UsageError, match=f"Sequential: input 'input' {message}"):
        compiled(given)
    with pytest.raises(UsageError, match=message):
        compiled(input=given)


@QUANTIZED
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_model_of_other_floats_is_the_model_in_f32(formats: dict[str, str], dtype: torch.dtype) -> None:
    """Captured with an example of its own dtype, and called with that or with f32: the same numbers."""
    model, x = layers(dtype), torch.randn(3, 32, generator=torch.Generator().manual_seed(1)).to(dtype)
    compiled = mxloom.compile(model, recipe(formats), example={"input": torch.randn(2, 32).to(dtype)})
    in_f32 = mxloom.compile(layers(dtype).float(), recipe(formats), example={"input": torch.randn(2, 32)})
    assert compiled(x).dtype == torch.float32
    assert torch.equal(compiled(x), in_f32(x.float())) and torch.equal(compiled(x.float()), compiled(x))
    assert all(parameter.dtype == dtype for parameter in model.parameters())
    if not formats:
        assert torch.equal(compiled(x), layers(dtype).float()(x.float()))


def test_inputs_of_every_kind() -> None:
    model = Chosen().to(torch.bfloat16)
    ids, keep, x = torch.randint(10, (2, 5)), torch.rand(2, 5) > 0.5, torch.randn(2, 32).bfloat16()
    compiled = mxloom.compile(model, example={"ids": ids, "keep": keep, "x": x})
    outputs = compiled(ids, keep, x)
    expected = model.float()(ids, keep, x.float())
    assert outputs._fields == ("class_", "a_b", "a_b_1")
    assert all(torch.equal(got, wanted) for got, wanted in zip(outputs, expected.values(), strict=True))
    for other in (compiled(ids.int(), keep, x), compiled(ids, keep.long(), x), compiled(ids, keep, x.float())):
        assert torch.equal(other.class_, outputs.class_)
    with pytest.raises(UsageError, match=r"input 'keep' holds torch.int64; .* of i1, and not all of its values"):
        compiled(ids, keep.long() + 2, x)
    with pytest.raises(UsageError, match=r"input 'ids' holds torch.float32; wanted: a tensor \[\?, \?\] of i64"):
        compiled(ids.float(), keep, x)


def test_an_empty_batch_is_a_batch() -> None:
    compiled = mxloom.compile(layers(), example={"input": torch.randn(2, 32)})
    assert compiled(torch.randn(0, 32)).shape == (0, 8)


def test_names_of_outputs_as_fields() -> None:
    assert field_names(["logits", "class", "a b", "a_b", "0", "_x", "count"]) == [
        "logits",
        "class_",
        "a_b",
        "a_b_1",
        "output_0",
        "output_x",
        "count",
    ]


@pytest.mark.parametrize(
    "sizes", [{"batch": 0}, {"batch": 1.5}, {"sequence": -1}, {"sequence": "8"}, {"batch": True}, {"sequence": 10**30}]
)
def test_sizes_are_whole_numbers(sizes: dict[str, Any]) -> None:
    compiled = mxloom.compile(layers(), example={"input": torch.randn(2, 32)})
    for asked in (compiled.cost, compiled.coverage):
        with pytest.raises(MxloomError, match=f"{next(iter(sizes))} is a whole number from 1 to 1048576, got"):
            asked(**sizes)


def test_outputs_of_any_names_are_saved_and_loaded(tmp_path: Path) -> None:
    """Keys that are no Python names, and two that become one: what runs can be written."""
    inputs = torch.randint(10, (2, 5)), torch.rand(2, 5) > 0.5, torch.randn(2, 32)
    compiled = mxloom.compile(Chosen(), example=dict(zip(("ids", "keep", "x"), inputs, strict=True)))
    loaded = mxloom.load(compiled.save(tmp_path / "chosen"))
    assert loaded(*inputs)._fields == ("class_", "a_b", "a_b_1")
    assert all(torch.equal(one, other) for one, other in zip(loaded(*inputs), compiled(*inputs), strict=True))


@QUANTIZED
def test_a_compilation_is_a_snapshot(formats: dict[str, str], tmp_path: Path) -> None:
    model, x = layers(), torch.randn(3, 32)
    compiled = mxloom.compile(model, recipe(formats), example={"input": x})
    before = mxloom.compile(layers(), recipe(formats), example={"input": x})(x)
    for parameter in model.parameters():
        parameter.data.mul_(3)
    assert torch.equal(compiled(x), before)
    assert torch.equal(mxloom.load(compiled.save(tmp_path / "saved"))(x), before)


class Masked(nn.Module):
    """Values [B, T, 4] of which a mask [B, T] keeps some: the lengths of both go together."""

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return x * mask[..., None]


def test_sizes_that_go_together_are_named() -> None:
    example = {"x": torch.randn(2, 5, 4), "mask": torch.ones(2, 5, dtype=torch.bool)}
    with pytest.raises(MxloomError, match=r"dynamic=\{'x': \[0, 1\], 'mask': \[0, 1\]\} lets all change together"):
        mxloom.compile(Masked(), example=example)
    compiled = mxloom.compile(Masked(), example=example, dynamic={"x": [0, 1], "mask": [0, 1]})
    x, mask = torch.randn(3, 9, 4), torch.rand(3, 9) > 0.5
    assert torch.equal(compiled(x, mask), x * mask[..., None])
    with pytest.raises(UsageError, match="dynamic names 'y', which is no input of the example"):
        mxloom.compile(Masked(), example=example, dynamic={"y": [0]})
