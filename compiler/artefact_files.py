"""The files of an artefact: what they are called, and that they are what was written. Nothing in them is believed."""

from __future__ import annotations

import hashlib
import stat
from pathlib import Path, PurePosixPath
from typing import Any

from ..backends.checkpoint_files import read_json
from ..dialects.errors import MxloomError, shortened
from .tokenizer_files import COMPANIONS

FORMAT_VERSION = 1

MODULE, WEIGHTS, CONFIG = "module.mlir", "weights.safetensors", "config.json"
REPORT, PROVENANCE = "report.json", "provenance.json"

TEXT_LIMIT = 50_000_000
"""Bytes of module.mlir and of each JSON file that are read at most."""

FILES_LIMIT = 1000
"""Files that an artefact lists at most; mxloom writes about twenty."""


def is_artefact(folder: Path) -> bool:
    """Whether the folder is one that saving wrote: it has a module and a provenance."""
    return (folder / MODULE).is_file() and (folder / PROVENANCE).is_file()


def checked_provenance(folder: Path) -> dict[str, Any]:
    """The provenance, after every file it lists was found to be a file with the bytes that were written."""
    if not folder.is_dir():
        raise MxloomError(f"{folder}: no such folder.")
    if not is_artefact(folder):
        raise MxloomError(f"{folder}: no mxloom artefact ({MODULE} or {PROVENANCE} is missing).")
    path = folder / PROVENANCE
    _check_plain(folder, PROVENANCE)
    provenance = read_json(path, TEXT_LIMIT)
    check_version(path, provenance)
    _check_fields(path, provenance)
    files = provenance.get("files")
    if not isinstance(files, dict) or not files.keys() >= {MODULE, WEIGHTS, CONFIG} or len(files) > FILES_LIMIT:
        raise MxloomError(f'{path}: "files" must map the names of the files to their SHA-256.')
    for name, digest in files.items():
        _check_file(folder, name, digest)
    for name in COMPANIONS:
        if name not in files and (folder / name).exists():
            raise MxloomError(f"{folder / name}: is there, though {PROVENANCE} does not list it.")
    return provenance


def check_version(path: Path, fields: dict[str, Any]) -> None:
    """MxloomError unless the fields in `path` state, as a whole number, the version that is read here."""
    version = fields.get("format_version")
    if type(version) is not int or version != FORMAT_VERSION:
        raise MxloomError(
            f"{path}: format version {version!r:.40}; this mxloom reads {FORMAT_VERSION}. Compile the model again."
        )


def sha256(path: Path) -> str:
    """The SHA-256 of a file's bytes, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _check_fields(path: Path, provenance: dict[str, Any]) -> None:
    for name, kind, said in (
        ("pipeline", str, "a string"),
        ("recipe", dict | None, "an object or null"),
        ("versions", dict, "an object"),
        ("source", dict, "an object"),
        ("notes", list, "a list"),
    ):
        if name in provenance and not isinstance(provenance[name], kind):
            raise MxloomError(f"{path}: {name!r} must be {said}.")


def _check_file(folder: Path, name: str, digest: Any) -> None:
    _check_plain(folder, name)
    if sha256(folder / name) != digest:
        raise MxloomError(f"{folder / name}: changed since it was written (its SHA-256 differs from {PROVENANCE}).")


def _check_plain(folder: Path, name: str) -> None:
    """A name of a file inside the folder; neither the file nor a folder on the way to it is a link."""
    listing = folder / PROVENANCE
    if not _is_name(name):
        raise MxloomError(f"{listing}: {shortened(ascii(name))} is no name of a file.")
    parts = PurePosixPath(name).parts
    if name.startswith("/") or ".." in parts or "\\" in name:
        raise MxloomError(f"{listing}: {shortened(ascii(name))} leads out of the folder.")
    path, mode = folder, 0
    for number in range(1, len(parts) + 1):
        path = folder.joinpath(*parts[:number])
        try:
            mode = path.lstat().st_mode
        except OSError:
            raise MxloomError(f"{path}: missing, though {PROVENANCE} lists it.") from None
        if stat.S_ISLNK(mode):
            raise MxloomError(f"{path}: is a link; an artefact holds its files themselves.")
    if not stat.S_ISREG(mode):
        raise MxloomError(f"{path}: missing, though {PROVENANCE} lists it: what is there is no file.")


def _is_name(name: str) -> bool:
    try:
        encoded = name.encode("utf-8")
    except UnicodeEncodeError:  # half a surrogate pair, which JSON can spell
        return False
    return 0 < len(encoded) <= 1000 and "\0" not in name and PurePosixPath(name).name not in ("", ".")
