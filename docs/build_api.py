"""Writes docs/api/: one Markdown page for each public module, made of signatures and docstrings. Needs no network."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from pkgutil import walk_packages
from types import ModuleType
from typing import Any

import mxloom

ROOMS = ("dialects", "backends", "passes", "compiler")


def main(folder: Path) -> int:
    """Write an index of the public names and a page for each module that has any; returns the exit status."""
    folder.mkdir(parents=True, exist_ok=True)
    modules = list(public_modules())
    for module in modules:
        (folder / f"{module.__name__.removeprefix('mxloom.')}.md").write_text(page(module), "utf-8")
    (folder / "index.md").write_text(index(modules), "utf-8")
    print(f"wrote {len(modules) + 1} pages to {folder}")
    return 0


def public_modules() -> Iterator[ModuleType]:
    """Every module of the package none of whose names begins with `_`."""
    for room in ROOMS:
        package = import_module(f"mxloom.{room}")
        names = [found.name for found in walk_packages(package.__path__, f"{package.__name__}.")]
        for name in (package.__name__, *sorted(names)):
            if not any(part.startswith("_") for part in name.split(".")):
                yield import_module(name)


def index(modules: list[ModuleType]) -> str:
    """The names that `import mxloom` offers, and the modules with the first line of their docstrings."""
    names = [f"* `mxloom.{name}`: {first_line(getattr(mxloom, name))}" for name in mxloom.__all__]
    pages = [f"* [{m.__name__}]({m.__name__.removeprefix('mxloom.')}.md): {first_line(m)}" for m in modules]
    return "\n".join(["# mxloom", "", *names, "", "## Modules", "", *pages, ""])


def page(module: ModuleType) -> str:
    """The public classes (with their methods) and functions that a module defines, in the order of its text."""
    parts = [f"# {module.__name__}", inspect.getdoc(module) or ""]
    for name, thing in vars(module).items():
        defined_here = getattr(thing, "__module__", None) == module.__name__
        if defined_here and not name.startswith("_") and (inspect.isclass(thing) or inspect.isfunction(thing)):
            parts += entry(name, thing, "##")
    return "\n\n".join(part for part in parts if part) + "\n"


def entry(name: str, thing: Any, heading: str) -> Iterator[str]:
    """A heading with the signature, the docstring, and for a class the same of what it adds to its bases."""
    yield f"{heading} `{name}{signature(thing)}`"
    yield own_docstring(thing)
    if inspect.isclass(thing):
        for member, value in vars(thing).items():
            value = value.fget if isinstance(value, property) else getattr(value, "__func__", value)
            if inspect.isfunction(value) and not member.startswith("_") and own_docstring(value):
                yield from entry(f"{name}.{member}", value, "###")


def own_docstring(thing: Any) -> str:
    """The docstring, cleaned; nothing where it is inherited or made by dataclasses."""
    text = vars(thing).get("__doc__") if inspect.isclass(thing) else thing.__doc__
    return inspect.cleandoc(text) if text and not text.startswith(f"{thing.__name__}(") else ""


def signature(thing: Any) -> str:
    """The parameters as written; nothing where Python cannot tell."""
    try:
        return str(inspect.signature(thing)).replace("'", "")
    except (TypeError, ValueError):
        return ""


def first_line(thing: Any) -> str:
    """The first line of a docstring."""
    return (inspect.getdoc(thing) or "").split("\n", 1)[0]


if __name__ == "__main__":
    sys.exit(main(Path(__file__).parent / "api"))
