"""A page of measurements: each script writes its own part and leaves the others alone."""

from __future__ import annotations

import platform
import re
from importlib.metadata import version
from pathlib import Path


def write_head(file: Path, text: str) -> None:
    """Put `text` at the top of a Markdown page, in place of what stands above its first `## ` heading."""
    parts = _parts(file)
    _write(file, [text, *(part for part in parts if part.startswith("## "))])


def write_section(file: Path, heading: str, text: str) -> None:
    """Put `text` under `## heading` of a Markdown page, in place of what stands there; a new section comes last."""
    own, parts = f"## {heading}\n\n{text}", _parts(file)
    headings = [part.partition("\n")[0] for part in parts]
    if f"## {heading}" in headings:
        parts[headings.index(f"## {heading}")] = own
    else:
        parts.append(own)
    _write(file, parts)


def _parts(file: Path) -> list[str]:
    """What stands above the first section of a page, and its sections."""
    return re.split(r"^(?=## )", file.read_text(encoding="utf-8"), flags=re.MULTILINE) if file.exists() else []


def _write(file: Path, parts: list[str]) -> None:
    file.write_text("\n\n".join(part.strip() for part in parts if part.strip()) + "\n", encoding="utf-8")


def table(heads: list[str], rows: list[list[str]]) -> str:
    """A Markdown table, its first column to the left, the others to the right."""
    rule = "|---|" + "---:|" * (len(heads) - 1)
    lines = [f"| {' | '.join(line)} |" for line in (heads, *rows)]
    return "\n".join([lines[0], rule, *lines[1:]])


def machine() -> str:
    """What the figures were measured on, in one sentence."""
    from mxloom.backends.kernels.native import features

    sets = [name for name in ("avx2", "avx512f", "avx512vnni", "avxvnni", "neon", "sve") if name in features()]
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "xdsl", "llvmlite"))
    vectors = ", ".join(sets) or "no wide vectors"
    return f"Measured on {_processor()} ({vectors}), {versions}, Python {platform.python_version()}."


def _processor() -> str:
    file = Path("/proc/cpuinfo")
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    import llvmlite.binding as llvm

    named = next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor()
    )
    return f"{named}, {llvm.get_host_cpu_name()}"
