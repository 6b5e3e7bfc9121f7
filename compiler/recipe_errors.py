"""What is wrong with a recipe, said with file and line, the rule, what came, and the nearest valid word."""

import re
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from ..dialects.errors import did_you_mean
from ..dialects.instances import INSTANCES
from .recipe_text import Where
from .universe import own_passes

NOT_YET = ("search", "cost")
"""Keys of the recipe's design that this version does not have: named in the error, never ignored."""

ERRORS_SHOWN = 5


def explained(error: ValidationError, model: type[BaseModel], name: str, lines: dict[Where, int]) -> str:
    """One line for each fault, in the order of the file; `name` is the file, `lines` says where its keys stand."""
    details = error.errors(include_url=False)
    placed = sorted({(_line(detail["loc"], lines), _problem(detail, model)) for detail in details})
    messages = [f"{name}:{line}: {problem}" if line else f"{name}: {problem}" for line, problem in placed]
    rest = len(messages) - ERRORS_SHOWN
    return "\n".join(messages[:ERRORS_SHOWN] + ([f"and {rest} more"] if rest > 0 else []))


def mistaken(text: str) -> str | None:
    """What a text that names no recipe's file was meant as, and how that is given: a pipeline, a recipe, a format."""
    if "\n" in text or re.match(r"\s*(\{|version\s*:|quantize\s*:|passes\s*:)", text):
        return "this is a recipe's text, not its file: write it into a file, or give a dictionary in Python"
    if "{" in text or re.split(r"[,{\s]", text.strip(), maxsplit=1)[0] in own_passes():
        return (
            "this is a pipeline of passes, not a recipe's file: a recipe runs it as `passes: [PIPELINE]`; in Python, "
            '{"passes": [pipeline]}'
        )
    if text in INSTANCES:
        return (
            f'this is a format, not a recipe\'s file: give weights="{text}" and activations (--weights, --activations)'
        )
    return None


def _line(where: Where, lines: dict[Where, int]) -> int:
    """The line of the innermost key on the way that stands in the file; 0 where the recipe has no file."""
    return next((lines[where[:size]] for size in range(len(where), -1, -1) if where[:size] in lines), 0)


def _problem(detail: ErrorDetails, model: type[BaseModel]) -> str:
    where, came = detail["loc"], detail["input"]
    *outer, key = where or ("recipe",)
    within = f" in {spoken(outer)}" if outer else ""
    match detail["type"]:
        case "extra_forbidden" if key in NOT_YET and not outer:
            return f'"{key}" is not available in this version'
        case "extra_forbidden":
            known = _keys(model, outer)
            return f'unknown key "{key}"{within}{did_you_mean(str(key), known)}; known: {", ".join(known)}'
        case "missing":
            return f'"{key}" is missing{within}'
        case "literal_error":
            known = re.findall(r"'([^']*)'", detail["msg"]) or [detail["msg"].removeprefix("Input should be ")]
            return f"{spoken(where)}: got {came!r:.60}{did_you_mean(str(came), known)}; known: {', '.join(known)}"
        case "value_error":
            return f"{spoken(where)}: {detail.get('ctx', {}).get('error', detail['msg'])}"
        case _:
            return f"{spoken(where)}: {detail['msg'].replace('Input should', 'it should')}, got {came!r:.60}"


def _keys(model: type[BaseModel], where: Any) -> list[str]:
    """The keys that the model has at a place: of the model itself or of one that stands in it."""
    schema = model.model_json_schema()
    node = schema
    for part in where:
        node = node["items"] if isinstance(part, int) else node["properties"][part]
        node = next((branch for branch in node.get("anyOf", [node]) if branch.get("type") != "null"), node)
        if "$ref" in node:
            node = schema["$defs"][node["$ref"].rsplit("/", 1)[-1]]
    return list(node["properties"])


def spoken(where: Any) -> str:
    """`quantize rule 2, kind`; positions in lists are counted from 1."""
    words: list[str] = []
    for part in where:
        if not isinstance(part, int):
            words.append(str(part))
        elif words == ["quantize"]:
            words[-1] = f"quantize rule {part + 1}"
        else:
            words[-1] += f" {part + 1}"
    return ", ".join(words) or "the recipe"
