"""What both demonstrations share: compile one model to several formats, measure each, lay the figures in one table."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import mxloom
from mxloom.dialects.operations.cast import CastOp

Recipe = Mapping[str, Any] | Path

HEADER = ("format", "scale rule", "bits", "bytes", "perplexity", "difference", "KL", "top-1", "coverage")

EXPLAINED = """\
bits        average of a weight that is quantized, its share of scales included
bytes       of all weights in the artefact
difference  of the perplexity to float, +- its paired standard error
KL, top-1   next-token distributions against float: mean divergence in nats, share of equal best tokens
coverage    share of multiply-accumulates of which every operand is quantized"""


def uniform(format: str) -> Recipe:
    """Weights and activations of every linear except the head in one format, by the format's own scale rule."""
    return {
        "quantize": [
            {"match": "*lm_head", "keep": "f32"},
            {"kind": "linear", "weights": format, "activations": format},
        ]
    }


@dataclass(frozen=True)
class Row:
    """One line of the table: a format, what it costs and what it keeps."""

    format: str
    scale_rule: str
    bits: float
    bytes: int
    perplexity: float
    difference: float | None = None
    standard_error: float | None = None
    verdict: str = ""
    divergence: float | None = None
    agreement: float | None = None
    coverage: float = 0.0

    @property
    def cells(self) -> tuple[str, ...]:
        return (
            self.format,
            self.scale_rule,
            f"{self.bits:.3f}",
            f"{self.bytes:,}",
            f"{self.perplexity:.3f}",
            _difference(self),
            "-" if self.divergence is None else f"{self.divergence:.4f}",
            "-" if self.agreement is None else f"{self.agreement:.1%}",
            f"{self.coverage:.1%}",
        )


def _difference(row: Row) -> str:
    if row.difference is None:
        return "-"
    if row.verdict == "no difference":
        return row.verdict
    error = "" if row.standard_error is None else f" +- {row.standard_error:.3f}"
    return f"{row.difference:+.3f}{error}"


def aligned(rows: Sequence[Row]) -> str:
    """The table for a terminal."""
    cells = [HEADER, *(row.cells for row in rows)]
    widths = [max(len(line[column]) for line in cells) for column in range(len(HEADER))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if column < 2 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in cells
    )


def markdown(rows: Sequence[Row]) -> str:
    """The table for a page."""
    lines = ["| " + " | ".join(HEADER) + " |", "|---|---|" + "---:|" * (len(HEADER) - 2)]
    return "\n".join([*lines, *("| " + " | ".join(row.cells) + " |" for row in rows)]) + "\n"


def measured(
    model: str | Path,
    text: Path,
    recipes: Mapping[str, Recipe],
    folder: Path,
    *,
    divergence_windows: int | None = None,
    **protocol: Any,
) -> list[Row]:
    """Compile the model by each recipe, save and measure it; one row each, that of the float model first.

    `protocol` are the arguments of `mxloom.evaluate`; KL and top-1 come from the first `divergence_windows` of the
    windows where that is given. The artefacts and report.json (the rows) are left in `folder`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    floating = mxloom.compile(model)
    told = mxloom.remembered(floating)
    reference = mxloom.evaluate(told, text, **protocol)
    print(f"{floating.source.name}: {reference}", flush=True)
    cost = floating.cost()
    rows = [Row("float", "-", cost.weight_bits, cost.bytes, reference.perplexity)]
    for name, recipe in recipes.items():
        start = time.monotonic()
        compiled = mxloom.compile(floating.source, recipe)
        compiled.save(folder / name)
        candidate = mxloom.remembered(compiled)
        whole = part = mxloom.evaluate(candidate, text, against=told, **protocol)
        if divergence_windows is not None:
            part = mxloom.evaluate(candidate, text, against=told, **{**protocol, "limit": divergence_windows})
        rows.append(_row(name, compiled, whole, part))
        print(f"  {name:12} {time.monotonic() - start:5.1f} s  {folder / name}", flush=True)
    (folder / "report.json").write_text(json.dumps([asdict(row) for row in rows], indent=2) + "\n", "utf-8")
    return rows


def _row(name: str, compiled: mxloom.Compiled, whole: Any, part: Any) -> Row:
    """The line of one format; `whole` and `part` are the evaluations that perplexity and divergence come from."""
    cost, against = compiled.cost(), whole.against
    error = against.standard_error
    return Row(
        format=name,
        scale_rule=_scale_rules(compiled),
        bits=cost.quantized_weight_bits,
        bytes=cost.bytes,
        perplexity=whole.perplexity,
        difference=whole.perplexity - against.perplexity,
        # exp(mean) has the error of the mean times itself
        standard_error=None if error is None else whole.perplexity * error,
        verdict=against.verdict,
        divergence=part.against.kl_mean,
        agreement=part.against.top1_agreement,
        coverage=compiled.coverage().quantized_macs,
    )


def _scale_rules(compiled: mxloom.Compiled) -> str:
    """The scale rules of the casts, as the module states them."""
    rules = (op.how().scale_rule for op in compiled.module.walk() if isinstance(op, CastOp))
    return ", ".join(dict.fromkeys(rule for rule in rules if rule)) or "-"
