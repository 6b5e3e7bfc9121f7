"""Show what a model is made of before compiling it: modules, shapes, ties, decision groups, what stays wide and why.

Layers that repeat are shown once; --json lists every site.

  mxloom inspect ./Qwen3-0.6B
"""

import argparse

from . import _json

summary = "show a model's layers, shapes, ties, decision groups and what stays wide"


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="a Hugging Face folder (safetensors), a GGUF file, an artefact")
    parser.add_argument("--batch", metavar="N", type=int, default=1, help="batch of the MACs (default 1)")
    parser.add_argument(
        "--sequence", metavar="N", type=int, help="tokens of the MACs (default 512, or the model's most)"
    )
    _json.add_option(parser)


def run(args: argparse.Namespace) -> int:
    from ..inspection import inspect
    from ..progress import Progress
    from ._models import opened

    with Progress().working(f"reading {args.model}"):
        inspection = inspect(opened(args.model), batch=args.batch, sequence=args.sequence)
    _json.write(inspection.to_json()) if args.json else print(inspection)
    return 0
