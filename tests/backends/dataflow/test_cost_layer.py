"""The cost model holds for what the embedded model's layer is built from, without extrapolation."""

from pathlib import Path
from typing import Any

import pytest

import mxloom
from mxloom.backends.dataflow.cost.stages import stage_cost
from mxloom.compiler.hardware import hardware

MODEL = Path(__file__).parents[3] / "examples" / "models" / "kjv-2m"
MIXED = "mixed<!mx.block<32xf4E2M1FN>, !mx.block<32xf8E4M3FN>>"
RULES: dict[str, list[dict[str, Any]]] = {
    "mxint8": [{"weights": "mxint8", "activations": "mxint8"}],
    "mxfp8": [{"weights": "mxfp8_e4m3", "activations": "mxfp8_e4m3"}],
    "mxfp4 x mxint8": [{"weights": "mxfp4", "activations": "mxint8"}],
    "mixed blocks": [
        {"match": "*lm_head", "weights": "mxint8", "activations": "mxint8"},
        {
            "kind": "linear",
            "weights": MIXED,
            "activations": MIXED,
            "weight_threshold": 0.0073,
            "activation_threshold": 0.93,
        },
    ],
}


@pytest.mark.slow
@pytest.mark.parametrize("name", RULES)
def test_no_stage_of_a_layer_lies_outside_the_fitted_range(name: str) -> None:
    compiled = mxloom.compile(MODEL, {"version": 1, "quantize": RULES[name], "passes": ["legalize-hardware"]})
    graph = hardware(compiled, "model.layers.0", positions=16).graph
    found = {place: stage_cost(node.stage).outside for place, node in graph.nodes.items()}
    assert len(found) >= 35
    assert not {place: outside for place, outside in found.items() if outside}
