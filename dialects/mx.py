"""The dialect `mx`: a number format is the element type of a tensor."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from pkgutil import iter_modules

from xdsl.context import Context
from xdsl.dialects.builtin import Builtin, ModuleOp
from xdsl.dialects.func import Func
from xdsl.ir import Dialect, TypeAttribute
from xdsl.ir import Operation as XdslOperation

from . import formats, operations
from .accumulator import AccumulatorAttr
from .integer_attribute import IntegerMeaningAttr
from .operations._operation import Operation
from .parsing import ModuleParser
from .windows import WindowAttr


def _operations() -> list[type[XdslOperation]]:
    """Every operation that a file of `operations/` defines, in the order of their names."""
    found: dict[str, type[XdslOperation]] = {}
    for module in iter_modules(operations.__path__):
        if module.name.startswith("_"):
            continue
        for thing in vars(import_module(f"{operations.__name__}.{module.name}")).values():
            if isinstance(thing, type) and issubclass(thing, Operation) and "name" in vars(thing):
                found[thing.name] = thing
    return [found[name] for name in sorted(found)]


OPERATIONS = _operations()
MX = Dialect("mx", OPERATIONS, [*formats.FAMILIES, AccumulatorAttr, IntegerMeaningAttr, WindowAttr])


def context() -> Context:
    """A context that knows the dialects of an mx module: builtin, func, mx."""
    fresh = Context()
    for dialect in (Builtin, Func, MX):
        fresh.load_dialect(dialect)
    return fresh


def parse_module(text: str, name: str = "<string>") -> ModuleOp:
    """The module that `text` spells, verified; xDSL's ParseError or VerifyException names the place of a fault."""
    module = ModuleParser(context(), text, name).parse_module()
    module.verify()
    return module


@cache
def parse_type(text: str) -> TypeAttribute:
    """The type that `text` spells."""
    return ModuleParser(context(), text).parse_type()
