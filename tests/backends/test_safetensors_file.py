"""Safetensors files: equal to the safetensors library where they are sound, one clear error where they are not."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from mxloom.backends.safetensors_file import SafetensorsFile, write_safetensors
from mxloom.dialects.errors import MxloomError

DTYPES = (
    *(torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64),
    *(torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e8m0fnu),
)


def random_bytes(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    """Any bit pattern of the dtype, NaN among them."""
    raw = torch.randint(0, 2 if dtype == torch.bool else 256, (*shape, dtype.itemsize), dtype=torch.uint8)
    return raw.view(dtype).reshape(shape)


def same_bytes(one: torch.Tensor, other: torch.Tensor) -> bool:
    return (
        one.dtype == other.dtype
        and one.shape == other.shape
        and (one.numel() == 0 or one.reshape(-1).view(torch.uint8).equal(other.reshape(-1).view(torch.uint8)))
    )


def some_tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    tensors = {str(dtype): random_bytes(dtype, 3, 5) for dtype in DTYPES}
    return tensors | {
        "scalar": torch.tensor(2.5),
        "empty": torch.empty(0, 4),
        "flat": torch.arange(7, dtype=torch.int8),
    }


def test_reads_what_the_library_writes(tmp_path: Path) -> None:
    tensors = some_tensors()
    save_file(tensors, tmp_path / "a.safetensors", metadata={"format": "pt"})
    file = SafetensorsFile(tmp_path / "a.safetensors")
    assert file.metadata == {"format": "pt"}
    assert set(file) == set(tensors)
    for name, tensor in tensors.items():
        assert same_bytes(file[name], tensor), name
        assert file.entries[name].bits == 8 * tensor.nbytes


def test_the_library_reads_what_is_written(tmp_path: Path) -> None:
    tensors = some_tensors()
    write_safetensors(tmp_path / "a.safetensors", tensors)
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        assert set(file.keys()) == set(tensors)
        for name, tensor in tensors.items():
            assert same_bytes(file.get_tensor(name), tensor), name


def test_written_bytes_do_not_hang_on_the_order_of_names(tmp_path: Path) -> None:
    tensors = some_tensors()
    write_safetensors(tmp_path / "a", tensors)
    write_safetensors(tmp_path / "b", dict(reversed(tensors.items())))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_what_is_not_contiguous_is_written_as_it_reads(tmp_path: Path) -> None:
    tensor = torch.arange(12.0).reshape(3, 4).T
    write_safetensors(tmp_path / "a", {"x": tensor})
    assert SafetensorsFile(tmp_path / "a")["x"].equal(tensor)


def test_a_dtype_that_no_file_holds_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MxloomError, match=r"^x: a safetensors file cannot hold torch\.complex128"):
        write_safetensors(tmp_path / "a", {"x": torch.zeros(2, dtype=torch.complex128)})


def test_writing_to_a_tensor_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "a", {"x": torch.ones(4)})
    SafetensorsFile(tmp_path / "a")["x"].zero_()
    assert SafetensorsFile(tmp_path / "a")["x"].equal(torch.ones(4))


def test_tensors_that_are_not_aligned_are_read(tmp_path: Path) -> None:
    header = {
        "a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]},
        "b": {"dtype": "F32", "shape": [2], "data_offsets": [1, 9]},
    }
    values = torch.tensor([1.5, -2.0])
    path = write(tmp_path, header, b"\x07" + values.numpy().tobytes())
    assert SafetensorsFile(path)["b"].equal(values)


def write(folder: Path, header: Any, data: bytes = b"", length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path = folder / "x.safetensors"
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return path


def entry(begin: int, end: int, dtype: str = "F32", shape: list[Any] | None = None) -> dict[str, Any]:
    return {"dtype": dtype, "shape": [(end - begin) // 4] if shape is None else shape, "data_offsets": [begin, end]}


TWICE = b'{"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
INNER = b'{"w":{"dtype":"F32","dtype":"I32","shape":[1],"data_offsets":[0,4]}}'

HOSTILE: dict[str, tuple[Any, bytes, str]] = {
    "same range": ({"a": entry(0, 64), "b": entry(0, 64)}, bytes(64), r"tensor 'b' overlaps tensor 'a'"),
    "overlap": ({"a": entry(0, 64), "b": entry(32, 96)}, bytes(96), r"tensor 'b' overlaps tensor 'a' \(byte 32"),
    "hole": ({"a": entry(0, 64), "b": entry(80, 144)}, bytes(144), r"hole of 16 bytes .* tensor 'a' and tensor 'b'"),
    "hole at the start": ({"a": entry(4, 8)}, bytes(8), r"hole of 4 bytes .* the header and tensor 'a'"),
    "trailing bytes": ({"a": entry(0, 64)}, bytes(72), r"8 bytes follow tensor 'a'"),
    "nothing but trailing bytes": ({}, bytes(8), r"8 bytes follow the header"),
    "beyond the file": ({"a": entry(0, 64)}, bytes(60), r"tensor 'a' ends at byte 64; the file has 60 data bytes"),
    "end before begin": ({"a": entry(64, 0, shape=[16])}, bytes(64), r"tensor 'a' ends at byte 0, before it begins"),
    "range and shape": ({"a": entry(0, 64, shape=[15])}, bytes(64), r"tensor 'a' has a range of 64 bytes; .* needs 60"),
    "negative size": ({"a": entry(0, 64, shape=[-16])}, bytes(64), r"tensor 'a' has the shape \[-16\]"),
    "sizes that cancel": ({"a": entry(0, 64, shape=[-4, -4])}, bytes(64), r"tensor 'a' has the shape"),
    "overflow": ({"a": entry(0, 0, shape=[2**32, 2**32])}, b"", r"tensor 'a' has a range of 0 bytes"),
    "size of 2^64": ({"a": entry(0, 0, shape=[2**64])}, b"", r"tensor 'a' has the shape"),
    "fraction": ({"a": entry(0, 64, shape=[16.0])}, bytes(64), r"tensor 'a' has the shape"),
    "true as size": ({"a": entry(0, 4, shape=[True])}, bytes(4), r"tensor 'a' has the shape"),
    "shape is no list": ({"a": entry(0, 64) | {"shape": "16"}}, bytes(64), r"tensor 'a' has the shape '16'"),
    "three offsets": ({"a": entry(0, 64) | {"data_offsets": [0, 64, 64]}}, bytes(64), r"tensor 'a' has the range"),
    "negative offset": ({"a": entry(0, 64) | {"data_offsets": [-64, 0]}}, bytes(64), r"tensor 'a' has the range"),
    "unknown dtype": ({"a": entry(0, 64, "F6_E9M9")}, bytes(64), r"tensor 'a' has the dtype 'F6_E9M9', .* not read"),
    "dtype is no string": ({"a": entry(0, 64) | {"dtype": ["F32"]}}, bytes(64), r"tensor 'a' has the dtype \['F32'\]"),
    "field missing": ({"a": {"dtype": "F32", "shape": [1]}}, bytes(4), r"tensor 'a' must have exactly"),
    "entry is a list": ({"a": [1]}, b"", r"tensor 'a' must have exactly"),
    "key twice": (TWICE, bytes(4), r"the key 'w' comes twice"),
    "key twice inside": (INNER, bytes(4), r"the key 'dtype' comes twice"),
    "header is a list": ([], b"", r"must be a JSON object"),
    "header is no JSON": (b'{"a":', b"", r"its header is not JSON"),
    "header is no UTF-8": (b'{"\xff":1}', b"", r"its header is not JSON"),
    "NaN": (b'{"a":NaN}', b"", r"NaN is not JSON"),
    "deep": (b'{"a":' + b"[" * 100_000, b"", r"its header is not JSON"),
    "metadata is no object": ({"__metadata__": 1}, b"", r'"__metadata__" must map'),
    "metadata holds numbers": ({"__metadata__": {"a": 1}}, b"", r'"__metadata__" must map'),
    "absolute name": ({"/etc/x": entry(0, 4)}, bytes(4), r"tensor name '/etc/x' is empty, absolute or leads out"),
    "drive": ({"C:\\x": entry(0, 4)}, bytes(4), r"tensor name .* leads out"),
    "name that climbs": ({"../../x": entry(0, 4)}, bytes(4), r"tensor name '../../x' .* leads out"),
    "name that climbs inside": ({"a\\..\\x": entry(0, 4)}, bytes(4), r"tensor name .* leads out"),
    "empty name": ({"": entry(0, 4)}, bytes(4), r"tensor name '' is empty"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_file_is_one_clear_error(case: str, tmp_path: Path) -> None:
    header, data, message = HOSTILE[case]
    path = write(tmp_path, header, data)
    refuses(path, message)


@pytest.mark.parametrize("length", [2**63, 2**64 - 1, 1000])
def test_header_longer_than_the_file(length: int, tmp_path: Path) -> None:
    refuses(write(tmp_path, {}, length=length), rf"its header should take {length} bytes, the file has 2")


def test_header_longer_than_is_read(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    with path.open("wb") as file:
        file.write((2**34).to_bytes(8, "little"))
        file.truncate(2**35)  # sparse: takes no room
    refuses(path, "at most 20000000 are read")


def test_header_of_nothing_but_lists(tmp_path: Path) -> None:
    refuses(write(tmp_path, b'{"a":[' + b"[]," * 2_100_000 + b"[]]}"), "more than 2000000 lists and objects")


@pytest.mark.parametrize("size", [0, 5])
def test_file_without_a_header(size: int, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(bytes(size))
    refuses(path, rf"it has {size} bytes and must begin with 8")


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(MxloomError, match=r"nowhere: cannot be read \(No such file"):
        SafetensorsFile(tmp_path / "nowhere")


def test_a_hundred_thousand_tensors(tmp_path: Path) -> None:
    header = {f"model.layers.{i}.mlp.experts.weight": entry(4 * i, 4 * i + 4) for i in range(100_000)}
    path = write(tmp_path, header, bytes(400_000))
    assert len(SafetensorsFile(path)) == 100_000  # a fraction of a second; a quadratic check takes minutes


def refuses(path: Path, message: str) -> None:
    """The error names the file and says what is wrong, within 200 MB."""
    tracemalloc.start()
    with pytest.raises(MxloomError, match=message) as error:
        SafetensorsFile(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert str(path) in str(error.value)
    assert error.value.exit_status == 1
    assert peak < 200e6
