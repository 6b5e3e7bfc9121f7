"""Folders and files that appear whole or not at all."""

from __future__ import annotations

import ctypes
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ..dialects.errors import UsageError

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2
"""linux/fcntl.h and linux/fs.h: paths from the working directory; exchange two names in one step."""


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """An empty folder beside `target`, which takes its place when the block ends without an error.

    What was at `target` is removed only then. After an error nothing is left of the new folder.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=".mxloom-", suffix=".partial", dir=target.parent))
    try:
        yield folder
        folder.chmod(0o777 & ~_umask())
        _flush(folder)
        _take_place(folder, target)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def write_file(target: Path, text: str) -> None:
    """Write a file in UTF-8, whole or not at all: what was at `target` stays where anything fails.

    Raises UsageError where it cannot be written.
    """
    partial = None
    try:
        handle, name = tempfile.mkstemp(prefix=".mxloom-", suffix=".partial", dir=target.parent)
        partial = Path(name)
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        partial.chmod(0o666 & ~_umask())
        partial.replace(target)
        _flush_one(target.parent)
    except OSError as error:
        raise UsageError(f"{target} cannot be written: {error.strerror or error}") from None
    finally:
        if partial is not None:
            partial.unlink(missing_ok=True)


def check_writable(target: Path) -> None:
    """Raise UsageError where `write_file` could not write `target`: before work whose result belongs there."""
    if not target.parent.is_dir():
        raise UsageError(f"{target.parent}: there is no such folder")
    if target.is_dir():
        raise UsageError(f"{target} is a folder: name a file")
    try:
        with tempfile.TemporaryFile(prefix=".mxloom-", dir=target.parent):
            pass
    except OSError as error:
        raise UsageError(f"{target} cannot be written: {error.strerror or error}") from None


def _take_place(folder: Path, target: Path) -> None:
    """Rename `folder` to `target`; a folder that is there ends up under the name of `folder`."""
    if not target.exists():
        folder.replace(target)
    elif not _exchange(folder, target):
        old = folder.with_suffix(".old")
        target.replace(old)
        folder.replace(target)
        shutil.rmtree(old)
    _flush_one(target.parent)


def _exchange(one: Path, other: Path) -> bool:
    """Swap two names in one step, where system and file system can (Linux: renameat2)."""
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError):
        return False
    return rename(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0


def _flush(folder: Path) -> None:
    """Have the system write the files of `folder`, and the folder itself, to the disk."""
    for path in sorted(folder.rglob("*"), reverse=True):
        _flush_one(path)
    _flush_one(folder)


def _flush_one(path: Path) -> None:
    with suppress(PermissionError):  # Windows opens no folders
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _umask() -> int:
    """The mask of permissions that new files get; mkdtemp has set it aside."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
