"""Sums in one safetensors file: written unit by unit as they become known, read unit by unit."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from ..backends.safetensors_file import read_header
from ..dialects.errors import MxloomError
from ._sums import Sums

if TYPE_CHECKING:
    from torch import Tensor

Layout = Mapping[str, Sums]
"""The shapes and dtypes of the sums of every unit, as tensors on the device `meta`, by the unit's name."""

_NAMES = {"float64": "F64", "int64": "I64", "float32": "F32", "int32": "I32"}


@contextmanager
def new_sums(path: Path, layout: Layout) -> Iterator[_Writer]:
    """A file of sums that appears at `path` when the block ends without an error, and not at all otherwise.

    Units of which nothing is written have sums of 0. Raises MxloomError where it cannot be written.
    """
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as file:
            yield _Writer(file, layout)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        raise MxloomError(f"{path} cannot be written: {error.strerror or error}") from error
    finally:
        partial.unlink(missing_ok=True)


class _Writer:
    def __init__(self, file: BinaryIO, layout: Layout) -> None:
        self._file = file
        self._places: dict[str, int] = {}
        tensors = {f"{unit}.{part}": tensor for unit, sums in layout.items() for part, tensor in sums.items()}
        header: dict[str, Any] = {}
        position = 0
        for name in sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name)):
            tensor = tensors[name]
            end = position + prod(tensor.shape) * tensor.dtype.itemsize
            kind = _NAMES[str(tensor.dtype).removeprefix("torch.")]
            header[name] = {"dtype": kind, "shape": list(tensor.shape), "data_offsets": [position, end]}
            self._places[name] = position
            position = end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        file.write(len(text).to_bytes(8, "little") + text)
        self._begin = 8 + len(text)
        file.truncate(self._begin + position)

    def put(self, unit: str, sums: Sums) -> None:
        """Write the sums of one unit."""
        import torch

        for part, tensor in sums.items():
            self._file.seek(self._begin + self._places[f"{unit}.{part}"])
            self._file.write(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data)


class SumsFile:
    """The sums of a file, read from it when asked for. MxloomError where the file is broken."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._entries, _, self._begin = read_header(path)

    def __contains__(self, unit: str) -> bool:
        return f"{unit}.rows" in self._entries

    def sums(self, unit: str) -> Sums:
        """The sums of one unit."""
        start = f"{unit}."
        names = [name for name in self._entries if name.startswith(start)]
        return {name.removeprefix(start): self._read(name) for name in names}

    def rows(self, unit: str) -> Tensor:
        """How many rows the sums of one unit are of."""
        return self._read(f"{unit}.rows")

    def _read(self, name: str) -> Tensor:
        import numpy as np
        import torch

        entry = self._entries[name]
        raw = np.fromfile(self.path, np.uint8, entry.end - entry.begin, offset=self._begin + entry.begin)
        return torch.from_numpy(raw).view(entry.torch_dtype).reshape(entry.shape)
