"""mxloom: a quantization compiler in which a number format is the element type of a tensor.

The public names load on first use, so that `import mxloom` stays light.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .backends.kernels.fake_quantization import fake_quantize as fake_quantize
    from .compiler.artefact import load as load
    from .compiler.compiled import Compiled as Compiled
    from .compiler.driver import compile as compile
    from .compiler.evaluated import remembered as remembered
    from .compiler.evaluation import evaluate as evaluate
    from .dialects.errors import MxloomError as MxloomError
    from .dialects.numbers import Encoded as Encoded
    from .dialects.numbers import encode as encode
    from .dialects.numbers import formats as formats
    from .passes._sites import sites as sites

__version__ = "0.1.0"

_HOMES = {
    "Compiled": ".compiler.compiled",
    "Encoded": ".dialects.numbers",
    "MxloomError": ".dialects.errors",
    "compile": ".compiler.driver",
    "encode": ".dialects.numbers",
    "evaluate": ".compiler.evaluation",
    "fake_quantize": ".backends.kernels.fake_quantization",
    "formats": ".dialects.numbers",
    "load": ".compiler.artefact",
    "remembered": ".compiler.evaluated",
    "sites": ".passes._sites",
}

__all__ = [*_HOMES]  # noqa: PLE0604 # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'mxloom' has no attribute {name!r}")
    globals()[name] = getattr(import_module(_HOMES[name], __name__), name)  # asked for once
    return globals()[name]


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
