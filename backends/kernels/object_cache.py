"""Compiled kernels on disk: one file for each, found by a hash of all that decides about its code."""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
import tempfile
from pathlib import Path

_DIGEST = hashlib.sha256().digest_size


def folder() -> Path | None:
    """Where kernels are kept: $MXLOOM_CACHE, else the user's cache folder; None where `MXLOOM_CACHE` is empty."""
    chosen = os.environ.get("MXLOOM_CACHE")
    if chosen is not None:
        return Path(chosen) / "kernels" if chosen else None
    try:
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError:  # no home
        return None
    return home / "mxloom" / "kernels"


def key(*parts: str) -> str:
    """The name of a kernel's file."""
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def read(name: str) -> bytes | None:
    """The object code kept under `name`; None where there is none or its bytes are not those that were written."""
    place = folder()
    if place is None:
        return None
    try:
        if not _is_ours(place):
            return None
        content = (place / name).read_bytes()
    except OSError:
        return None
    digest, code = content[:_DIGEST], content[_DIGEST:]
    return code if code and hashlib.sha256(code).digest() == digest else None


def _is_ours(place: Path) -> bool:
    """Whether nobody else can write into the folder: what lies there is run. Windows keeps homes apart."""
    if not hasattr(os, "getuid"):
        return True
    found = place.stat()
    return found.st_uid == os.getuid() and not found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


def write(name: str, code: bytes) -> None:
    """Keep object code, whole or not at all; a folder that cannot be written keeps nothing."""
    place = folder()
    if place is None:
        return
    with contextlib.suppress(OSError):
        place.mkdir(parents=True, exist_ok=True, mode=0o700)
        descriptor, temporary = tempfile.mkstemp(dir=place, prefix=".partial-")
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(hashlib.sha256(code).digest() + code)
            Path(temporary).replace(place / name)
        except OSError:
            Path(temporary).unlink(missing_ok=True)
