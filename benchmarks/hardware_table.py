"""Layers as hardware: beats that differ, cycles beside their prediction, time to a finished simulation.

python benchmarks/hardware_table.py             # writes docs/hardware_results.md
python benchmarks/hardware_table.py --only bert # some of the designs, to the terminal alone
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from page import machine, table, write_head, write_section
from torch import nn

import mxloom
from mxloom.backends.dataflow.folding import Limits
from mxloom.backends.dataflow.simulation.arc import ArcSimulator
from mxloom.backends.dataflow.simulation.traffic import NO_STALLS, Stalls
from mxloom.backends.dataflow.verification import compare
from mxloom.compiler.hardware import hardware

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "hardware_results.md"
EMBEDDED = ROOT / "examples" / "models" / "kjv-2m"
SEQUENCES = 8
SIZES: dict[str, Any] = {"num_attention_heads": 4, "num_hidden_layers": 1}
MIXED = "mixed<!mx.block<{0}xf4E2M1FN>, !mx.block<{0}xf8E4M3FN>>"


@dataclass(frozen=True)
class Case:
    """A part of a model in formats, for so many positions."""

    name: str
    model: Callable[[], nn.Module | Path]
    part: str | None
    rules: Sequence[dict[str, Any]]
    positions: int = 16
    limits: Limits = field(default_factory=Limits)
    memory: int | None = None
    options: str = ""
    example: Callable[[], dict[str, torch.Tensor]] | None = None


def rule(weights: str, activations: str) -> list[dict[str, Any]]:
    return [{"weights": weights, "activations": activations}]


def mixed(block: int, weights: float, activations: float) -> list[dict[str, Any]]:
    """Blocks of FP4 or FP8, about seven of ten FP4."""
    format = MIXED.format(block)
    thresholds = {"weight_threshold": weights, "activation_threshold": activations}
    return [
        {"match": "*lm_head", "weights": "mxint8", "activations": "mxint8"},
        {"kind": "linear", "weights": format, "activations": format} | thresholds,
    ]


def llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 64, "intermediate_size": 176, "num_key_value_heads": 2, "vocab_size": 64}
    return LlamaForCausalLM(LlamaConfig(**sizes, **SIZES, max_position_embeddings=64))


def bert() -> nn.Module:
    from transformers import BertConfig, BertModel

    sizes = {"hidden_size": 64, "intermediate_size": 256, "vocab_size": 64, "max_position_embeddings": 64}
    return BertModel(BertConfig(**sizes, **SIZES))


def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes: dict[str, Any] = {"n_embd": 64, "n_head": 4, "n_layer": 1, "vocab_size": 64, "n_positions": 64}
    return GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0))


def vit() -> nn.Module:
    from transformers import ViTConfig, ViTModel

    return ViTModel(ViTConfig(image_size=24, patch_size=8, hidden_size=64, intermediate_size=256, **SIZES))


def cnn() -> nn.Module:
    first = [nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 16, 3, stride=2), nn.ReLU()]
    return nn.Sequential(*first, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10))


def picture() -> dict[str, torch.Tensor]:
    return {"input": torch.randn(2, 3, 16, 16)}


LAYER, INT8 = "model.layers.0", rule("mxint8", "mxint8")
CASES = (
    Case("embedded model, layer 0, MXINT8", lambda: EMBEDDED, LAYER, INT8),
    Case("embedded model, layer 0, MXFP4 x MXINT8", lambda: EMBEDDED, LAYER, rule("mxfp4", "mxint8")),
    Case("embedded model, layer 0, FP4 or FP8 by blocks of 32", lambda: EMBEDDED, LAYER, mixed(32, 0.0073, 0.93)),
    Case("embedded model, layer 0, FP4 or FP8 by blocks of 16", lambda: EMBEDDED, LAYER, mixed(16, 0.0035, 0.28)),
    Case(
        "embedded model, layer 0, MXINT8, within 40 000 LUT", lambda: EMBEDDED, LAYER, INT8, limits=Limits(luts=40000)
    ),
    Case("embedded model, layer 0, MXINT8, weights from outside", lambda: EMBEDDED, LAYER, INT8, memory=60_000),
    Case("embedded model, 4 layers, MXINT8", lambda: EMBEDDED, "model.layers", INT8),
    Case("Llama, hidden 64, MXINT8, sums in f32", llama, LAYER, INT8, options="{accumulator=f32 partials=4}"),
    Case("Llama, hidden 64, MXINT8", llama, LAYER, INT8),
    Case("Llama, hidden 64, MXFP6 (E2M3)", llama, LAYER, rule("mxfp6_e2m3", "mxfp6_e2m3")),
    Case("BERT, hidden 64, MXINT8", bert, "encoder.layer.0", INT8),
    Case("GPT-2, hidden 64, NVFP4", gpt2, "transformer.h.0", rule("nvfp4", "nvfp4")),
    Case("ViT, hidden 64, 10 positions, MXINT8", vit, "layers.0", INT8, options='{part="layers.0"}'),
    Case("CNN, 2 convolutions, pooling, MXINT8", cnn, None, INT8, example=picture),
)

HEADS = [
    "part of a model",
    "beats",
    "differ",
    "interval",
    "predicted",
    "slowest stage",
    "latency",
    "predicted",
    "stages",
    "CPU s",
]
EXPLAINED = f"""\
Every design takes {SEQUENCES} sequences in a row, twice: once without stalls, and once with a tenth of all cycles
stalled at random on every stream. `differ` are beats of either run that are not the reference's (arc simulator).
Interval and latency are those of the run without stalls, in cycles; `predicted` was known before anything was built;
the slowest stage's cycles are the formula of its sizes. `CPU s` is the processor time from the typed module to the end
of the first simulation: lowering, prediction, circuit, CIRCT, simulator, the reference's vectors and the run."""


def main() -> int:
    only = sys.argv[sys.argv.index("--only") + 1] if "--only" in sys.argv else ""
    rows = []
    for case in CASES:
        if only.lower() in case.name.lower():
            rows.append(measured(case))
            print(" | ".join(rows[-1]), flush=True)
    if not only:
        write_head(PAGE, f"# Hardware: measured\n\n`python benchmarks/hardware_table.py` writes this page. {machine()}")
        write_section(PAGE, "Layers and models", f"{EXPLAINED}\n\n{table(HEADS, rows)}")
    return int(any(row[2] != "0" for row in rows))


def measured(case: Case) -> list[str]:
    """The line of a design."""
    torch.manual_seed(0)
    model = case.model()
    recipe = {"version": 1, "quantize": list(case.rules), "passes": [f"legalize-hardware{case.options}"]}
    example = case.example() if case.example else None
    compiled = mxloom.compile(model.eval() if isinstance(model, nn.Module) else model, recipe, example=example)
    start = processor_time()
    design = hardware(compiled, case.part, positions=case.positions, limits=case.limits, memory=case.memory)
    given = design.vectors(SEQUENCES)
    simulator = ArcSimulator(design.text, design.graph.input_streams, design.graph.output_streams)
    plain = compare(simulator, design.graph, given, NO_STALLS)
    seconds = processor_time() - start
    stalled = compare(simulator, design.graph, given, Stalls.random(0.1))
    differ = sum(each.mismatches + each.missing + each.surplus + each.violations for each in (plain, stalled))
    timing = design.timing
    slowest = design.graph.nodes[timing.slowest].stage.cycles
    counts = [plain.beats, differ, round(plain.interval), round(timing.interval), slowest]
    counts += [plain.latency, timing.latency, len(design.graph.nodes)]
    return [case.name, *(f"{count:,}" for count in counts), f"{seconds:.1f}"]


def processor_time() -> float:
    """Seconds of this process and of those that it waited for."""
    return sum(os.times()[:4])


if __name__ == "__main__":
    sys.exit(main())
