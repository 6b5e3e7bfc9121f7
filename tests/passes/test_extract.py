"""`extract`: a part of a model computes what it computes inside the whole, before and after legalization."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from xdsl.dialects.builtin import ModuleOp

import mxloom
from mxloom.backends.reference import Interpreter, body
from mxloom.backends.weight_store import WeightStore
from mxloom.dialects.errors import UsageError
from mxloom.dialects.mx import parse_module
from mxloom.dialects.operations.parameter import ParameterOp
from mxloom.passes._context import CompileContext
from mxloom.passes.extract import Extract

MODEL = Path(__file__).parents[2] / "examples" / "models" / "kjv-2m"


def extracted(module: ModuleOp, *part: str) -> ModuleOp:
    found = module.clone()
    Extract(part).apply(CompileContext(), found)
    found.verify()
    assert str(parse_module(str(found))) == str(found)
    return found


def values_of(module: ModuleOp, weights: WeightStore, *inputs: Tensor) -> dict[str, Tensor]:
    """Every value of a module by its name."""
    seen: dict[str, Tensor] = {}

    def observe(value: object, tensor: Tensor) -> None:
        seen[value.name_hint] = tensor  # type: ignore[attr-defined]

    Interpreter(module, weights)(*inputs, observe=observe)
    return seen


@pytest.mark.parametrize("passes", [[], ["legalize-hardware{samples=2}"]])
def test_a_layer_computes_what_it_computes_in_the_model(passes: list[str]) -> None:
    recipe = {"version": 1, "quantize": [{"weights": "mxint8", "activations": "mxint8"}], "passes": passes}
    if not passes:
        del recipe["passes"]
    whole = mxloom.compile(MODEL, recipe)
    layer = extracted(whole.module, "model.layers.1")
    ids = torch.arange(5, 25)[None]
    seen = values_of(whole.module, whole.weights, ids, torch.ones_like(ids))
    interpreter = Interpreter(layer, whole.weights)
    (got,) = interpreter(*(seen[name] for name in interpreter.inputs))
    (name,) = (each.data for each in body(layer).parent_op().attributes["outputs"])  # type: ignore[union-attr, attr-defined]
    assert name == "model.layers.1.add.1"
    assert torch.equal(got, seen[name])
    sources = {op.source.data for op in body(layer).ops if isinstance(op, ParameterOp)}
    assert len(sources) == 9 and all(source.startswith("model.layers.1.") for source in sources)


TEXT = """func.func @f(%x: tensor<2x8xf32>, %y: tensor<2x8xf32>) -> tensor<2x8xf32> {
  %w = mx.parameter "w" : tensor<8x8xf32>
  %v = mx.parameter "v" : tensor<8x8xf32>
  %one.a = mx.linear %x, %w : (tensor<2x8xf32>, tensor<8x8xf32>) -> tensor<2x8xf32>
  %one.b = mx.silu %one.a : (tensor<2x8xf32>) -> tensor<2x8xf32>
  %two.a = mx.mul %one.b, %one.a : (tensor<2x8xf32>, tensor<2x8xf32>) -> tensor<2x8xf32>
  %two.b = mx.linear %two.a, %v : (tensor<2x8xf32>, tensor<8x8xf32>) -> tensor<2x8xf32>
  %onerous = mx.add %two.b, %y : (tensor<2x8xf32>, tensor<2x8xf32>) -> tensor<2x8xf32>
  func.return %onerous : tensor<2x8xf32>
}"""


def names(module: ModuleOp) -> tuple[list[str | None], list[str]]:
    outputs = body(module).parent_op().attributes["outputs"]  # type: ignore[union-attr]
    return [argument.name_hint for argument in body(module).args], [each.data for each in outputs]  # type: ignore[attr-defined]


def test_inputs_and_outputs_are_what_crosses_the_border() -> None:
    module = parse_module(TEXT)
    assert names(extracted(module, "one")) == (["x"], ["one.a", "one.b"])
    assert names(extracted(module, "two")) == (["one.a", "one.b"], ["two.b"])
    assert names(extracted(module, "one", "two")) == (["x"], ["two.b"])
    assert names(extracted(module, "onerous")) == (["y", "two.b"], ["onerous"])
    assert '"w"' in str(extracted(module, "one")) and '"v"' not in str(extracted(module, "one"))


CAST_TEXT = """func.func @f(%x: tensor<2x8xf32>) -> (tensor<2x8xf32>, tensor<2x8x!mx.fixed<8, 6>>) {
  %w = mx.parameter "w" : tensor<8x8xf32>
  %one.a = mx.silu %x : (tensor<2x8xf32>) -> tensor<2x8xf32>
  %one.a.fixed = mx.cast %one.a : tensor<2x8xf32> to tensor<2x8x!mx.fixed<16, 8>>
  %one.a.mxint8 = mx.cast %one.a.fixed : tensor<2x8x!mx.fixed<16, 8>> to tensor<2x8xBLOCKS>
  %two.a = mx.linear %one.a.mxint8, %w : (tensor<2x8xBLOCKS>, tensor<8x8xf32>) -> tensor<2x8xf32>
  %three.a = mx.linear %one.a.mxint8, %w : (tensor<2x8xBLOCKS>, tensor<8x8xf32>) -> tensor<2x8xf32>
  %three.b = mx.add %three.a, %two.a : (tensor<2x8xf32>, tensor<2x8xf32>) -> tensor<2x8xf32>
  %three.c = mx.cast %three.b : tensor<2x8xf32> to tensor<2x8x!mx.fixed<8, 6>>
  func.return %three.b, %three.c : tensor<2x8xf32>, tensor<2x8x!mx.fixed<8, 6>>
}""".replace("BLOCKS", "!mx.block<8x!mx.fixed<8, 6>>")


def test_a_cast_goes_with_what_reads_it() -> None:
    """Two parts that read one value rounded alike each round it; a cast that the model returns stays where it is."""
    module = parse_module(CAST_TEXT)
    one, two, three = (extracted(module, part) for part in ("one", "two", "three"))
    assert names(one) == (["x"], ["one.a"]) and "mx.cast" not in str(one)
    assert names(two) == (["one.a"], ["two.a"]) and str(two).count("mx.cast") == 2
    assert names(three) == (["one.a", "two.a"], ["three.b", "three.c"]) and str(three).count("mx.cast") == 3
    assert names(extracted(module, "two", "three")) == (["one.a"], ["three.b", "three.c"])
    with pytest.raises(UsageError, match=r"no operation belongs to 'one\.a\.mxint8'"):
        extracted(module, "one.a.mxint8")


def test_a_part_that_is_not_there_is_told() -> None:
    with pytest.raises(UsageError, match=r"no operation belongs to 'three.b'"):
        extracted(parse_module(TEXT), "one", "three.b")
    with pytest.raises(UsageError, match="name the modules to keep"):
        extracted(parse_module(TEXT))
