"""Products of matrices by onnxruntime and llama.cpp, where they are installed, on one thread."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

Run = Callable[[], object]

PACKAGES = {
    "onnxruntime": ("pip install --requirement requirements/peers.txt", ("onnxruntime", "onnx")),
    "llama.cpp": (
        "pip install llama-cpp-python`, which builds it with a C++ compiler and `CMake",
        ("llama_cpp_python",),
    ),
}
"""How to get a peer, and the packages that it needs."""


def is_installed(peer: str) -> bool:
    """Whether a peer, the first word of the name, is there."""
    return all(_version(package) for package in PACKAGES[peer.partition(" ")[0]][1])


def missing() -> list[str]:
    """The peers that are not installed, each with how to install it."""
    return [f"{peer} (`{how}`)" for peer, (how, _) in PACKAGES.items() if not is_installed(peer)]


def installed() -> list[str]:
    """The packages of the peers that are there, with their versions."""
    return [f"{names[0]} {_version(names[0])}" for peer, (_, names) in PACKAGES.items() if is_installed(peer)]


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def onnxruntime_product(name: str, rows: int, size: int, columns: int, copies: int = 1) -> list[Run]:
    """An operator of com.microsoft: 4-bit weights in blocks of 32, the input rounded to int8 inside."""
    import numpy as np
    import onnx  # pyright: ignore[reportMissingImports]
    import onnxruntime  # pyright: ignore[reportMissingImports]
    from onnx import TensorProto, helper, numpy_helper  # pyright: ignore[reportMissingImports]

    draw = np.random.default_rng(0)
    codes = draw.integers(0, 256, (columns, size // 32, 16), dtype=np.uint8)
    scales = draw.random((columns, size // 32), dtype=np.float32)
    attributes = {"K": size, "N": columns, "bits": 4, "block_size": 32, "accuracy_level": 4}  # 4: int8
    node = helper.make_node(name, ["x", "codes", "scales"], ["y"], domain="com.microsoft", **attributes)
    graph = helper.make_graph(
        [node],
        "product",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [rows, size])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [rows, columns])],
        [numpy_helper.from_array(codes, "codes"), numpy_helper.from_array(scales.reshape(-1), "scales")],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    text = onnx.ModelProto.SerializeToString(helper.make_model(graph, opset_imports=opsets, ir_version=10))
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    x = draw.standard_normal((rows, size), dtype=np.float32)
    sessions = [onnxruntime.InferenceSession(text, options, ["CPUExecutionProvider"]) for _ in range(copies)]
    return [lambda own=own: own.run(None, {"x": x}) for own in sessions]


LLAMA_TYPES = {"f32": 0, "Q4_0": 2, "Q8_0": 8, "TQ2_0": 35, "MXFP4": 39}
"""Numbers of the types in ggml.h."""


def llama_product(type_: str, rows: int, size: int, columns: int, copies: int = 1) -> list[Run]:
    """ggml_mul_mat on weights of a type, laid out for the processor as llama.cpp does when it loads a model."""
    return [_LlamaProduct(_ggml(), LLAMA_TYPES[type_], rows, size, columns).run for _ in range(copies)]


class _InitParameters(ctypes.Structure):
    _fields_ = (("mem_size", ctypes.c_size_t), ("mem_buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool))


class _Ggml:
    """The functions of ggml that one product needs, from the libraries that llama-cpp-python has built."""

    def __init__(self) -> None:
        spec = find_spec("llama_cpp")
        assert spec is not None
        assert spec.submodule_search_locations
        folder = Path(spec.submodule_search_locations[0]) / "lib"
        self._libraries = [
            ctypes.CDLL(str(folder / f"lib{name}.so"), mode=ctypes.RTLD_GLOBAL) for name in ("ggml-base", "ggml-cpu")
        ]
        pointer = ctypes.c_void_p
        self._log = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, pointer)(lambda *message: None)
        self._function("ggml_log_set", None, type(self._log), pointer)(self._log, None)
        self.init = self._function("ggml_init", pointer, _InitParameters)
        self.tensor = self._function("ggml_new_tensor_2d", pointer, pointer, ctypes.c_int, *[ctypes.c_int64] * 2)
        self.product = self._function("ggml_mul_mat", pointer, *[pointer] * 3)
        self.graph = self._function("ggml_new_graph", pointer, pointer)
        self.expand = self._function("ggml_build_forward_expand", None, pointer, pointer)
        self.allocate = self._function("ggml_backend_alloc_ctx_tensors_from_buft", pointer, pointer, pointer)
        self.set = self._function("ggml_backend_tensor_set", None, pointer, pointer, *[ctypes.c_size_t] * 2)
        self.bytes_of = self._function("ggml_nbytes", ctypes.c_size_t, pointer)
        self.quantize = self._function(
            "ggml_quantize_chunk", ctypes.c_size_t, ctypes.c_int, pointer, pointer, *[ctypes.c_int64] * 3, pointer
        )
        self.compute = self._function("ggml_backend_graph_compute", ctypes.c_int, pointer, pointer)
        self.supports = self._function("ggml_backend_supports_op", ctypes.c_bool, pointer, pointer)
        self.plain = self._function("ggml_backend_cpu_buffer_type", pointer)()
        self.backend = self._function("ggml_backend_cpu_init", pointer)()
        self._function("ggml_backend_cpu_set_n_threads", None, pointer, ctypes.c_int)(self.backend, 1)
        self.layouts = [*self._extra_layouts(), self.plain]

    def _function(self, name: str, result: Any, *arguments: Any) -> Any:
        library = next(each for each in self._libraries if hasattr(each, name))
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
        return function

    def _extra_layouts(self) -> list[int]:
        """The kinds of memory that keep weights in an order of their own."""
        pointer = ctypes.c_void_p
        registry = self._function("ggml_backend_cpu_reg", pointer)()
        device = self._function("ggml_backend_reg_dev_get", pointer, pointer, ctypes.c_size_t)(registry, 0)
        lookup = self._function("ggml_backend_reg_get_proc_address", pointer, pointer, ctypes.c_char_p)
        address = lookup(registry, b"ggml_backend_dev_get_extra_bufts")
        if not address:
            return []
        kinds = ctypes.CFUNCTYPE(ctypes.POINTER(pointer), pointer)(address)(device)
        found: list[int] = []
        while kinds[len(found)]:
            found.append(kinds[len(found)])
        return found


@cache
def _ggml() -> _Ggml:
    return _Ggml()


class _LlamaProduct:
    def __init__(self, ggml: _Ggml, type_: int, rows: int, size: int, columns: int) -> None:
        self._ggml = ggml
        weights, x = next(
            found for layout in ggml.layouts if (found := self._laid_out(layout, type_, rows, size, columns))
        )
        source, values = torch.randn(columns, size), torch.randn(rows, size)
        count = ggml.bytes_of(weights)
        quantized = ctypes.create_string_buffer(count)
        ggml.quantize(type_, source.data_ptr(), quantized, 0, columns, size, None)
        ggml.set(weights, quantized, 0, count)
        ggml.set(x, values.data_ptr(), 0, values.nbytes)

    def _laid_out(self, layout: int, type_: int, rows: int, size: int, columns: int) -> tuple[int, int] | None:
        """The weights in a kind of memory, and the input; None where the product does not work on them there."""
        ggml = self._ggml
        own, other = (ggml.init(_InitParameters(1 << 20, None, True)) for _ in range(2))
        weights, x = ggml.tensor(own, type_, size, columns), ggml.tensor(other, LLAMA_TYPES["f32"], size, rows)
        result = ggml.product(other, weights, x)
        self._graph = ggml.graph(other)
        ggml.expand(self._graph, result)
        held = ggml.allocate(own, layout) and ggml.allocate(other, ggml.plain)
        return (weights, x) if held and ggml.supports(ggml.backend, result) else None

    def run(self) -> None:
        """The product, once."""
        if self._ggml.compute(self._ggml.backend, self._graph):
            raise RuntimeError("ggml did not compute the product")


PRODUCTS = {"onnxruntime": onnxruntime_product, "llama.cpp": llama_product, "llama.cpp MXFP4": llama_product}
"""Of each peer: (type, rows, size, columns, copies) to a run for each copy of the weights."""
