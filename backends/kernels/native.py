"""Native code for the processor at hand: llvm dialect, LLVM IR, object code in the cache, a function to call."""

from __future__ import annotations

import ctypes
import hashlib
import threading
from collections.abc import Callable
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import object_cache

if TYPE_CHECKING:
    from xdsl.dialects.builtin import ModuleOp

_LOCK = threading.Lock()

STREAMED = 64
"""The alignment, in bytes, of results that are stored past the caches; no other store has it."""


def why_not() -> str | None:
    """Why no native code can be made here; None where it can."""
    try:
        import llvmlite.binding as llvm
    except ImportError:
        return "llvmlite is not installed"
    return _why_not_processor(llvm.get_process_triple(), features())


def _why_not_processor(triple: str, has: frozenset[str]) -> str | None:
    architecture = triple.partition("-")[0]
    if architecture in ("x86_64", "amd64"):
        # Without SSE4.1 rounding to whole numbers is a call into a library that an engine does not find.
        return None if "sse4.1" in has else "the processor has no SSE4.1"
    return None if architecture in ("aarch64", "arm64") else f"no kernels for {architecture} processors"


@cache
def can_stream() -> bool:
    """Whether stores of a vector can go past the caches."""
    import llvmlite.binding as llvm

    return llvm.get_process_triple().startswith(("x86_64", "amd64"))


@cache
def features() -> frozenset[str]:
    """The instruction sets of the processor, by LLVM's names."""
    import llvmlite.binding as llvm

    return frozenset(name for name, has in llvm.get_host_cpu_features().items() if has)


def _machine() -> Any:
    """A new one for each engine: an engine owns its machine, and frees it when it goes."""
    import llvmlite.binding as llvm

    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    return llvm.Target.from_default_triple().create_target_machine(
        cpu=llvm.get_host_cpu_name(), features=_feature_string(), opt=2, jit=True
    )


@cache
def _feature_string() -> str:
    import llvmlite.binding as llvm

    return llvm.get_host_cpu_features().flatten()


def llvm_text(module: ModuleOp) -> str:
    """The LLVM IR of a module in the llvm dialect; stores aligned to `STREAMED` bytes go past the caches."""
    from llvmlite import ir
    from xdsl.backend.llvm.convert import convert_module

    converted = convert_module(module, fallback_target_triple=None)
    blocks = (block for function in converted.functions for block in function.blocks)
    for instruction in (one for block in blocks for one in block.instructions):
        if isinstance(instruction, ir.StoreInstr) and getattr(instruction, "align", None) == STREAMED:
            once = converted.add_metadata([ir.Constant(ir.IntType(32), 1)])
            instruction.set_metadata("nontemporal", once)  # xDSL has no word for it
    return str(converted)


class Kernel:
    """A native function `i32 (source, target, first, end, given, over, length)` on blocks of contiguous f32."""

    def __init__(self, identity: str, make: Callable[[], ModuleOp]) -> None:
        """A kernel whose code `make()` describes as its function `kernel`; `identity` tells it from all others."""
        self._engine, self.from_cache = compiled(identity, make, TASK if team() else "")
        self._function = _PROTOTYPE(self._engine.get_function_address("kernel"))
        self._task = self._engine.get_function_address("task") if team() else 0

    def __call__(
        self,
        source: int,
        target: int,
        blocks: int,
        *,
        given: int = 0,
        over: float = 1.0,
        length: int = 0,
        threads: int = 1,
    ) -> int:
        """Run on the first `blocks` blocks behind two addresses; the bits of the largest magnitude that was seen."""
        if threads == 1 or not self._task:
            return self._function(source, target, 0, blocks, given, over, length)
        seen = (ctypes.c_int32 * threads)()
        arguments = _Arguments(source, target, blocks, length, given, over, ctypes.addressof(seen))
        team()(self._task, ctypes.addressof(arguments), threads, 0)
        return max(seen)


def compiled(identity: str, make: Callable[[], ModuleOp], task: str = "") -> tuple[Any, bool]:
    """An engine that holds the functions of a kernel, and whether their code came from the cache.

    `task` is LLVM IR beside that of the module: what a thread of a team runs. The name of the code in the cache comes
    from what decides about the code, so that a kept kernel is found without its IR.
    """
    import llvmlite
    import llvmlite.binding as llvm

    with _LOCK:
        processor = (llvm.get_process_triple(), llvm.get_host_cpu_name(), _feature_string())
        versions = (_sources(), version("xdsl"), llvmlite.__version__, ".".join(map(str, llvm.llvm_version_info)))
        name = object_cache.key(identity, task, *processor, *versions)
        kept = object_cache.read(name)
        code = kept
        if code is None:
            text = llvm_text(make()) + task
            code = _machine().emit_object(llvm.parse_assembly(text))
            object_cache.write(name, code)
        engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), _machine())
        engine.add_object_file(llvm.ObjectFileRef.from_data(code))
        engine.finalize_object()
        return engine, kept is not None


@cache
def _sources() -> str:
    """A digest of the code that kernels and the numbers of formats come from: changed code makes other kernels."""
    here = Path(__file__).parent
    files = sorted(here.rglob("*.py")) + sorted((here.parents[1] / "dialects" / "formats").glob("*.py"))
    return hashlib.sha256(b"\0".join(file.read_bytes() for file in files)).hexdigest()


_PROTOTYPE = ctypes.CFUNCTYPE(
    ctypes.c_int32,
    ctypes.c_void_p,
    ctypes.c_void_p,
    ctypes.c_int64,
    ctypes.c_int64,
    ctypes.c_int32,
    ctypes.c_float,
    ctypes.c_int64,
)


class _Arguments(ctypes.Structure):
    """What `task` reads: the kernel's arguments but for the range of blocks, which each thread finds for itself."""

    _fields_ = (
        ("source", ctypes.c_void_p),
        ("target", ctypes.c_void_p),
        ("blocks", ctypes.c_int64),
        ("length", ctypes.c_int64),
        ("given", ctypes.c_int32),
        ("over", ctypes.c_float),
        ("seen", ctypes.c_void_p),
    )


TASK = """
declare i32 @omp_get_thread_num()
declare i32 @omp_get_num_threads()
%Arguments = type { ptr, ptr, i64, i64, i32, float, ptr }

define void @task(ptr %arguments) {
  %all = load %Arguments, ptr %arguments
  %source = extractvalue %Arguments %all, 0
  %target = extractvalue %Arguments %all, 1
  %blocks = extractvalue %Arguments %all, 2
  %length = extractvalue %Arguments %all, 3
  %given = extractvalue %Arguments %all, 4
  %over = extractvalue %Arguments %all, 5
  %seen = extractvalue %Arguments %all, 6
  %thread = call i32 @omp_get_thread_num()
  %threads = call i32 @omp_get_num_threads()
  %own = zext i32 %thread to i64
  %count = zext i32 %threads to i64
  %next = add i64 %own, 1
  %before = mul i64 %blocks, %own
  %behind = mul i64 %blocks, %next
  %first = udiv i64 %before, %count
  %end = udiv i64 %behind, %count
  %largest = call i32 @kernel(ptr %source, ptr %target, i64 %first, i64 %end, i32 %given, float %over, i64 %length)
  %place = getelementptr i32, ptr %seen, i64 %own
  store i32 %largest, ptr %place
  ret void
}
"""
"""What a thread of torch's OpenMP team runs: the kernel on its share of the blocks."""


@cache
def team() -> Any:
    """GOMP_parallel of the OpenMP library that torch has loaded, so that its threads are shared; None without one."""
    import llvmlite.binding as llvm
    import torch

    place = Path(torch.__file__).parent / "lib" / "libgomp.so.1"
    try:
        library = ctypes.CDLL(str(place)) if place.exists() else None
    except OSError:
        library = None
    if library is None:
        return None
    for name in ("omp_get_thread_num", "omp_get_num_threads"):
        llvm.add_symbol(name, ctypes.cast(getattr(library, name), ctypes.c_void_p).value)
    team = library.GOMP_parallel
    team.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
    team.restype = None
    return team
