"""Measure a language model on a text: perplexity with its protocol, and how far it is from another model.

mxloom eval ./q06 --text wiki.txt --against ./Qwen3-0.6B
"""

import argparse
from pathlib import Path

from . import _json

summary = "measure perplexity on a text, and the distance to another model"


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="a folder that mxloom compile wrote, or a model as it came")
    parser.add_argument("--text", metavar="FILE", required=True, help="the text, in UTF-8")
    parser.add_argument("--against", metavar="MODEL", help="the reference, of either kind: most often the float model")
    parser.add_argument("--context", metavar="N", type=int, default=512, help="tokens of one window (default 512)")
    parser.add_argument("--limit", metavar="N", type=int, help="number of windows (default: all)")
    _json.add_option(parser)


def run(args: argparse.Namespace) -> int:
    from ..evaluation import evaluate
    from ..progress import Progress

    with Progress().working(f"evaluating {args.model}"):
        evaluation = evaluate(
            Path(args.model), Path(args.text), context=args.context, against=args.against, limit=args.limit
        )
    _json.write(evaluation.to_json()) if args.json else print(evaluation)
    return 0
