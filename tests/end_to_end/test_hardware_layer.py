"""A decoder layer of the embedded model, with its real weights, as hardware: every beat equals the reference."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from xdsl.ir import SSAValue

import mxloom
from mxloom.backends.dataflow.graph import Graph
from mxloom.backends.dataflow.lowering import lower
from mxloom.backends.dataflow.rtl import circuit_text
from mxloom.backends.dataflow.simulation.arc import ArcSimulator
from mxloom.backends.dataflow.simulation.traffic import NO_STALLS, Stalls
from mxloom.backends.dataflow.stages.quantize_mixed import QuantizeMixed
from mxloom.backends.dataflow.verification import compare, on_grid, vectors
from mxloom.backends.reference import Interpreter, body
from mxloom.backends.static import static
from mxloom.backends.weight_store import WeightStore
from mxloom.dialects.formats import MixedType, block_impact
from mxloom.dialects.operations._shapes import element_of
from mxloom.dialects.operations.cast import CastOp
from mxloom.dialects.operations.parameter import ParameterOp
from mxloom.passes._context import CompileContext
from mxloom.passes.extract import Extract

MODEL = Path(__file__).parents[2] / "examples" / "models" / "kjv-2m"
POSITIONS = 16
SEQUENCES = 8


MIXED = "mixed<!mx.block<{0}xf4E2M1FN>, !mx.block<{0}xf8E4M3FN>>"


def check_layer(rules: list[dict[str, Any]]) -> tuple[Interpreter, WeightStore, Graph, list[Tensor]]:
    """Compare the layer; returns its reference, its weights, its design, and the inputs as the design takes them."""
    compiled = mxloom.compile(MODEL, {"version": 1, "quantize": rules, "passes": ["legalize-hardware"]})
    sizes = [(1, POSITIONS)] * len(body(compiled.module).args)
    module, store, assumed = static(compiled.module, compiled.weights, sizes)
    assert all("padding mask is left out" in each for each in assumed)
    Extract(part=("model.layers.0",)).apply(CompileContext(weights=store), module)
    module.verify()
    graph: Graph = lower(module, store)
    graph.add_forks()
    graph.add_queues()
    simulator = ArcSimulator(circuit_text(graph.module("layer")), graph.input_streams, graph.output_streams)
    table = compiled.weights.wide("lm_head.weight")
    tokens = torch.randint(0, len(table), (SEQUENCES, 1, POSITIONS), generator=torch.Generator().manual_seed(0))
    inputs = [table[each].float() for each in tokens]
    given = vectors(module, store, graph, [(each,) for each in inputs])
    for stalls in (NO_STALLS, Stalls.random(0.1)):
        outcome = compare(simulator, graph, given, stalls)
        assert outcome.is_equal, outcome
        assert outcome.beats == SEQUENCES * POSITIONS * 192
    (boundary,) = graph.inputs
    return Interpreter(module, store), store, graph, [on_grid(each, boundary.point) for each in inputs]


@pytest.mark.slow
@pytest.mark.parametrize("weights", ["mxint8", "mxfp4"])
def test_a_decoder_layer_equals_the_reference(weights: str) -> None:
    check_layer([{"weights": weights, "activations": "mxint8"}])


@pytest.mark.slow
@pytest.mark.parametrize(("block", "thresholds"), [(32, (0.0073, 0.93)), (16, (0.0035, 0.28))])
def test_a_decoder_layer_of_mixed_blocks_equals_the_reference(block: int, thresholds: tuple[float, float]) -> None:
    """Every linear of the layer reads FP4 or FP8, block by block, weights and activations; 70 % or so are FP4."""
    mixed = MIXED.format(block)
    rules: list[dict[str, Any]] = [
        {"match": "*lm_head", "weights": "mxint8", "activations": "mxint8"},
        {"kind": "linear", "weights": mixed, "activations": mixed}
        | dict(zip(("weight_threshold", "activation_threshold"), thresholds, strict=True)),
    ]
    interpreter, store, graph, inputs = check_layer(rules)
    units = [node.stage for node in graph.nodes.values() if isinstance(node.stage, QuantizeMixed)]
    assert [unit.size for unit in units] == [192, 192, 192, 512]
    low: dict[bool, list[Tensor]] = {True: [], False: []}
    for given in inputs:
        seen: dict[SSAValue, Tensor] = {}
        interpreter(given, observe=seen.__setitem__)
        for op in interpreter.block.ops:
            if isinstance(op, CastOp) and isinstance(type := element_of(op.result), MixedType):
                owner = op.input.owner
                is_weight = isinstance(owner, ParameterOp)
                x = store.wide(owner.source.data) if isinstance(owner, ParameterOp) else seen[op.input]
                low[is_weight].append((block_impact(x, type, how=op.how()) <= thresholds[not is_weight]).flatten())
    for blocks in low.values():
        assert 0.65 < float(torch.cat(blocks).double().mean()) < 0.75
