"""What this installation offers to xDSL's tools: our dialect, every pass and every target, found by name.

A pass is a file in `passes/` or a class behind the entry point group `mxloom.passes`: these are what a recipe may name.
`mxloom-opt` has the passes of xDSL universes too, except those that can start a program.
"""

import ast
from collections.abc import Callable, Iterable
from functools import cache
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from inspect import getmembers, isclass
from pathlib import Path
from pkgutil import iter_modules
from typing import TypeVar

from xdsl.ir import Dialect
from xdsl.passes import ModulePass
from xdsl.universe import Universe
from xdsl.utils.target import Target

from .. import backends, passes
from ..dialects.errors import MxloomError, UsageError

PASS_GROUP = "mxloom.passes"
UNIVERSE_GROUP = "xdsl.universe"

PassFactory = Callable[[], type[ModulePass]]
TargetFactory = Callable[[], type[Target]]
Named = TypeVar("Named", ModulePass, Target)


STARTS_PROGRAMS = frozenset({"mlir-opt", "transform-interpreter"})
"""Passes of xDSL that nobody reaches through mxloom.

The first runs the program that its option `executable` names, the second any pass that the module's text names, the
first among them. A module or a pipeline of another must not be able to run programs.
"""


@cache
def own_passes() -> dict[str, PassFactory]:
    """What recipes, `mxloom.compile` and artefacts may name: mxloom's passes, and what others announce to mxloom.

    A factory imports its pass when called. The same name from two packages is a UsageError.
    """
    found = dict(_file_passes())
    for name, factory in _announced(entry_points(group=PASS_GROUP)).items():
        found.setdefault(name, factory)
    return dict(sorted(found.items()))


@cache
def all_passes() -> dict[str, PassFactory]:
    """What `mxloom-opt` may name: `own_passes`, and the passes of xDSL universes but those in `STARTS_PROGRAMS`."""
    found = {**Universe.get_multiverse().all_passes, **own_passes()}
    return {name: factory for name, factory in sorted(found.items()) if name not in STARTS_PROGRAMS}


def all_dialects() -> dict[str, Callable[[], Dialect]]:
    """Every dialect by its name: ours, other packages', xDSL's own."""
    return {**Universe.get_multiverse().all_dialects, **MXLOOM_UNIVERSE.all_dialects}


def all_targets() -> dict[str, TargetFactory]:
    """Every target by its name: ours, other packages', xDSL's own."""
    return {**Universe.get_multiverse().all_targets, **MXLOOM_UNIVERSE.all_targets}


def _dialect() -> Dialect:
    from ..dialects.mx import MX

    return MX


def _file_passes() -> dict[str, PassFactory]:
    """One pass per file of `passes/`, named as its file with `-` for `_`."""
    files = [found.name for found in iter_modules(passes.__path__) if not found.name.startswith("_")]
    return {_spoken(file): _factory(f"{passes.__name__}.{file}", _spoken(file), ModulePass) for file in files}


def _file_targets() -> dict[str, TargetFactory]:
    """One target per module of `backends/` that declares a class deriving from `Target`, named as its file."""
    files = [found.name for found in iter_modules(backends.__path__) if not found.name.startswith("_")]
    return {
        _spoken(file): _factory(f"{backends.__name__}.{file}", _spoken(file), Target)
        for file in files
        if _declares_target(file)
    }


def _declares_target(backend: str) -> bool:
    """Read from the text: importing every backend would load torch whenever a tool only lists its targets."""
    folder = Path(backends.__path__[0])
    file = folder / f"{backend}.py"
    source = (file if file.exists() else folder / backend / "__init__.py").read_text("utf-8")
    classes = (node for node in ast.parse(source).body if isinstance(node, ast.ClassDef))
    return any(isinstance(base, ast.Name) and base.id == "Target" for node in classes for base in node.bases)


def _spoken(file: str) -> str:
    return file.replace("_", "-")


def _factory(module: str, name: str, base: type[Named]) -> Callable[[], type[Named]]:
    def load() -> type[Named]:
        for _, kind in getmembers(import_module(module), isclass):
            if issubclass(kind, base) and getattr(kind, "name", None) == name:
                return kind
        raise MxloomError(f'{module} holds no {base.__name__} named "{name}" as its file is')

    return load


def _announced(points: Iterable[EntryPoint]) -> dict[str, PassFactory]:
    """The passes behind entry points, by name."""
    found: dict[str, EntryPoint] = {}
    for point in points:
        other = found.setdefault(point.name, point)
        if other.value != point.value:
            raise UsageError(f'two packages offer a pass "{point.name}": {other.value} and {point.value}')
    return {name: _announced_factory(point) for name, point in found.items()}


def _announced_factory(point: EntryPoint) -> PassFactory:
    def load() -> type[ModulePass]:
        try:
            kind = point.load()
        except (ImportError, AttributeError) as error:
            raise MxloomError(f'the pass "{point.name}" ({point.value}) cannot be imported: {error}') from error
        if not (isclass(kind) and issubclass(kind, ModulePass) and kind.name == point.name):
            raise MxloomError(f'the pass "{point.name}" ({point.value}) is no ModulePass of that name')
        return kind

    return load


def _without_universe() -> list[EntryPoint]:
    """The announced passes of packages that have no xDSL universe; the others show theirs to xDSL themselves."""
    owners = {point.dist.name for point in entry_points(group=UNIVERSE_GROUP) if point.dist}
    return [point for point in entry_points(group=PASS_GROUP) if not (point.dist and point.dist.name in owners)]


MXLOOM_UNIVERSE = Universe(
    all_dialects={"mx": _dialect},
    all_passes={**_announced(_without_universe()), **_file_passes()},
    all_targets=_file_targets(),
)
