"""`emulate` equals the reference interpreter bit for bit, and reads as Python."""

import io
from pathlib import Path

import pytest
import torch

import mxloom
from mxloom.backends.emulate import Emulate, _register, build
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


LAYERS = [
    "a_b",
    "a-b",
    "a b",
    "w_mxfp4",
    "return",
    'x"y',
    "x\ny",
    "None",
    "self",
    "torch",
    "ü",
    "ﬁ",
    "fi",
    "0",
    "_0",
    "zero",
]


class Chain(torch.nn.Module):
    """Linear layers under any names, each used in turn."""

    def __init__(self, names: list[str]) -> None:
        super().__init__()
        for name in names:
            self.add_module(name, torch.nn.Linear(32, 32))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.children():
            x = layer(x)
        return x


class Shared(torch.nn.Module):
    """A weight in two layouts, a weight under two names, and one whose name is that of another's rounding."""

    def __init__(self) -> None:
        super().__init__()
        self.w = torch.nn.Parameter(torch.randn(32, 32))
        self.w_mxfp4 = torch.nn.Parameter(torch.randn(32, 32))
        self.p, self.q = torch.nn.Linear(32, 32, bias=False), torch.nn.Linear(32, 32, bias=False)
        self.q.weight = self.p.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.nn.functional.linear(x, self.w) + x @ self.w + torch.nn.functional.linear(x, self.w_mxfp4)
        return self.q(torch.relu(self.p(x)))


RULES: list[dict[str, str]] = [
    {},
    {"weights": "mxfp4"},
    {"weights": "mxfp4", "rounding": "stochastic"},
    {"weights": "nvfp4", "activations": "mxint8"},
    {"weights": "bf16"},
]


def interpreted(compiled: mxloom.Compiled, x: torch.Tensor) -> torch.Tensor:
    return Interpreter(compiled.module, compiled.weights)(x)[0]


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize(
    "model", [Chain(LAYERS), Chain([*reversed(LAYERS)]), Shared()], ids=["names", "reversed", "shared"]
)
def test_no_two_tensors_share_a_name(model: torch.nn.Module, rule: dict[str, str], tmp_path: Path):
    """Whatever the names: the graph equals the reference bit for bit, and the wide one equals torch."""
    x = torch.randn(3, 32, generator=torch.Generator().manual_seed(2))
    compiled = mxloom.compile(model, {"quantize": [rule]} if rule else None, example={"x": x})
    assert torch.equal(compiled(x), interpreted(compiled, x))
    assert torch.equal(mxloom.load(compiled.save(tmp_path / "saved"))(x), compiled(x))
    assert rule or torch.equal(compiled(x), model(x))


def test_one_weight_rounded_by_several_rules():
    rules: list[dict[str, str]] = [
        {"match": match, "weights": "mxfp4", "scale_rule": scale_rule, "rounding": rounding}
        for match, scale_rule, rounding in (("p", "floor", "rne"), ("q", "ceil", "rtz"), ("*", "rceil", "rna"))
    ]
    x = torch.randn(3, 32, generator=torch.Generator().manual_seed(2))
    compiled = mxloom.compile(Shared(), {"quantize": rules}, example={"x": x})
    assert torch.equal(compiled(x), interpreted(compiled, x))
    held = dict(compiled.emulation.named_buffers())
    assert len([name for name in held if name.startswith(("p.weight", "q.weight"))]) == 2


def test_a_name_that_is_taken_is_an_error():
    held = torch.nn.Module()
    _register(held, "weight", torch.ones(1))
    for name in ("weight", "training", "forward"):
        with pytest.raises(KeyError, match=name):
            _register(held, name, torch.zeros(1))


def test_inputs_whose_names_code_cannot_say():
    text = MODEL.replace("%x", "%torch").replace(
        "{\n  %a.weight", "{\n  %input = mx.silu %torch : (tensor<?x?x40xf32>) -> tensor<?x?x40xf32>\n  %a.weight"
    )
    text = text.replace("mx.linear %torch", "mx.linear %input")
    module, weights = parse_module(text), store()
    x = torch.randn(2, 5, 40)
    assert torch.equal(build(module, weights)(x)[0], Interpreter(module, weights)(x)[0])
