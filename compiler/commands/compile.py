"""Compile a model: give number formats to its tensors and write the result as one folder.

mxloom compile ./Qwen3-0.6B --weights mxfp4 --activations mxint8 --out ./q06
mxloom compile ./Qwen3-0.6B --recipe recipe.yaml --out ./q06
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from ...dialects.errors import UsageError
from . import _json

if TYPE_CHECKING:
    from pathlib import Path

    from ..compiled import Compiled
    from ..recipe import Recipe

summary = "give number formats to a model's tensors and write it as one folder"


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="a Hugging Face folder (safetensors) or a GGUF file")
    parser.add_argument("--recipe", metavar="FILE", help="what to do, as YAML (see mxloom recipe)")
    parser.add_argument("--weights", metavar="FORMAT", help="format of every contraction's weight (see mxloom formats)")
    parser.add_argument("--activations", metavar="FORMAT", help="format of every contraction's other operands")
    parser.add_argument(
        "--mode",
        choices=("fast", "exact"),
        default="fast",
        help="how linear layers sum: fast as torch's f32 product, exact inside blocks and then in f32 as hardware does",
    )
    parser.add_argument("--out", metavar="DIR", required=True, help="the folder to write")
    _json.add_option(parser)


def run(args: argparse.Namespace) -> int:
    from .._target import check_target
    from ..driver import compile
    from ..progress import Progress

    recipe = _recipe(args)
    replaced = check_target(args.out).exists()
    with Progress().working(f"compiling {args.model}") as report:
        compiled = compile(args.model, recipe, mode=args.mode, report=report)
        report("cost", compiled.cost().summary().replace("\n", "; "))
    folder = compiled.save(args.out)
    _json.write(compiled.report() | {"folder": str(folder)}) if args.json else _print(compiled, folder, replaced)
    return 0


def _recipe(args: argparse.Namespace) -> Recipe:
    """The recipe in the file, or the one rule that --weights and --activations stand for."""
    from ...dialects.instances import format_of
    from ..recipe import Recipe

    formats = {name: getattr(args, name) for name in ("weights", "activations") if getattr(args, name)}
    if args.recipe and formats:
        raise UsageError(f"--recipe and --{next(iter(formats))} exclude each other: put the formats into the recipe")
    if args.recipe:
        return Recipe.from_file(args.recipe)
    if not formats:
        raise UsageError(
            "give --recipe FILE, or --weights FORMAT and --activations FORMAT; --weights f32 keeps everything wide"
        )
    for format in formats.values():
        format_of(format)
    return Recipe.from_dict({"quantize": [formats]})


def _print(compiled: Compiled, folder: Path, replaced: bool) -> None:
    print(compiled.coverage().summary())
    print(compiled.cost().summary())
    for note in compiled.notes():
        print(f"note: {note}")
    if compiled.evaluation is not None:
        print(compiled.evaluation)
    print(
        f"{'replaced' if replaced else 'wrote'} {folder} ({', '.join(sorted(file.name for file in folder.iterdir()))})"
    )
