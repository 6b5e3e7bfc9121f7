"""One safetensors file, nothing in it believed: the header is checked whole, then tensors are memory-mapped.

Format: huggingface/safetensors README, section "Format": 8 bytes of header length (little endian), a JSON header,
the bytes of the tensors without holes.
"""

from __future__ import annotations

import json
import mmap
import re
from collections.abc import Iterator, Mapping
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

from ..dialects.errors import MxloomError

if TYPE_CHECKING:
    from torch import Tensor
    from torch import dtype as Dtype

HEADER_LIMIT = 20_000_000
"""Bytes of header that are read at most; 100 000 tensors need about 12 000 000."""

BRACKET_LIMIT = 2_000_000
"""JSON lists and objects in one header at most (a tensor has three): bounds the memory that parsing takes."""

_DTYPES = {
    "BOOL": ("bool", 1),
    "U8": ("uint8", 1),
    "I8": ("int8", 1),
    "F8_E4M3": ("float8_e4m3fn", 1),
    "F8_E5M2": ("float8_e5m2", 1),
    "F8_E8M0": ("float8_e8m0fnu", 1),
    "U16": ("uint16", 2),
    "I16": ("int16", 2),
    "F16": ("float16", 2),
    "BF16": ("bfloat16", 2),
    "U32": ("uint32", 4),
    "I32": ("int32", 4),
    "F32": ("float32", 4),
    "U64": ("uint64", 8),
    "I64": ("int64", 8),
    "F64": ("float64", 8),
}

_INTEGERS = 2**63

_SEPARATORS = re.compile(r"[/\\]")


class Entry(NamedTuple):
    """Where one tensor lies: dtype as the file spells it, shape, first and last byte (exclusive) after the header."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def torch_dtype(self) -> Dtype:
        """The dtype as torch has it."""
        import torch

        return getattr(torch, _DTYPES[self.dtype][0])

    @property
    def bits(self) -> int:
        """Bits the tensor takes in the file."""
        return 8 * (self.end - self.begin)


class SafetensorsFile(Mapping[str, "Tensor"]):
    """Tensors of one checked file by name, memory-mapped: reading one touches only its own pages.

    Raises MxloomError naming file and tensor where header and file disagree in anything.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.entries, self.metadata, self._start = read_header(self.path)
        self._map: mmap.mmap | None = None

    def __getitem__(self, name: str) -> Tensor:
        import torch

        entry = self.entries[name]
        count = prod(entry.shape)
        if count == 0:
            return torch.empty(entry.shape, dtype=entry.torch_dtype)
        begin = self._start + entry.begin
        if begin % _DTYPES[entry.dtype][1]:
            aligned = bytearray(memoryview(self._mapped())[begin : self._start + entry.end])
            return torch.frombuffer(aligned, dtype=entry.torch_dtype).reshape(entry.shape)
        flat = torch.frombuffer(self._mapped(), dtype=entry.torch_dtype, count=count, offset=begin)
        return flat.reshape(entry.shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    def release(self) -> None:
        """Let the system have back the memory of what was read; tensors stay as they are, and are read again."""
        if self._map is not None and hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED)

    def _mapped(self) -> mmap.mmap:
        """The file in memory; a private mapping, so that no tensor made from it can write to the file."""
        if self._map is None:
            with self.path.open("rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        return self._map


def read_header(path: Path) -> tuple[dict[str, Entry], dict[str, str], int]:
    """Entries by name, the file's own metadata, and the position of the first data byte; everything is checked."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(8)
            length = int.from_bytes(start, "little")
            _check_length(path, size, len(start), length)
            raw = file.read(length)
    except OSError as error:
        raise MxloomError(f"{path}: cannot be read ({error.strerror}).") from error
    fields = _parse(path, raw)
    metadata = fields.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
        raise _broken(path, '"__metadata__" must map names to strings')
    entries = {name: _entry(path, name, fields[name]) for name in fields}
    _check_ranges(path, entries, size - 8 - length)
    return entries, metadata, 8 + length


def _broken(path: Path, what: str) -> MxloomError:
    return MxloomError(f"{path}: not a valid safetensors file: {what}. Fetch or convert the file again.")


def _check_length(path: Path, size: int, got: int, length: int) -> None:
    if got < 8:
        raise _broken(path, f"it has {size} bytes and must begin with 8 bytes of header length")
    if length > size - 8:
        raise _broken(path, f"its header should take {length} bytes, the file has {size - 8} after the length")
    if length > HEADER_LIMIT:
        raise _broken(path, f"its header takes {length} bytes; at most {HEADER_LIMIT} are read")


def _parse(path: Path, raw: bytes) -> dict[str, Any]:
    if not raw.startswith(b"{"):
        raise _broken(path, 'its header must be a JSON object and begin with "{"')
    if raw.count(b"[") + raw.count(b"{") > BRACKET_LIMIT:
        raise _broken(path, f"its header has more than {BRACKET_LIMIT} lists and objects")
    try:
        fields = json.loads(raw.decode("utf-8"), object_pairs_hook=_without_repetition, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise _broken(path, f"its header is not JSON ({error})") from error
    if not isinstance(fields, dict):
        raise _broken(path, "its header must be a JSON object")
    return fields


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; a key that comes twice is an error, since readers differ in which one they take."""
    fields = dict(pairs)
    if len(fields) == len(pairs):
        return fields
    seen: set[str] = set()
    for key, _ in pairs:
        if key in seen:
            raise ValueError(f"the key {key!r} comes twice")
        seen.add(key)
    return fields


def _no_constant(text: str) -> None:
    raise ValueError(f"{text} is not JSON")


def _entry(path: Path, name: str, fields: Any) -> Entry:
    _check_name(path, name)
    if not isinstance(fields, dict) or fields.keys() != {"dtype", "shape", "data_offsets"}:
        raise _broken(path, f'tensor {name!r} must have exactly "dtype", "shape" and "data_offsets"')
    dtype, shape, offsets = fields["dtype"], fields["shape"], fields["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise MxloomError(
            f"{path}: tensor {name!r} has the dtype {dtype!r}, which is not read; "
            f"these are: {', '.join(_DTYPES)}. Convert the checkpoint to one of them."
        )
    if not _naturals(shape):
        raise _broken(path, f"tensor {name!r} has the shape {shape!r}; sizes are whole numbers from 0")
    if not _naturals(offsets) or len(offsets) != 2:
        raise _broken(path, f"tensor {name!r} has the range {offsets!r}; it must be two whole numbers from 0")
    begin, end = offsets
    if end < begin:
        raise _broken(path, f"tensor {name!r} ends at byte {end}, before it begins ({begin})")
    needed = prod(shape) * _DTYPES[dtype][1]
    if end - begin != needed:
        raise _broken(
            path, f"tensor {name!r} has a range of {end - begin} bytes; {dtype} of shape {shape} needs {needed}"
        )
    return Entry(dtype, tuple(shape), begin, end)


def _check_name(path: Path, name: str) -> None:
    if name[:1] not in "/\\" and ".." not in name and ":" not in name:
        return
    parts = _SEPARATORS.split(name)
    if ".." in parts or not parts[0] or parts[0].endswith(":"):
        raise _broken(path, f"tensor name {name!r} is empty, absolute or leads out of a folder")


def _naturals(values: Any) -> bool:
    """A list of integers from 0 below 2^63 (JSON's true and 1.0 are none); more than 64 dimensions are none either."""
    if type(values) is not list or len(values) > 64:
        return False
    for value in values:  # noqa: SIM110  (a third of the time of `all`, and 100 000 tensors call it 200 000 times)
        if type(value) is not int or not 0 <= value < _INTEGERS:
            return False
    return True


def _check_ranges(path: Path, entries: dict[str, Entry], available: int) -> None:
    """Sorted by place, the tensors fill the data without a hole, an overlap or a rest."""
    position, before = 0, "the header"
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)):
        if entry.end > available:
            raise _broken(path, f"tensor {name!r} ends at byte {entry.end}; the file has {available} data bytes")
        if entry.begin < position:
            raise _broken(path, f"tensor {name!r} overlaps {before} (byte {entry.begin} lies before {position})")
        if entry.begin > position:
            raise _broken(path, f"a hole of {entry.begin - position} bytes lies between {before} and tensor {name!r}")
        position, before = entry.end, f"tensor {name!r}"
    if position != available:
        raise _broken(path, f"{available - position} bytes follow {before}")


def write_safetensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors one after the other; no more than one is held in memory beside what the mapping holds.

    Ordered by item size, then by name, so that every tensor is aligned and equal weights give equal bytes.
    """
    import torch

    names = {getattr(torch, torch_name): name for name, (torch_name, _) in _DTYPES.items()}
    header: dict[str, Any] = {}
    position = 0
    order = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    for name in order:
        tensor = tensors[name]
        if tensor.dtype not in names:
            raise MxloomError(f"{name}: a safetensors file cannot hold {tensor.dtype}.")
        end = position + tensor.numel() * tensor.dtype.itemsize
        header[name] = {"dtype": names[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            _write_bytes(file, tensors[name])


def _write_bytes(file: BinaryIO, tensor: Tensor) -> None:
    import torch

    if tensor.numel():
        file.write(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
