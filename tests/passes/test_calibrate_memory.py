"""`calibrate` holds the weights of one layer at a time: its peak memory, measured in a process of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mxloom.backends.safetensors_file import write_safetensors

LAYERS, WIDTH, INNER = 8, 1024, 16384

LAYER = 2 * WIDTH * INNER * 4
"""Bytes of the two matrices of a layer in f32; the whole model has eight times as many."""

MEASURED = """
import resource, sys
from pathlib import Path
import torch
from mxloom.backends.weight_store import WeightStore
from mxloom.dialects.mx import parse_module
from mxloom.passes._context import CompileContext
from mxloom.passes.calibrate import Calibrate

torch.set_num_threads(1)
folder = Path(sys.argv[1])
module = parse_module((folder / "module.mlir").read_text())
ctx = CompileContext(weights=WeightStore.from_safetensors(folder))
ctx.calibration = lambda samples: [[torch.randn(1, 64, 1024)] for _ in range(3)]
Calibrate(kinds=("ranges", "fisher"), save=str(folder / "sums"), shard=2).apply(ctx, module)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""


def module_text() -> str:
    """Layers x + down(tanh(up(x))), one after the other."""
    wide, inner = f"tensor<?x?x{WIDTH}xf32>", f"tensor<?x?x{INNER}xf32>"
    up, down = f"tensor<{INNER}x{WIDTH}xf32>", f"tensor<{WIDTH}x{INNER}xf32>"
    lines = [f"func.func @f(%x0: {wide}) -> {wide} {{"]
    for n in range(LAYERS):
        lines += [
            f'  %up{n} = mx.parameter "layers.{n}.up" : {up}',
            f'  %down{n} = mx.parameter "layers.{n}.down" : {down}',
            f"  %a{n} = mx.linear %x{n}, %up{n} : ({wide}, {up}) -> {inner}",
            f"  %b{n} = mx.tanh %a{n} : ({inner}) -> {inner}",
            f"  %c{n} = mx.linear %b{n}, %down{n} : ({inner}, {down}) -> {wide}",
            f"  %x{n + 1} = mx.add %x{n}, %c{n} : ({wide}, {wide}) -> {wide}",
        ]
    return "\n".join([*lines, f"  func.return %x{LAYERS} : {wide} }}"])


@pytest.mark.slow
def test_the_peak_is_twice_the_largest_layer_and_500_mib_beside_that_layer_s_statistics(tmp_path: Path) -> None:
    """The model has 8 layers of 128 MiB: in memory at once they, and what is asked for of them, would take 2 GiB."""
    (tmp_path / "module.mlir").write_text(module_text())
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(INNER, WIDTH, generator=generator, dtype=torch.bfloat16) * 0.02
    weights = {
        f"layers.{n}.{name}": matrix if name == "up" else matrix.T for n in range(LAYERS) for name in ("up", "down")
    }
    write_safetensors(tmp_path / "model.safetensors", weights)
    command = [sys.executable, "-c", MEASURED, str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=600, check=True)
    peak = int(result.stdout)
    assert peak <= 2 * LAYER + (500 << 20) + LAYER, f"{peak >> 20} MiB"
    assert len(list((tmp_path / "sums").glob("*.safetensors"))) == 2
