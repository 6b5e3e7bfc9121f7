"""Kernels touch no memory but that of their tensors: random cases in a process of its own, beside forbidden pages."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from mxloom.backends.kernels import native

PROGRAM = Path(__file__).with_name("fuzz_kernels.py")

pytestmark = [
    pytest.mark.skipif(
        native.why_not() is not None, reason=f"{native.why_not()}; run on x86-64 or 64-bit Arm with llvmlite"
    ),
    pytest.mark.skipif(sys.platform == "win32", reason="pages are forbidden by mprotect: run on Linux or macOS"),
]


def fuzz(seed: int, cases: int) -> None:
    path = next(entry for entry in sys.path if entry.endswith(".links"))
    command = [sys.executable, str(PROGRAM), str(seed), str(cases)]
    environment = {**os.environ, "PYTHONPATH": path}
    found = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr[-3000:]


def test_some_random_tensors() -> None:
    fuzz(1, 150)


@pytest.mark.nightly
@pytest.mark.parametrize("seed", range(2, 12))
def test_many_random_tensors(seed: int) -> None:
    fuzz(seed, 3000)
