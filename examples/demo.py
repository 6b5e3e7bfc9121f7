"""`make demo`: compiles the embedded language model to seven formats and prints what each costs and keeps."""

from __future__ import annotations

import sys
from pathlib import Path

from format_table import EXPLAINED, Recipe, aligned, measured, uniform

HERE = Path(__file__).parent
MODEL = HERE / "models" / "kjv-2m"
OUT = HERE.parent / "out" / "demo"

FORMATS = ("mxint8", "mxfp8_e4m3", "mxfp6_e2m3", "nvfp4", "mxfp4", "mxint4")
MIXED = HERE / "recipes" / "demo_mixed.yaml"

WINDOWS = 64
"""Of 512 tokens: enough to tell the formats apart, and the whole demonstration stays under three minutes."""


def main() -> int:
    """Print the table, leave the artefacts with their reports in out/demo; returns the exit status."""
    recipes: dict[str, Recipe] = {**{name: uniform(name) for name in FORMATS}, "mixed": MIXED}
    rows = measured(MODEL, MODEL / "held_out.txt", recipes, OUT, limit=WINDOWS)
    print(f"\n{aligned(rows)}\n\n{EXPLAINED}\nartefacts and reports: {OUT}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
