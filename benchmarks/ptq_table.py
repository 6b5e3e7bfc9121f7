"""Weight passes side by side: eight methods in five 4-bit formats (run: ptq_table.py [TEXT] [--write docs/results.md]).

Weights and input activations of every linear but `lm_head`; f32 elsewhere. Windows of 512 without overlap, the first
`--windows`; KL in nats over all their tokens. The embedded model on its held-out text, calibrated on the last windows
of it; with TEXT (WikiText-2's validation text) SmolLM2-135M-Instruct too, on its first 200 000 characters, calibrated
on windows from the 40th. `--only PATTERN`: the rows in whose name it is found.
"""

from __future__ import annotations

import argparse
import re
import time
from pathlib import Path

import torch
from page import table, write_section
from published import Measured, embedded, recipe, smollm2

import mxloom

FORMATS = ("mxfp4", "nvfp4", "mxint4", "int4_g128", "int4_channel")
BLOCKS = {"mxfp4": 32, "nvfp4": 16, "mxint4": 32, "int4_g128": 64, "int4_channel": 64}
"""Sizes of rotations: the format's block, or the largest power of two that divides every width of both models."""


def methods(format: str) -> dict[str, list[str]]:
    """The passes of each method for a format."""
    rule = "four-over-six" if format == "nvfp4" else "sweep"
    scale = f"scale{{rule={rule} role=activations}}"
    return {
        "round to nearest": [],
        "clip": ["clip{metric=mse}"],
        "scale search": [scale, "clip{metric=hessian}"],
        "GPTQ": ["gptq"],
        "AWQ": ["awq"],
        "SmoothQuant": ["smooth"],
        "block rotation": [f"rotate{{size={BLOCKS[format]}}}"],
        "full-width rotation": ["rotate{size=full}"],
        "GPTQ + scale search": [scale, "gptq{search=hessian}"],
        "rotation + GPTQ + scale search": [
            f"rotate{{size={BLOCKS[format]}}}",
            scale,
            "gptq{search=hessian}",
        ],
    }


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("text", type=Path, nargs="?")
    arguments.add_argument("--only", default="")
    arguments.add_argument("--windows", type=int, default=4)
    arguments.add_argument("--calibration", type=int, default=16)
    arguments.add_argument("--write", type=Path)
    arguments.add_argument("--reproduce", action="store_true", help="print claims beside what was measured")
    options = arguments.parse_args()
    torch.set_num_threads(1)
    models = [embedded(options.calibration)]
    models += [smollm2(options.text, options.calibration)] if options.text else []
    for model in models:
        rows = _rows(model, options.windows, options.only)
        if options.reproduce and rows:
            print("\n" + table(["claim", "claimed", "measured", "verdict"], claims(rows)))
        if options.write and rows:
            write_section(options.write, f"Weight passes: {model.name}", _text(model, rows, options))


def _rows(model: Measured, windows: int, only: str) -> list[list[str]]:
    heads = ["format", "method", "bits", "perplexity", "KL", "of RTN", "top-1", "CPU s"]
    print("| " + " | ".join(heads) + " |\n|---|---|" + "---:|" * 6)
    found: list[list[str]] = [heads]
    for format in FORMATS:
        nearest = None
        for method, passes in methods(format).items():
            if not re.search(only, f"{model.name} {format} {method}"):
                continue
            before = time.process_time()
            compiled = mxloom.compile(model.source, recipe(format, format, passes), calibration=model.calibration)
            seconds = time.process_time() - before
            figures = model.evaluate(compiled, windows)
            divergence = figures.against.kl_mean
            nearest = divergence if method == "round to nearest" else nearest
            row = [
                format,
                method,
                f"{compiled.cost().quantized_weight_bits:.3f}",
                f"{figures.perplexity:.3f}",
                f"{divergence:.4f}",
                "-" if nearest is None else f"{divergence / nearest - 1:+.0%}",
                f"{figures.against.top1_agreement:.3f}",
                f"{seconds:.0f}",
            ]
            found.append(row)
            print("| " + " | ".join(row) + " |", flush=True)
    return found[1:] and found


def claims(rows: list[list[str]]) -> list[list[str]]:
    """What is said of the methods, what was measured, and whether it holds; rows that were left out are not judged."""
    at = {(row[0], row[1]): float(row[4]) for row in rows[1:]}
    found: list[list[str]] = []
    for format in FORMATS:
        nearest = at.get((format, "round to nearest"))
        for method, limit, claimed in (
            ("GPTQ", 0.0, "lower KL than rounding"),
            ("GPTQ + scale search", -0.25, "25 % less KL than rounding"),
            ("block rotation", 0.0, "helps, or changes nothing"),
            ("full-width rotation", None, "helps integers, hurts MXFP4 and NVFP4"),
        ):
            own = at.get((format, method))
            if nearest is None or own is None:
                continue
            change = own / nearest - 1
            holds = change <= limit if limit is not None else (change < 0) == format.startswith("int")
            found.append([f"{format}: {method}", claimed, f"{change:+.0%}", "holds" if holds else "does not hold"])
    return found


def _text(model: Measured, rows: list[list[str]], options: argparse.Namespace) -> str:
    float_perplexity = model.evaluate(model.reference, options.windows).perplexity
    command = (
        f"python benchmarks/ptq_table.py {'wikitext2-valid.txt ' if model.characters else ''}--write docs/results.md"
    )
    return (
        f"Weights and input activations of every linear but `lm_head` in the format; {options.windows} windows of 512, "
        f"float perplexity {float_perplexity:.3f}; calibrated on {options.calibration} other windows. `of RTN` is the "
        f"KL beside that of rounding to nearest. The passes of each method stand in the script.\n\n    {command}\n\n"
        f"{table(rows[0], rows[1:])}"
    )


if __name__ == "__main__":
    main()
