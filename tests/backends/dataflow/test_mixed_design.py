"""Whole designs whose operands are blocks of two kinds, weights and computed values, against the reference."""

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mxloom
from mxloom.backends.dataflow.graph import Graph
from mxloom.backends.dataflow.lowering import lower
from mxloom.backends.dataflow.rtl import circuit_text
from mxloom.backends.dataflow.simulation.arc import ArcSimulator
from mxloom.backends.dataflow.simulation.verilator import VerilatorSimulator
from mxloom.backends.dataflow.stages.quantize_mixed import QuantizeMixed
from mxloom.backends.dataflow.verification import Vectors, compare, vectors
from mxloom.backends.reference import Interpreter
from mxloom.backends.static import static
from mxloom.backends.weight_store import WeightStore
from mxloom.dialects.errors import MxloomError
from mxloom.dialects.formats import MixedType
from mxloom.dialects.mx import parse_module
from mxloom.dialects.operations._shapes import element_of
from mxloom.dialects.operations.cast import CastOp
from mxloom.passes._context import CompileContext
from mxloom.passes.pack import Pack

from .stages import STALLS, needs_verilator

FP = "mixed<!mx.block<{0}xf4E2M1FN>, !mx.block<{0}xf8E4M3FN>>"
INT = "mixed<!mx.block<32x!mx.fixed<4, 2>>, !mx.block<32x!mx.fixed<8, 6>>>"
INPUTS = 4


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm = nn.LayerNorm(70)
        self.up = nn.Linear(70, 96)
        self.down = nn.Linear(96, 70, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(nn.functional.gelu(self.up(self.norm(x))))


@cache
def built(format: str, weight_threshold: float, activation_threshold: float) -> tuple[Graph, str, Vectors]:
    rule: dict[str, Any] = {"weights": format, "activations": format}
    rule |= {"weight_threshold": weight_threshold, "activation_threshold": activation_threshold}
    recipe = {"version": 1, "quantize": [rule], "passes": ["legalize-hardware"]}
    compiled = mxloom.compile(Mlp().eval(), recipe, example={"x": random(5, 70)})
    module, store, _ = static(compiled.module, compiled.weights, [(5, 70)])
    graph = lower(module, store)
    graph.add_forks()
    graph.add_queues()
    inputs = [(random(5, 70, seed=seed) * 2,) for seed in range(INPUTS)]
    for x in inputs:
        _check_both_kinds_occur(Interpreter(module, store), *x)
        assert torch.equal(compiled(*x), Interpreter(module, store)(*x)[0])
    return graph, circuit_text(graph.module("mlp")), vectors(module, store, graph, inputs)


def _check_both_kinds_occur(interpreter: Interpreter, x: Tensor) -> None:
    seen: dict[Any, Tensor] = {}
    interpreter(x, observe=seen.__setitem__)
    casts = [
        op for op in interpreter.block.ops if isinstance(op, CastOp) and isinstance(element_of(op.result), MixedType)
    ]
    assert len(casts) == 4
    for op in casts:
        type = element_of(op.result)
        assert isinstance(type, MixedType)
        if op.result in seen:
            low, high = type.candidates(seen[op.input], op.how())
            kept = seen[op.result]
            assert not torch.equal(kept, low.float()) and not torch.equal(kept, high.float())


MLPS = {"16": (FP.format(16), 0.0005, 0.03), "32": (FP.format(32), 0.001, 0.06), "integers": (INT, 0.003, 0.2)}


@pytest.mark.parametrize("stall", STALLS)
@pytest.mark.parametrize("mlp", MLPS)
def test_an_mlp_equals_the_reference(mlp: str, stall: str) -> None:
    graph, text, given = built(*MLPS[mlp])
    assert sum(isinstance(node.stage, QuantizeMixed) for node in graph.nodes.values()) == 2
    outcome = compare(ArcSimulator(text, graph.input_streams, graph.output_streams), graph, given, STALLS[stall])
    assert outcome.is_equal, outcome
    assert outcome.beats == INPUTS * 5 * 70


@needs_verilator
@pytest.mark.slow
def test_an_mlp_equals_the_reference_under_verilator() -> None:
    graph, text, given = built(*MLPS["32"])
    outcome = compare(
        VerilatorSimulator(text, graph.input_streams, graph.output_streams), graph, given, STALLS["random 0.5"]
    )
    assert outcome.is_equal, outcome
    assert outcome.beats == INPUTS * 5 * 70


X, S = "!mx.fixed<24, 12>", "!mx.fixed<12, 11>"
LOW, HIGH = "!mx.block<{}xf4E2M1FN>", "!mx.block<{}xf8E4M3FN>"
ROWS, COLUMNS = (f"!mx.mixed<{LOW.format(each)}, {HIGH.format(each)}>" for each in ("32", "32x1"))
PRODUCTS = f"""
func.func @forward(%x: tensor<5x70x{X}>, %y: tensor<70x6x{X}>) -> (tensor<5x6x{X}>, tensor<5x7x{X}>) {{
  %s = mx.parameter "s" : tensor<70xf32>
  %sf = mx.cast %s : tensor<70xf32> to tensor<70x{S}>
  %t = mx.parameter "t" : tensor<70x1xf32>
  %tf = mx.cast %t : tensor<70x1xf32> to tensor<70x1x{S}>
  %a = mx.cast %x, sensitivity %sf {{threshold = 0.5 : f64}}
    : tensor<5x70x{X}>, tensor<70x{S}> to tensor<5x70x{ROWS}>
  %b = mx.cast %y, sensitivity %tf {{threshold = 0.3 : f64}}
    : tensor<70x6x{X}>, tensor<70x1x{S}> to tensor<70x6x{COLUMNS}>
  %p = mx.matmul %a, %b, window = #mx.window<36, -20>
    : (tensor<5x70x{ROWS}>, tensor<70x6x{COLUMNS}>) -> tensor<5x6x{X}>
  %w = mx.parameter "w" : tensor<70x7xf32>
  %g = mx.parameter "g" : tensor<70x7xf32>
  %wf = mx.cast %w, sensitivity %g {{threshold = 0.4 : f64}}
    : tensor<70x7xf32>, tensor<70x7xf32> to tensor<70x7x{COLUMNS}>
  %q = mx.linear %a, %wf, transposed, window = #mx.window<36, -20>
    : (tensor<5x70x{ROWS}>, tensor<70x7x{COLUMNS}>) -> tensor<5x7x{X}>
  func.return %p, %q : tensor<5x6x{X}>, tensor<5x7x{X}>
}}"""
WEIGHTS = WeightStore.from_state_dict(
    {
        "w": random(70, 7, seed=9),
        "g": random(70, 7, seed=10).square(),
        "s": random(70, seed=11).square() / 8,
        "t": random(70, 1, seed=12).square() / 8,
        "negative": random(70, 1, seed=12),
    }
)


def test_products_of_two_values_and_transposed_weights() -> None:
    module = parse_module(PRODUCTS)
    graph = lower(module, WEIGHTS)
    graph.add_forks()
    graph.add_queues()
    inputs = [(random(5, 70, seed=seed) * 2, random(70, 6, seed=seed + 50)) for seed in range(INPUTS)]
    given = vectors(module, WEIGHTS, graph, inputs)
    simulator = ArcSimulator(circuit_text(graph.module("products")), graph.input_streams, graph.output_streams)
    for stall in STALLS.values():
        outcome = compare(simulator, graph, given, stall)
        assert outcome.is_equal, outcome
        assert outcome.beats == INPUTS * 5 * (6 + 7)


def test_packed_weights_give_the_same_design() -> None:
    """Stored blocks, transposed ones too, fill memories with the words that casts fill them with."""
    module, packed = parse_module(PRODUCTS), WEIGHTS.copy()
    Pack().apply(CompileContext(weights=packed), module)
    assert packed.parts("w").keys() >= {"codes", "high_codes", "choice", "offsets"} and "w" not in packed
    assert (lower(module, packed).configuration() == lower(parse_module(PRODUCTS), WEIGHTS).configuration()).all()


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (" {threshold = 0.5 : f64}", "", r"p \(mx.matmul\): .*no cast says above which threshold"),
        (
            'mx.parameter "t" : tensor<70x1xf32>',
            'mx.parameter "negative" : tensor<70x1xf32>',
            r"p \(mx.matmul\): a sensitivity is negative",
        ),
        (ROWS, ROWS.replace("32", "16"), r"p \(mx.matmul\): .*blocks of 32 numbers in beats of 16"),
    ],
)
def test_what_has_no_hardware_is_named(old: str, new: str, message: str) -> None:
    with pytest.raises(MxloomError, match=message):
        lower(parse_module(PRODUCTS.replace(old, new)), WEIGHTS)
