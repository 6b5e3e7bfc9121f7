"""Tensors that wait to be used again: in memory up to a limit, beyond it in files."""

from __future__ import annotations

import shutil
import tempfile
import weakref
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor
    from torch import dtype as Dtype

LIMIT = 64 << 20
"""Bytes kept in memory."""


class Shelf:
    """Values by any key. Tensors that no longer fit into `limit` bytes lie in files of a temporary folder."""

    def __init__(self, limit: int | None = None) -> None:
        self.limit = LIMIT if limit is None else limit
        self._held: dict[Any, Any] = {}
        self._files: dict[Any, tuple[Path, Dtype, tuple[int, ...]]] = {}
        self._bytes = 0
        self._folder: Path | None = None
        self._written = 0

    def __contains__(self, key: Any) -> bool:
        return key in self._held or key in self._files

    def put(self, key: Any, value: Any) -> None:
        """Keep a value; one that was there under the key is gone."""
        self.drop(key)
        size = _size(value)
        if size == 0 or self._bytes + size <= self.limit:
            self._held[key] = value
            self._bytes += size
        else:
            self._files[key] = self._write(value)

    def get(self, key: Any) -> Any:
        """The value; KeyError where there is none."""
        if key in self._held:
            return self._held[key]
        return _read(*self._files[key])

    def drop(self, key: Any) -> None:
        """Forget the value, if there is one."""
        if key in self._held:
            self._bytes -= _size(self._held.pop(key))
        elif key in self._files:
            self._files.pop(key)[0].unlink()

    def take(self, key: Any) -> Any:
        """The value, which is forgotten; None where there is none."""
        if key not in self:
            return None
        value = self.get(key)
        self.drop(key)
        return value

    def _write(self, tensor: Tensor) -> tuple[Path, Dtype, tuple[int, ...]]:
        import torch

        if self._folder is None:
            self._folder = Path(tempfile.mkdtemp(prefix="mxloom-"))
            weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)
        path = self._folder / str(self._written)
        self._written += 1
        tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tofile(path)
        return path, tensor.dtype, tuple(tensor.shape)


def _size(value: Any) -> int:
    return value.numel() * value.element_size() if hasattr(value, "element_size") else 0


def _read(path: Path, dtype: Dtype, shape: tuple[int, ...]) -> Tensor:
    import numpy as np
    import torch

    return torch.from_numpy(np.fromfile(path, dtype=np.uint8)).view(dtype).reshape(shape)
