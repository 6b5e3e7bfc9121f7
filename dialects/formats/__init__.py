"""Number formats as types. A family is one file of this package; it is found by its name, not listed."""

from importlib import import_module
from inspect import isabstract
from pkgutil import iter_modules

from ._encoded import Encoded as Encoded
from ._format import ROUNDINGS as ROUNDINGS
from ._format import SCALE_RULES as SCALE_RULES
from ._format import Format as Format
from ._format import Rounding as Rounding
from ._interface import bits as bits
from ._interface import default_scale_rule as default_scale_rule
from ._interface import encode_tensor as encode_tensor
from ._interface import is_wide as is_wide
from ._interface import quantize as quantize
from ._interface import refusal as refusal
from ._interface import storage_bits as storage_bits
from ._interface import takes_scale_rule as takes_scale_rule
from ._interface import verify_tensor as verify_tensor
from .block import BlockType as BlockType
from .fixed import FixedType as FixedType
from .minifloat import MinifloatType as MinifloatType
from .mixed import MixedType as MixedType
from .mixed import block_impact as block_impact
from .mixed import decode_block as decode_block
from .ternary import TernaryType as TernaryType


def _families() -> list[type[Format]]:
    """The format types that the modules of this package define, by module name."""
    found: list[type[Format]] = []
    for module in sorted(info.name for info in iter_modules(__path__) if not info.name.startswith("_")):
        for thing in vars(import_module(f".{module}", __name__)).values():
            defined_there = getattr(thing, "__module__", None) == f"{__name__}.{module}"
            if defined_there and isinstance(thing, type) and issubclass(thing, Format) and not isabstract(thing):
                found.append(thing)
    return found


FAMILIES = _families()
