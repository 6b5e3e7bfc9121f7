"""Which files of a folder hold a checkpoint; nothing outside the folder is touched, no pickle is read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..dialects.errors import MxloomError, shortened

INDEX_LIMIT = 50_000_000
"""Bytes of a shard index that are read at most."""

_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


def checkpoint_files(folder: Path) -> dict[Path, list[str] | None]:
    """The safetensors files of a checkpoint folder, each with the names to take from it (None: all).

    Raises MxloomError for a missing folder, no safetensors, a pickle checkpoint, or an index that leads elsewhere.
    """
    if not folder.is_dir():
        raise MxloomError(f"{folder}: no such folder.")
    index = folder / "model.safetensors.index.json"
    single = folder / "model.safetensors"
    if single.is_file():
        return {_inside(folder, single.name, folder): None}
    if index.is_file():
        return _shards(folder, index)
    others = sorted(folder.glob("*.safetensors"))
    if len(others) == 1:
        return {_inside(folder, others[0].name, folder): None}
    if others:
        raise MxloomError(f"{folder}: {len(others)} safetensors files, but no model.safetensors.index.json joins them.")
    pickles = sorted(path.name for pattern in _PICKLES for path in folder.glob(pattern))
    if pickles:
        raise MxloomError(
            f"{folder}: {pickles[0]} is a pickle, which may run code when read; mxloom reads safetensors and GGUF "
            "only. Convert it where you trust it: load it with transformers and call save_pretrained."
        )
    raise MxloomError(f"{folder}: no weights: neither model.safetensors nor model.safetensors.index.json.")


def _shards(folder: Path, index: Path) -> dict[Path, list[str] | None]:
    weight_map = read_json(index, INDEX_LIMIT).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise MxloomError(
            f'{index}: "weight_map" must map tensor names to shard files; it is {shortened(repr(weight_map))}.'
        )
    shards: dict[str, list[str]] = {}
    for name, shard in weight_map.items():
        if not isinstance(shard, str):
            raise MxloomError(f"{index}: the shard of {name!r} must be a file name; it is {shortened(repr(shard))}.")
        shards.setdefault(shard, []).append(name)
    return {_inside(folder, shard, index): names for shard, names in shards.items()}


def _inside(folder: Path, name: str, source: Path) -> Path:
    """`folder / name` when that is a plain file of the folder; a link that leaves the folder is an error too.

    Links within one download cache (`snapshots/x/model.safetensors` to `../../blobs/hash`) stay under the cache of
    their model and are followed.
    """
    if not name.endswith(".safetensors") or name != Path(name).name or "\\" in name:
        raise MxloomError(
            f"{source}: {shortened(repr(name))} is not the plain name of a .safetensors file in {folder}."
        )
    path = folder / name
    if not path.is_file():
        raise MxloomError(f"{source}: the shard {name} is not in {folder}.")
    home, target = folder.resolve(), path.resolve()
    blobs = home.parent.parent / "blobs"
    if target.parent != home and not (home.parent.name == "snapshots" and target.parent == blobs):
        raise MxloomError(f"{source}: {name} is a link that leaves {folder}; put the file itself there.")
    return path


def read_json(path: Path, limit: int) -> dict[str, Any]:
    """The JSON object in a file of at most `limit` bytes; MxloomError names the file and what is wrong with it."""
    try:
        with path.open("rb") as file:
            raw = file.read(limit + 1)
    except OSError as error:
        raise MxloomError(f"{path}: cannot be read ({error.strerror}).") from error
    if len(raw) > limit:
        raise MxloomError(f"{path}: more than {limit} bytes; that is no such file of a model.")
    try:
        fields = json.loads(raw.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise MxloomError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(fields, dict):
        raise MxloomError(f"{path}: must hold a JSON object; it holds {shortened(repr(fields))}.")
    return fields
