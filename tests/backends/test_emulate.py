"""`emulate` equals the reference interpreter bit for bit, and reads as Python."""

import io

import pytest
import torch

from mxloom.backends.emulate import Emulate, build
from mxloom.backends.reference import Interpreter
from mxloom.backends.weight_store import WeightStore
from mxloom.dialects.instances import INSTANCES
from mxloom.dialects.mx import context, parse_module
from mxloom.passes.quantize import Quantize

MODEL = """
!half = tensor<?x?x12xf32>
func.func @forward(%x: tensor<?x?x40xf32>) -> (tensor<?x?x24xf32>, tensor<?x?x12xf32>) {
  %a.weight = mx.parameter "a.weight" : tensor<24x40xf32>
  %a.bias = mx.parameter "a.bias" : tensor<24xf32>
  %a = mx.linear %x, %a.weight, %a.bias : (tensor<?x?x40xf32>, tensor<24x40xf32>, tensor<24xf32>) -> tensor<?x?x24xf32>
  %s = mx.silu %a : (tensor<?x?x24xf32>) -> tensor<?x?x24xf32>
  %first, %second = mx.split %s, split_size = 12, dim = -1 : (tensor<?x?x24xf32>) -> (!half, !half)
  func.return %a, %second : tensor<?x?x24xf32>, tensor<?x?x12xf32>
}
"""


def store() -> WeightStore:
    generator = torch.Generator().manual_seed(0)
    return WeightStore.from_state_dict(
        {"a.weight": torch.randn(24, 40, generator=generator), "a.bias": torch.randn(24, generator=generator)}
    )


@pytest.mark.parametrize("format", [name for name in INSTANCES if name not in ("f32",)])
def test_equals_the_reference_in_every_format(format: str):
    module, weights = parse_module(MODEL), store()
    Quantize(weights=format, activations=format).apply(context(), module)
    x = torch.randn(2, 5, 40, generator=torch.Generator().manual_seed(1))
    expected, got = Interpreter(module, weights)(x), build(module, weights)(x)
    assert all(torch.equal(e, g) for e, g in zip(expected, got, strict=True))
    wide = Interpreter(parse_module(MODEL), weights)(x)
    assert not torch.equal(wide[0], expected[0]), "a cast that changes nothing would prove nothing"


def test_results_that_are_typed_narrow_are_rounded_once():
    text = MODEL.replace("-> tensor<?x?x24xf32>\n  %s", "-> tensor<?x?x24x!mx.block<8xf4E2M1FN>>\n  %s").replace(
        "mx.silu %a : (tensor<?x?x24xf32>)", "mx.silu %a : (tensor<?x?x24x!mx.block<8xf4E2M1FN>>)"
    )
    text = text.replace(
        "-> (tensor<?x?x24xf32>, tensor<?x?x12xf32>) {",
        "-> (tensor<?x?x24x!mx.block<8xf4E2M1FN>>, tensor<?x?x12xf32>) {",
    )
    text = text.replace("%second : tensor<?x?x24xf32>", "%second : tensor<?x?x24x!mx.block<8xf4E2M1FN>>")
    module, weights = parse_module(text), store()
    x = torch.randn(2, 5, 40, generator=torch.Generator().manual_seed(1))
    expected, got = Interpreter(module, weights)(x), build(module, weights)(x)
    assert all(torch.equal(e, g) for e, g in zip(expected, got, strict=True))
    assert expected[0].unique().numel() < 80


def test_the_code_names_the_modules_of_the_model_and_the_formats():
    module = parse_module(MODEL)
    Quantize(weights="mxfp4", activations="mxint8").apply(context(), module)
    output = io.StringIO()
    Emulate().emit(context(), module, output)
    code = output.getvalue()
    assert "def forward(self, x):" in code
    assert "self.a.weight_mxfp4" in code
    assert "torch.ops.mxloom.quantize.default(x, '!mx.block<32x!mx.fixed<8, 6>>', 'floor', 'rne'" in code


def test_the_graph_runs_under_the_compiler_of_torch_export():
    """The operators have fake implementations: the graph can be exported again, sizes dynamic."""
    module, weights = parse_module(MODEL), store()
    Quantize(weights="mxfp4", activations="nvfp4").apply(context(), module)
    x = torch.randn(2, 5, 40)
    graph = build(module, weights)
    dims = {"x": {0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO}}
    again = torch.export.export(graph, (x,), dynamic_shapes=dims).module()
    other = torch.randn(3, 7, 40)
    assert all(torch.equal(a, b) for a, b in zip(graph(other), again(other), strict=True))
