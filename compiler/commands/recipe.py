"""Check a recipe without a model, or print the JSON schema of recipes.

mxloom recipe r.yaml       the pipeline of passes that the recipe stands for, or what is wrong, with its line
mxloom recipe --schema     for editors that complete and check YAML
"""

import argparse

from ...dialects.errors import UsageError

summary = "check a recipe, or print the JSON schema of recipes"


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", nargs="?", metavar="FILE", help="a recipe (YAML)")
    parser.add_argument("--schema", action="store_true", help="print the JSON schema")


def run(args: argparse.Namespace) -> int:
    from ..recipe import Recipe
    from . import _json

    if args.schema == bool(args.file):
        raise UsageError("give either a recipe to check or --schema")
    if args.schema:
        _json.write(Recipe.model_json_schema())
    else:
        print(Recipe.from_file(args.file).pipeline())
    return 0
