"""The kernel of a format as text, for people who want to read it or take it elsewhere."""

from __future__ import annotations

from ....dialects.errors import UsageError, did_you_mean
from ....dialects.formats import Rounding
from ....dialects.instances import format_of
from .. import native
from .._layout import Layout, layout_of
from .._prepared import kernel_kind, kernel_module
from ..block_function import block_function
from .parts import parts, refuse
from .torch_source import torch_source
from .triton_source import triton_source


def kernel_text(language: str, format: str) -> str:
    """What rounds a matrix [4096, 4096] into a format, to nearest even under the format's own scale rule.

    language: mlir (the functions of one block in arith, math and vector, which the others are made from), llvm (the
    native kernel), triton (a module of kernels for GPUs) or torch (the functions of blocks in eager operations). Raises
    UsageError for an unknown language or format, and MxloomError for a format that has no kernel in the language.
    """
    if language not in LANGUAGES:
        raise UsageError(
            f'kernels are written in {", ".join(LANGUAGES)}, not "{language}"{did_you_mean(language, LANGUAGES)}'
        )
    layout = layout_of(format_of(format, rank=2), Rounding(), (4096, 4096))
    if isinstance(layout, str):
        raise UsageError(f"nothing to write for {format}: {layout}")
    return LANGUAGES[language](layout)


def _mlir(layout: Layout) -> str:
    if layout.kind == "means":
        return str(block_function(layout.function)) + "\n"
    return "".join(str(function) + "\n" for function, _ in parts(layout.function).values())


def _llvm(layout: Layout) -> str:
    return native.llvm_text(kernel_module(kernel_kind(layout), layout.function))


def _torch(layout: Layout) -> str:
    refuse(layout, "torch")
    sources = [torch_source(*part).removeprefix("import torch\n") for part in parts(layout.function).values()]
    return "import torch\n" + "".join(sources)


LANGUAGES = {"mlir": _mlir, "llvm": _llvm, "triton": triton_source, "torch": _torch}
