"""Results for programs: one JSON document on stdout."""

import argparse
import json
import math
from typing import Any


def add_option(parser: argparse.ArgumentParser) -> None:
    """The option `--json`."""
    parser.add_argument("--json", action="store_true", help="print one JSON document on stdout")


def write(values: Any) -> None:
    """Print `values`; a number that is not finite, which JSON lacks, is null."""
    print(json.dumps(_finite(values), indent=2, ensure_ascii=False))


def _finite(values: Any) -> Any:
    if isinstance(values, dict):
        return {str(key): _finite(value) for key, value in values.items()}
    if isinstance(values, list | tuple):
        return [_finite(value) for value in values]
    return None if isinstance(values, float) and not math.isfinite(values) else values
