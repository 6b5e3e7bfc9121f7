"""`calibrate` shard by shard: files that others may compute, that a run goes on from, that know what they are of."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from xdsl.dialects.builtin import ModuleOp

from mxloom.backends.weight_store import WeightStore
from mxloom.dialects.errors import MxloomError, UsageError
from mxloom.dialects.mx import parse_module
from mxloom.passes import _shelf
from mxloom.passes._context import CompileContext
from mxloom.passes._sites import sites
from mxloom.passes._statistics import Statistics
from mxloom.passes._sweep import Sweep
from mxloom.passes.calibrate import Calibrate

from .calibrated import near, random

TEXT = """func.func @f(%x: tensor<?x8xf32>) -> tensor<?x4xf32> {
  %a = mx.parameter "a" : tensor<16x8xf32>
  %hidden = mx.linear %x, %a : (tensor<?x8xf32>, tensor<16x8xf32>) -> tensor<?x16xf32>
  %bent = mx.tanh %hidden : (tensor<?x16xf32>) -> tensor<?x16xf32>
  %b = mx.parameter "b" : tensor<4x16xf32>
  %y = mx.linear %bent, %b : (tensor<?x16xf32>, tensor<4x16xf32>) -> tensor<?x4xf32>
  func.return %y : tensor<?x4xf32> }"""

X = random(10, 8)


def run(save: Path | None, module: ModuleOp | None = None, x: Tensor = X, **options: Any) -> CompileContext:
    """The context behind `calibrate`, in shards of 3, 3, 3 and 1 rows."""
    torch.manual_seed(0)
    weights = {"a": random(16, 8, seed=1), "b": options.pop("b", random(4, 16, seed=2))}
    ctx = CompileContext(weights=WeightStore.from_state_dict(weights), calibration=lambda samples: [[x]])
    Calibrate(shard=3, save=None if save is None else str(save), **options).apply(ctx, module or parse_module(TEXT))
    return ctx


def statistics(ctx: CompileContext) -> Statistics:
    assert ctx.statistics is not None
    return ctx.statistics


def tensors(ctx: CompileContext, module: ModuleOp) -> list[Tensor]:
    """Everything that the statistics say."""
    held, found = statistics(ctx), list[Tensor]()
    for site in sites(module):
        inputs = held.inputs(site)
        found += [held.hessian(site), held.fisher(site), inputs.minimum, inputs.maximum, inputs.mean_square]
        found += [inputs.mean, inputs.mean_magnitude, inputs.percentile(0.9)]
    return found


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def equal(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_shards_are_added_in_f64_in_their_order_with_and_without_a_folder(tmp_path: Path) -> None:
    module = parse_module(TEXT)
    kept, passing = run(tmp_path, module), run(None, module)
    assert sorted(files(tmp_path)) == [f"shard-0000{n}.{end}" for n in range(4) for end in ("json", "safetensors")]
    assert statistics(kept).samples == 10
    assert equal(tensors(kept, module), tensors(passing, module))
    rows = [part.double() for part in X.split(3)]
    site = next(site for site in sites(module) if site.name == "hidden.weight")
    assert near(statistics(kept).hessian(site), sum(2 * r.T @ r for r in rows) / 10, 1e-6)  # type: ignore[arg-type]


def test_two_runs_that_share_the_shards_make_the_same_bytes(tmp_path: Path) -> None:
    module = parse_module(TEXT)
    one, shared = tmp_path / "one", tmp_path / "shared"
    whole = run(one, module)
    first = run(shared, module, only=(2, 0))
    assert first.statistics is None
    assert first.notes == [f"calibrate: shards 2, 0 are in {shared}; others are missing yet"]
    assert sorted(files(shared)) == [f"shard-0000{n}.{end}" for n in (0, 2) for end in ("json", "safetensors")]
    second = run(shared, module, only=(1, 3))
    assert files(one) == files(shared)
    assert equal(tensors(whole, module), tensors(second, module))


ELSEWHERE = """
import sys
from importlib import import_module
from pathlib import Path
import torch
torch.set_num_threads(1)
sys.path.insert(0, sys.argv[2])
import_module("passes.test_calibrate_shards").run(Path(sys.argv[1]), only=(1, 2))
"""


@pytest.mark.slow
def test_another_process_makes_the_same_bytes(tmp_path: Path) -> None:
    one, shared = tmp_path / "one", tmp_path / "shared"
    run(one)
    run(shared, only=(0, 3))
    folder = str(Path(__file__).parents[1])
    subprocess.run([sys.executable, "-c", ELSEWHERE, str(shared), folder], check=True, timeout=300, cwd=tmp_path)
    assert files(one) == files(shared)


def test_an_interrupted_run_goes_on_from_its_finished_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    run(one)
    begun: list[int] = []
    shard = Sweep.shard

    def stops(self: Sweep, samples: Any, first: int, done: Any = None) -> None:
        begun.append(first)
        if len(begun) == 3:
            raise KeyboardInterrupt
        shard(self, samples, first, done)

    monkeypatch.setattr(Sweep, "shard", stops)
    with pytest.raises(KeyboardInterrupt):
        run(two)
    assert sorted(files(two)) == [f"shard-0000{n}.{end}" for n in range(2) for end in ("json", "safetensors")]
    (two / "shard-00002.safetensors").write_bytes(b"half")  # as a run that was killed between its two files leaves it
    run(two)
    assert begun == [0, 3, 6, 6, 9]
    assert files(one) == files(two)


DIFFERENT: dict[str, tuple[dict[str, Any], str]] = {
    "weights": ({"b": random(4, 16, seed=3)}, "weights ("),
    "inputs": ({"x": X + 1}, "inputs ("),
    "the number of rows": ({"x": X[:8]}, "sequences (3, now 2)"),
    "the loss": ({"numerics": "emulated"}, "settings.numerics (float, now emulated)"),
    "the seed": ({"seed": 1}, "settings.seed (0, now 1)"),
    "the module": ({"module": parse_module(TEXT.replace("mx.tanh", "mx.sigmoid"))}, "module ("),
}


@pytest.mark.parametrize("what", DIFFERENT)
def test_shards_of_something_else_are_refused(what: str, tmp_path: Path) -> None:
    run(tmp_path)
    before = files(tmp_path)
    options, told = DIFFERENT[what]
    with pytest.raises(MxloomError) as caught:
        run(tmp_path, **options)
    assert "these sums were collected with another " + told in str(caught.value)
    assert "give another folder (save=), or delete this one" in str(caught.value)
    assert files(tmp_path) == before


def test_versions_and_more_kinds(tmp_path: Path) -> None:
    run(tmp_path)
    run(tmp_path, kinds=("hessian",))  # the files have what is asked for, and more
    path = tmp_path / "shard-00001.json"
    fields = json.loads(path.read_text())
    path.write_text(json.dumps(fields | {"versions": fields["versions"] | {"torch": "1.0"}}))
    with pytest.raises(MxloomError, match=r"shard-00001\.json: .* another versions\.torch \(1\.0, now "):
        run(tmp_path)
    path.write_text("{")
    with pytest.raises(MxloomError, match=r"shard-00001\.json is no JSON: delete it"):
        run(tmp_path)


def test_files_of_fewer_kinds_are_refused(tmp_path: Path) -> None:
    run(tmp_path, kinds=("hessian",))
    with pytest.raises(MxloomError, match=r"settings\.(kinds|fisher) \("):
        run(tmp_path)


def test_only_needs_a_folder_and_shards_that_are_there(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="only is a whole number from 0 to 3: there are 4 shards, got 4"):
        run(tmp_path, only=(4,))
    with pytest.raises(UsageError, match="only has no effect without save"):
        Calibrate(only=(0,))


def test_no_folder_can_be_made_under_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(MxloomError, match="no folder for statistics can be made"):
        run(tmp_path / "file" / "inside")


def test_what_waits_in_files_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    module = parse_module(TEXT)
    before = tensors(run(None, module), module)
    monkeypatch.setattr(_shelf, "LIMIT", 0)
    assert equal(before, tensors(run(None, module), module))


def test_a_shelf_keeps_what_fits_and_files_the_rest() -> None:
    shelf = _shelf.Shelf(limit=100)
    one, other = torch.arange(20, dtype=torch.float32), torch.arange(15, dtype=torch.bfloat16).reshape(3, 5)
    flags = torch.tensor([True, False])
    for key, value in {"one": one, "other": other, "flags": flags, "size": 7}.items():
        shelf.put(key, value)
    assert len(list(shelf._folder.iterdir())) == 1  # type: ignore[union-attr]
    assert torch.equal(shelf.get("other"), other) and shelf.get("other").dtype == torch.bfloat16
    assert torch.equal(shelf.get("one"), one) and torch.equal(shelf.get("flags"), flags) and shelf.get("size") == 7
    shelf.put("other", flags)
    assert not list(shelf._folder.iterdir())  # type: ignore[union-attr]
    assert torch.equal(shelf.take("one"), one) and "one" not in shelf and shelf.take("one") is None
    folder = shelf._folder
    del shelf
    assert folder is not None and not folder.exists()
