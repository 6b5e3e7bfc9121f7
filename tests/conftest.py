"""One thread for torch, and FileCheck files: the RUN lines of every `.mlir` file under tests/ir run in-process."""

from __future__ import annotations

import io
import re
import shlex
import sys
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from types import SimpleNamespace

import pytest
from filecheck.finput import FInput
from filecheck.matcher import Matcher
from filecheck.options import parse_argv_options
from filecheck.parser import Parser, pattern_for_opts


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    """Sums of one order, so that equality to the bit does not hang on the machine's cores."""
    import torch

    torch.set_num_threads(1)


def pytest_collect_file(parent: pytest.Collector, file_path: Path) -> pytest.File | None:
    return FileCheckFile.from_parent(parent, path=file_path) if file_path.suffix == ".mlir" else None


class FileCheckFile(pytest.File):
    """A file of IR whose first lines say how to run and check it."""

    def collect(self) -> Iterator[pytest.Item]:
        for number, line in enumerate(re.findall(r"// RUN: (.*)", self.path.read_text())):
            yield FileCheckRun.from_parent(self, name=f"run{number}", line=line)


class FileCheckRun(pytest.Item):
    """One RUN line: commands joined by pipes, `%s` the file; mxloom-opt prints its errors where its output goes."""

    def __init__(self, *, line: str, **rest: object) -> None:
        super().__init__(**rest)  # pyright: ignore[reportArgumentType]
        self.line = line

    def runtest(self) -> None:
        commands = {"mxloom-opt": _optimize, "filecheck": _check}
        text = ""
        for command in self.line.split("|"):
            program, *arguments = shlex.split(command.replace("%s", str(self.path)))
            text = commands[program](arguments, text)

    def reportinfo(self) -> tuple[Path, int, str]:
        return self.path, 0, f"{self.path.name}: {self.line}"


def _optimize(arguments: list[str], text: str) -> str:
    from mxloom.compiler.optimizer import main

    output = io.StringIO()
    before, sys.stdin = sys.stdin, SimpleNamespace(buffer=io.BytesIO(text.encode()))  # pyright: ignore[reportAttributeAccessIssue]
    try:
        with redirect_stdout(output), redirect_stderr(output):
            main(arguments)
    finally:
        sys.stdin = before
    return output.getvalue()


def _check(arguments: list[str], text: str) -> str:
    options = parse_argv_options(["filecheck", *arguments])
    with Path(options.match_filename).open() as patterns:
        matcher = Matcher(options, FInput("-", text), Parser(options, patterns, *pattern_for_opts(options)))
        assert matcher.run() == 0, text
    return ""
