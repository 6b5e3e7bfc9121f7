"""FGMP beside uniform formats: FP4 or FP8 block by block (run: fgmp_table.py [TEXT] [--write docs/results.md]).

Weights and input activations of every linear but `lm_head`: NVFP4, or E4M3 under one scale of the tensor (FP8). Windows
of 512, the first `--windows`; sensitivities and thresholds from 8 other windows. The embedded model; with TEXT
(WikiText-2's validation text) SmolLM2-135M-Instruct on its first 200 000 characters, calibrated on windows 40 to 47.
`--only PATTERN`: the rows in whose name it is found; `--reproduce` prints claims beside what was measured.
"""

from __future__ import annotations

import argparse
import re
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from page import table, write_section
from published import Measured, embedded, recipe, smollm2
from xdsl.dialects.builtin import TensorType

import mxloom
from mxloom.dialects.formats import MixedType, storage_bits
from mxloom.dialects.instances import format_of
from mxloom.dialects.operations.parameter import ParameterOp

FP8 = "fp8_e4m3_tensor"
CALIBRATION = 8


@dataclass(frozen=True)
class Row:
    """One measurement: the share of low blocks (None for a uniform format), the choice, and what came of it."""

    name: str
    perplexity: float
    divergence: float
    bits: float
    saving: float | None
    high_activations: float | None = None


def runs() -> dict[str, tuple[str, list[str]]]:
    """Format and passes of each row."""
    found: dict[str, tuple[str, list[str]]] = {"all FP8": (FP8, []), "all NVFP4": ("nvfp4", [])}
    for share in (0.5, 0.7, 0.9):
        for metric in ("fisher", "mse", "random"):
            found[f"{share:.0%} FP4, {metric}"] = ("fgmp", [f"mix{{share={share} metric={metric}}}"])
    found["70% FP4, kl"] = ("fgmp", ["mix{share=0.7 metric=kl}"])
    found["70% FP4, output"] = ("fgmp", ["mix{share=0.7 metric=output}"])
    found["70% FP4, fisher, a threshold for each tensor"] = ("fgmp", ["mix{share=0.7 threshold=tensor}"])
    found["70% FP4, fisher, without clipping"] = ("fgmp", ["mix{share=0.7 clip=false}"])
    found["70% FP4, fisher, then GPTQ"] = ("fgmp", ["mix{share=0.7}", "gptq"])
    return found


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("text", type=Path, nargs="?")
    arguments.add_argument("--only", default="")
    arguments.add_argument("--windows", type=int, default=8)
    arguments.add_argument("--write", type=Path)
    arguments.add_argument("--reproduce", action="store_true")
    options = arguments.parse_args()
    torch.set_num_threads(1)
    models = [embedded(CALIBRATION)] + ([smollm2(options.text, CALIBRATION)] if options.text else [])
    for model in models:
        wide = model.evaluate(model.reference, options.windows).perplexity
        print(f"\n{model.name}: float perplexity {wide:.3f}")
        rows = _measured(model, options.windows, options.only)
        if options.reproduce:
            print("\n" + table(["claim", "claimed", "measured", "verdict"], claims(rows)))
        if options.write and rows:
            write_section(options.write, f"FGMP: {model.name}", _text(model, wide, rows, options.windows))


HEADS = ["", "perplexity", "KL", "weight bits", "weight memory against FP8"]


def _measured(model: Measured, windows: int, only: str) -> dict[str, Row]:
    print("| " + " | ".join(HEADS) + " |\n|---|" + "---:|" * 4)
    rows: dict[str, Row] = {}
    for name, (format, passes) in runs().items():
        if not re.search(only, f"{model.name} {name}"):
            continue
        compiled = mxloom.compile(model.source, recipe(format, format, passes), calibration=model.calibration)
        figures = model.evaluate(compiled, windows)
        bits, saving = sizes(compiled)
        rows[name] = Row(name, figures.perplexity, figures.against.kl_mean, bits, saving)
        print("| " + " | ".join(_line(rows[name])) + " |", flush=True)
    return rows


def sizes(compiled: mxloom.Compiled) -> tuple[float, float]:
    """Bits of a quantized weight as it is packed, and what all of them take less than in FP8 under a scale each."""
    module, weights = compiled.packed()
    own = other = elements = 0
    for op in module.walk():
        if isinstance(op, ParameterOp) and isinstance(op.result.type, TensorType):
            kind, shape = op.result.type.element_type, op.result.type.get_shape()
            if isinstance(kind, MixedType) or weights.parts(op.source.data):
                own += weights.stored_bits(op.source.data)
                other += storage_bits(format_of(FP8, rank=len(shape)), shape)
                elements += prod(shape)
    return own / elements, 1 - own / other


def _line(row: Row) -> list[str]:
    saving = "-" if row.saving is None else f"{-row.saving:+.2%}"
    return [row.name, f"{row.perplexity:.3f}", f"{row.divergence:.4f}", f"{row.bits:.3f}", saving]


def claims(rows: dict[str, Row]) -> list[list[str]]:
    """What the paper says, what was measured, and whether it holds; rows that were left out are not judged."""
    found: list[list[str]] = []

    def judge(claim: str, claimed: str, needed: list[str], measured: str, holds: bool) -> None:
        if all(name in rows for name in needed):
            found.append([claim, claimed, measured, "holds" if holds else "does not hold"])

    at = {name: rows.get(f"70% FP4, {name}", rows.get("70% FP4, fisher")) for name in ("fisher", "mse", "random")}
    high = rows.get("all FP8")
    for share, claimed in ((0.7, 0.2984), (0.9, 0.3859)):
        row = rows.get(f"{share:.0%} FP4, fisher")
        if row is not None and row.saving is not None:
            name = f"weight memory at {share:.0%} FP4 blocks, less than FP8"
            judge(name, f"{claimed:.2%}", [row.name], f"{row.saving:.2%}", abs(row.saving - claimed) < 0.002)
    fisher, mse, random = (at[name] for name in ("fisher", "mse", "random"))
    if fisher and mse and random:
        judge(
            "KL at 70 % FP4: Fisher < plain error < random",
            "order",
            [fisher.name, mse.name, random.name],
            f"{fisher.divergence:.4f}, {mse.divergence:.4f}, {random.divergence:.4f}",
            fisher.divergence < mse.divergence < random.divergence,
        )
    tensor = rows.get("70% FP4, fisher, a threshold for each tensor")
    if fisher and tensor:
        measured = f"{fisher.divergence:.4f}, {tensor.divergence:.4f}"
        names = [fisher.name, tensor.name]
        judge("KL: one global threshold < one for each tensor", "order", names, measured,
              fisher.divergence < tensor.divergence)  # fmt: skip
    if fisher and high:
        worse = fisher.perplexity / high.perplexity - 1
        judge("perplexity at 70 % FP4 beside all FP8", "< +1 % (7B)", [fisher.name, high.name], f"{worse:+.2%}",
              worse < 0.01)  # fmt: skip
    return found


def _text(model: Measured, wide: float, rows: dict[str, Row], windows: int) -> str:
    command = (
        f"python benchmarks/fgmp_table.py {'wikitext2-valid.txt ' if model.characters else ''}--write docs/results.md"
    )
    parts = [
        f"Weights and input activations of every linear but `lm_head`; {windows} windows of 512, float perplexity "
        f"{wide:.3f}; calibrated on {CALIBRATION} other windows. FP8 is E4M3 under one scale of the tensor; FP4 is "
        "NVFP4. Weight memory is that of the packed streams.",
        f"    {command}",
        table(HEADS, [_line(row) for row in rows.values()]),
        table(["claim", "claimed", "measured", "verdict"], claims(rows)),
    ]
    return "\n\n".join(parts)


if __name__ == "__main__":
    main()
