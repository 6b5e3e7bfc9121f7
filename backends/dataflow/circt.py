"""What CIRCT does for us, each time in a process of its own: SystemVerilog, and models that run in this process."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

from ...dialects.errors import MxloomError

SECONDS = 600
"""How long one run of CIRCT may take."""


@dataclass(frozen=True)
class ArcModel:
    """A design as LLVM IR: its ports as (offset in bytes, width in bits) in a storage of `bytes` bytes."""

    top: str
    ports: dict[str, tuple[int, int]]
    bytes: int
    llvm: str


def export_verilog(text: str) -> str:
    """hw, comb and seq operations as SystemVerilog. Raises MxloomError where CIRCT refuses them or ends."""
    return _run("verilog", text)


def arc_model(text: str) -> ArcModel:
    """hw, comb and seq operations as a model of their top module. Raises MxloomError where CIRCT refuses or ends."""
    found = json.loads(_run("arc", text))
    ports = {name: (offset, width) for name, (offset, width) in found["ports"].items()}
    return ArcModel(found["top"], ports, found["bytes"], found["llvm"])


def _run(kind: str, text: str) -> str:
    if find_spec("pycde") is None:
        raise MxloomError(
            'hardware is printed and simulated by CIRCT, which is not installed: pip install "mxloom[hardware]"'
        )
    with TemporaryDirectory(prefix="mxloom-") as folder:
        source, target = Path(folder, "design.mlir"), Path(folder, "found")
        source.write_text(text)
        command = [sys.executable, "-m", f"{__package__}._circt_worker", kind, str(source), str(target)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
        except subprocess.TimeoutExpired:
            raise MxloomError(f"CIRCT took more than {SECONDS:g} s for {len(text)} characters of hw; stopped") from None
        if done.returncode != 0 or not target.exists():
            raise MxloomError(_explained(done.returncode, done.stderr))
        return target.read_text()


def _explained(status: int, output: str) -> str:
    """What went wrong, and in which step."""
    lines = [line for line in output.splitlines() if line.strip()]
    steps = [line.removeprefix("step: ") for line in lines if line.startswith("step: ")]
    said = [line for line in lines if not line.startswith("step: ")]
    how = f"ended by signal {-status}" if status < 0 else "refused the design" if status else "gave nothing"
    where = f" in step {steps[-1]}" if steps else ""
    errors = [line for line in said if "error" in line.lower() or "assert" in line.lower()] or said[-3:]
    return f"CIRCT {how}{where}: {' '.join(errors[:3])[:600]}"
