"""A decoder layer of the embedded model, with its real weights, as hardware: every beat equals the reference."""

from pathlib import Path
from typing import Any

import pytest
import torch

import mxloom
from mxloom.backends.dataflow.graph import Graph
from mxloom.backends.dataflow.lowering import lower
from mxloom.backends.dataflow.rtl import circuit_text
from mxloom.backends.dataflow.simulation.arc import ArcSimulator
from mxloom.backends.dataflow.simulation.traffic import NO_STALLS, Stalls
from mxloom.backends.dataflow.verification import compare, vectors
from mxloom.backends.reference import body
from mxloom.backends.static import static
from mxloom.passes._context import CompileContext
from mxloom.passes.extract import Extract

MODEL = Path(__file__).parents[2] / "examples" / "models" / "kjv-2m"
POSITIONS = 16
SEQUENCES = 8


@pytest.mark.slow
@pytest.mark.parametrize("weights", ["mxint8", "mxfp4"])
def test_a_decoder_layer_equals_the_reference(weights: str) -> None:
    recipe: dict[str, Any] = {
        "version": 1,
        "quantize": [{"weights": weights, "activations": "mxint8"}],
        "passes": ["legalize-hardware"],
    }
    compiled = mxloom.compile(MODEL, recipe)
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
    given = vectors(module, store, graph, [(table[each].float(),) for each in tokens])
    for stalls in (NO_STALLS, Stalls.random(0.1)):
        outcome = compare(simulator, graph, given, stalls)
        assert outcome.is_equal, outcome
        assert outcome.beats == SEQUENCES * POSITIONS * 192
