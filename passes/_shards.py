"""Sums shard by shard in a folder: what is there already is not computed again, and all are added in one order."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..backends.reference import Weights, body
from ..backends.weight_store import WeightStore
from ..dialects import formats
from ..dialects.errors import MxloomError
from ..dialects.operations._shapes import element_of
from ..dialects.operations.parameter import ParameterOp
from ._observed import Plan
from ._samples import Sample
from ._sums import Sums, no_rows
from ._sums_file import Layout, SumsFile, new_sums

if TYPE_CHECKING:
    from torch import Tensor

FORM = 1
"""Of the files: a change of what the sums mean, or of how they lie, gets the next number."""

Fingerprint = dict[str, Any]
"""What the sums of a shard hang on, as JSON."""


@dataclass
class Shards:
    """Files of sums, `shard-00000.safetensors` with its fingerprint `shard-00000.json` and so on, in a folder.

    Without a folder of the user's they lie in a temporary one, where each is added to those before and removed.
    """

    plan: Plan
    kinds: frozenset[str]
    folder: Path | None = None
    files: list[SumsFile] = field(default_factory=list)
    numbers: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._units = {
            (kind, key): f"{kind}.{number}"
            for kind, units in units_of(self.plan).items()
            if kind in self.kinds
            for number, key in enumerate(units)
        }
        self._lasting = self.folder is not None
        if self.folder is None:
            self.folder = Path(tempfile.mkdtemp(prefix="mxloom-"))
            weakref.finalize(self, shutil.rmtree, self.folder, ignore_errors=True)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise MxloomError(f"{self.folder}: no folder for statistics can be made: {error.strerror}") from error

    def collect(
        self, number: int, fingerprint: Fingerprint | None, run: Callable[[Callable[[str, str, Sums], None]], None]
    ) -> None:
        """Have `run` compute the sums of a shard, unless the folder has them, and add the file to `files`.

        Raises MxloomError where the folder has them with another fingerprint, or sums are NaN or infinite.
        """
        path = self._path(number)
        if not self.is_there(number, fingerprint):
            with new_sums(path, self._layout()) as writer:
                run(lambda kind, key, sums: writer.put(self._units[kind, key], _finite(kind, key, sums)))
            if self._lasting:
                _write_text(path.with_suffix(".json"), json.dumps(fingerprint, indent=1))
        self.files.append(SumsFile(path))
        self.numbers.append(number)
        if not self._lasting and len(self.files) > 1:
            self._fold()

    def rows(self, kind: str, key: str) -> Tensor:
        """How many rows were seen, of all shards."""
        import torch

        return torch.stack([file.rows(self._units[kind, key]) for file in self.files]).sum(0)

    def sums(self, kind: str, key: str) -> Sums:
        """The sums of all shards, added in their order in f64."""
        return merged([file.sums(self._units[kind, key]) for file in self.files])

    def _path(self, number: int) -> Path:
        assert self.folder is not None
        return self.folder / f"shard-{number:05d}.safetensors"

    def _layout(self) -> dict[str, Sums]:
        units = units_of(self.plan)
        return {name: no_rows(units[kind][key], "meta") for (kind, key), name in self._units.items()}

    def is_there(self, number: int, fingerprint: Fingerprint | None) -> bool:
        """Whether a shard is finished; MxloomError where it was computed from something else."""
        path = self._path(number)
        told = path.with_suffix(".json")
        if not (self._lasting and told.is_file() and path.is_file()):
            return False
        try:
            found = json.loads(told.read_text("utf-8"))
        except ValueError as error:
            raise MxloomError(f"{told} is no JSON: delete it, and the shard is computed again") from error
        different = _difference(_reduced(found, fingerprint), json.loads(json.dumps(fingerprint)))
        if different is not None:
            raise MxloomError(
                f"{told}: these sums were collected with another {different}; give another folder (save=), or delete "
                "this one to collect them again"
            )
        return True

    def _fold(self) -> None:
        """Put the sum of all files in their place."""
        assert self.folder is not None
        path = self.folder / "merged.new"
        wide: Layout = {
            name: {
                part: tensor.double() if tensor.is_floating_point() else tensor.long() for part, tensor in sums.items()
            }
            for name, sums in self._layout().items()
        }
        with new_sums(path, wide) as writer:
            for name in wide:
                writer.put(name, merged([file.sums(name) for file in self.files]))
        for file in self.files:
            file.path.unlink()
        path = path.replace(self.folder / "merged.safetensors")
        self.files = [SumsFile(path)]


def units_of(plan: Plan) -> dict[str, dict[str, Any]]:
    """What there are sums of, by kind and key."""
    return {"ranges": plan.values, "hessian": plan.products, "fisher": plan.gradients}


def merged(shards: Sequence[Sums]) -> Sums:
    """The sums of several shards, added in their order, floats in f64; extremes are compared."""
    import torch

    found: Sums = {}
    for sums in shards:
        if not int(sums["rows"].sum()):
            continue
        for part, tensor in sums.items():
            wide = tensor.double() if tensor.is_floating_point() else tensor.long()
            if part not in found:
                found[part] = wide
            elif part in ("minimum", "maximum"):
                found[part] = (torch.minimum if part == "minimum" else torch.maximum)(found[part], wide)
            else:
                found[part] = found[part] + wide
    return found


def fingerprint_of(plan: Plan, weights: Weights, settings: dict[str, Any]) -> Fingerprint:
    """What all shards of a collection have in common: module, values of its parameters, settings, versions."""
    digest = hashlib.sha256()
    for op in body(plan.module).ops:
        if isinstance(op, ParameterOp):
            _digest_parameter(digest, op, weights)
            if isinstance(weights, WeightStore):
                weights.release()
    return {
        "form": FORM,
        "versions": {name: _version(name) for name in ("mxloom", "torch")},
        "module": hashlib.sha256(str(plan.module).encode()).hexdigest(),
        "weights": digest.hexdigest(),
        "settings": settings,
    }


def inputs_digest(samples: Sequence[Sample]) -> str:
    """SHA-256 of the inputs of some samples: shapes, dtypes, bytes, and which positions are data."""
    digest = hashlib.sha256()
    for sample in samples:
        for tensor in (*sample.inputs, *(() if sample.mask is None else (sample.mask,))):
            _digest_tensor(digest, tensor)
    return digest.hexdigest()


def _digest_parameter(digest: Any, op: ParameterOp, weights: Weights) -> None:
    name, element = op.source.data, element_of(op.result)
    digest.update(f"{name}\n".encode())
    if formats.is_wide(element):
        _digest_tensor(digest, weights.wide(name))
        return
    for part, tensor in weights.encoded(name, element, op.result.type.get_shape()).tensors().items():
        digest.update(f"{part}\n".encode())
        _digest_tensor(digest, tensor)


def _digest_tensor(digest: Any, tensor: Tensor) -> None:
    import torch

    digest.update(f"{tensor.dtype} {tuple(tensor.shape)}\n".encode())
    if tensor.numel():
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)


def _difference(found: Any, wanted: Any, what: str = "") -> str | None:
    """The first part in which two fingerprints differ, with what it is in both."""
    if isinstance(found, dict) and isinstance(wanted, dict):
        for key in dict.fromkeys((*wanted, *found)):
            if different := _difference(found.get(key), wanted.get(key), f"{what}.{key}" if what else key):
                return different
        return None
    if found == wanted:
        return None
    return f"{what} ({_short(found)}, now {_short(wanted)})"


def _reduced(found: Any, wanted: Fingerprint | None) -> Any:
    """A fingerprint of more kinds than are wanted as one of these alone."""
    try:
        kinds = wanted["settings"]["kinds"] if wanted is not None else []
        if set(kinds) <= set(found["settings"]["kinds"]):
            settings = found["settings"] | {"kinds": kinds}
            if "fisher" not in kinds:
                settings = {name: value for name, value in settings.items() if name != "seed"} | {"fisher": None}
            return found | {"settings": settings}
    except (KeyError, TypeError):
        pass
    return found


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 24 else f"{text[:12]}…"


def _finite(kind: str, key: str, sums: Sums) -> Sums:
    part = {"hessian": "products", "fisher": "squares"}.get(kind)
    if part is not None and not bool(sums[part].isfinite().all()):
        bad, size = int((~sums[part].isfinite()).sum()), sums[part].numel()
        what = "squared gradients" if kind == "fisher" else "products of its input with itself"
        raise MxloomError(
            f"{key}: {bad} of {size} {what} are NaN or infinite; look at the values that the model computes there, "
            "and at what comes behind them"
        )
    return sums


def _write_text(path: Path, content: str) -> None:
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        partial.write_text(content, "utf-8")
        partial.replace(path)
    except OSError as error:
        raise MxloomError(f"{path} cannot be written: {error.strerror}") from error
    finally:
        partial.unlink(missing_ok=True)


def _version(package: str) -> str:
    from importlib.metadata import PackageNotFoundError

    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
