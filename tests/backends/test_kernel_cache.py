"""Where compiled kernels are kept, and what happens when the place is missing, spoilt, foreign or closed."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import mxloom
from mxloom.backends.kernels import native, object_cache
from mxloom.backends.kernels._prepared import Prepared
from mxloom.backends.kernels.block_function import BlockFunction, block_function
from mxloom.backends.kernels.fake_quantization import _prepare_named, prepare, why_not
from mxloom.backends.kernels.lowering import pieces_kernel
from mxloom.dialects import formats
from mxloom.dialects.formats import Rounding
from mxloom.dialects.formats._element import Fixed
from mxloom.dialects.instances import format_of

NUMBERS = BlockFunction(Fixed(8, 6), 32)
needs_native = pytest.mark.skipif(
    native.why_not() is not None, reason=f"{native.why_not()}; run on x86-64 or 64-bit Arm with llvmlite"
)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MXLOOM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "kernels"


def made() -> native.Kernel:
    """A kernel that rounds to multiples of 1/64, made anew; checked on one block of known values."""
    kernel = native.Kernel("multiples of 1/64", lambda: pieces_kernel(block_function(NUMBERS)))
    x = torch.arange(32) / 100.0
    found = torch.empty(32)
    kernel(x.data_ptr(), found.data_ptr(), 1)
    assert torch.equal(found, (x * 64).round() / 64)
    return kernel


@needs_native
def test_a_kernel_is_compiled_once_and_read_afterwards(place: Path) -> None:
    assert not made().from_cache
    (file,) = place.iterdir()
    assert made().from_cache
    assert [*place.iterdir()] == [file]


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def changed(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def emptied(file: Path) -> None:
    file.write_bytes(b"")


def open_to_all(file: Path) -> None:
    file.parent.chmod(0o777)


@needs_native
@pytest.mark.parametrize("spoil", [cut, changed, emptied, open_to_all])
def test_a_spoilt_file_or_a_folder_that_others_write_is_not_run(place: Path, spoil: Callable[[Path], None]) -> None:
    made()
    spoil(next(place.iterdir()))
    assert not made().from_cache


@needs_native
def test_a_folder_that_cannot_be_made_keeps_nothing(place: Path) -> None:
    place.parent.write_text("a file where the folder would be")
    assert not made().from_cache
    assert not made().from_cache
    assert place.parent.read_text() == "a file where the folder would be"


@needs_native
def test_an_empty_setting_keeps_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MXLOOM_CACHE", "")
    assert object_cache.folder() is None
    assert not made().from_cache


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"MXLOOM_CACHE": "/a"}, "/a/kernels"),
        ({"XDG_CACHE_HOME": "/b"}, "/b/mxloom/kernels"),
        ({"HOME": "/c"}, "/c/.cache/mxloom/kernels"),
    ],
)
def test_the_folder(variables: dict[str, str], expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MXLOOM_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert object_cache.folder() == Path(expected)


def test_what_decides_about_the_code_is_in_its_name() -> None:
    keys = {object_cache.key("ab", "c"), object_cache.key("a", "bc"), object_cache.key("ab", "c", "")}
    assert len(keys) == 3


@pytest.fixture
def forgotten() -> None:
    """Nothing prepared before."""
    prepare.cache_clear()
    _prepare_named.cache_clear()


@pytest.mark.usefixtures("forgotten")
def test_without_llvmlite_torch_does_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llvmlite.binding", None)
    x = torch.arange(64.0)
    fmt = format_of("mxfp4", rank=1)
    assert why_not(fmt, Rounding(), x.dtype, (64,)) == "llvmlite is not installed"
    assert torch.equal(mxloom.fake_quantize(x, "mxfp4"), formats.quantize(x, fmt))
    prepare.cache_clear()
    _prepare_named.cache_clear()


@pytest.mark.parametrize(
    ("triple", "features", "reason"),
    [
        ("x86_64-unknown-linux-gnu", {"sse4.1", "avx2"}, None),
        ("x86_64-unknown-linux-gnu", {"sse2"}, "the processor has no SSE4.1"),
        ("aarch64-unknown-linux-gnu", set(), None),
        ("riscv64-unknown-linux-gnu", set(), "no kernels for riscv64 processors"),
    ],
)
def test_processors(triple: str, features: set[str], reason: str | None) -> None:
    assert native._why_not_processor(triple, frozenset(features)) == reason


@needs_native
def test_a_forked_child_rounds_too() -> None:
    x = torch.arange(64.0)
    expected = mxloom.fake_quantize(x, "mxfp4")
    child = os.fork()
    if not child:
        os._exit(0 if torch.equal(mxloom.fake_quantize(x, "mxfp4"), expected) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@needs_native
def test_what_is_prepared_is_kept() -> None:
    fmt = format_of("mxfp4", rank=1)
    first = prepare(fmt, Rounding(), (64,), torch.float32)
    assert isinstance(first, Prepared)
    assert prepare(fmt, Rounding(), (64,), torch.float32) is first
