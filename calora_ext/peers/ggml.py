"""llama.cpp's matrix product, by the ggml library that llama-cpp-python installs, in the order of bytes that llama.cpp itself loads weights in.

Only functions of ggml's public headers that take and return pointers and numbers are called (ggml.h, ggml-backend.h); llama.cpp is not imported.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable
from ctypes import c_bool, c_char_p, c_int, c_int64, c_size_t, c_void_p
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import CaloraError
from . import Forward, Peer

NAME = "llama.cpp"
F32, F16 = 0, 1  # enum ggml_type
TYPES = {"Q4_0": (2, 32), "Q4_K": (12, 256), "Q8_0": (8, 32)}  # its number, and columns in a block
CPU = 0  # enum ggml_backend_dev_type


def peers(in_features: int, out_features: int) -> dict[str, Callable[[Tensor], Peer]]:
    if _path() is None:
        return {}
    _cpu()
    return {f"llama.cpp {name}": partial(_peer, number) for name, (number, block) in TYPES.items() if in_features % block == 0}


def _path() -> Path | None:
    spec = find_spec("llama_cpp")
    found = () if spec is None or spec.origin is None else sorted((Path(spec.origin).parent / "lib").glob("*ggml.*"))
    return next((path for path in found if path.suffix in (".so", ".dylib", ".dll")), None)


class _Parameters(ctypes.Structure):  # struct ggml_init_params
    _fields_ = (("mem_size", c_size_t), ("mem_buffer", c_void_p), ("no_alloc", c_bool))


_say_nothing = ctypes.CFUNCTYPE(None, c_int, c_char_p, c_void_p)(lambda level, text, data: None)


@cache
def _library() -> ctypes.CDLL:
    """ggml, its functions declared. Raises OSError or AttributeError if it is not what this file knows."""
    library = ctypes.CDLL(str(_path()), mode=ctypes.RTLD_GLOBAL)
    for name, result, *arguments in (
        ("ggml_log_set", None, c_void_p, c_void_p),
        ("ggml_init", c_void_p, _Parameters),
        ("ggml_free", None, c_void_p),
        ("ggml_row_size", c_size_t, c_int, c_int64),
        ("ggml_quantize_chunk", c_size_t, c_int, c_void_p, c_void_p, c_int64, c_int64, c_int64, c_void_p),
        ("ggml_new_tensor_2d", c_void_p, c_void_p, c_int, c_int64, c_int64),
        ("ggml_mul_mat", c_void_p, c_void_p, c_void_p, c_void_p),
        ("ggml_add", c_void_p, c_void_p, c_void_p, c_void_p),
        ("ggml_new_graph", c_void_p, c_void_p),
        ("ggml_build_forward_expand", None, c_void_p, c_void_p),
        ("ggml_get_data", c_void_p, c_void_p),
        ("ggml_backend_dev_by_type", c_void_p, c_int),
        ("ggml_backend_dev_init", c_void_p, c_void_p, c_char_p),
        ("ggml_backend_dev_backend_reg", c_void_p, c_void_p),
        ("ggml_backend_dev_buffer_type", c_void_p, c_void_p),
        ("ggml_backend_dev_supports_op", c_bool, c_void_p, c_void_p),
        ("ggml_backend_reg_get_proc_address", c_void_p, c_void_p, c_char_p),
        ("ggml_backend_alloc_ctx_tensors_from_buft", c_void_p, c_void_p, c_void_p),
        ("ggml_backend_buffer_free", None, c_void_p),
        ("ggml_backend_tensor_set", None, c_void_p, c_void_p, c_size_t, c_size_t),
        ("ggml_backend_graph_compute", c_int, c_void_p, c_void_p),
    ):
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    library.ggml_log_set(_say_nothing, None)  # it has a line for every weight
    return library


class _Cpu(NamedTuple):
    """device, backend: its handles. buffer_types: for weights, those that put them in another order first. set_threads(backend, number)."""

    device: int
    backend: int
    buffer_types: list[int]
    set_threads: Callable[[int, int], None]


@cache
def _cpu() -> _Cpu:
    g = _library()
    device = g.ggml_backend_dev_by_type(CPU)
    if not device:
        raise OSError("its library has no CPU device")
    registry = g.ggml_backend_dev_backend_reg(device)
    address = partial(g.ggml_backend_reg_get_proc_address, registry)
    set_threads = ctypes.CFUNCTYPE(None, c_void_p, c_int)(address(b"ggml_backend_set_n_threads"))
    types = []
    if extra := address(b"ggml_backend_dev_get_extra_bufts"):
        listed = ctypes.CFUNCTYPE(ctypes.POINTER(c_void_p), c_void_p)(extra)(device)
        while listed and listed[len(types)]:  # ends with a null
            types.append(listed[len(types)])
    return _Cpu(device, g.ggml_backend_dev_init(device, None), [*types, g.ggml_backend_dev_buffer_type(device)], set_threads)


class _Context:
    """Tensors, and the buffers that hold them, until the owner is gone."""

    def __init__(self, owner: object) -> None:
        self.handle = _library().ggml_init(_Parameters(1 << 20, None, True))
        self.buffers: list[int] = []
        weakref.finalize(owner, _release, self.handle, self.buffers)

    def tensor(self, number: int, columns: int, rows: int) -> int:
        return _library().ggml_new_tensor_2d(self.handle, number, columns, rows)

    def allocate(self, buffer_type: int) -> None:
        """Memory for every tensor that has none."""
        buffer = _library().ggml_backend_alloc_ctx_tensors_from_buft(self.handle, buffer_type)
        if not buffer:
            raise CaloraError("llama.cpp could not allocate a layer; time smaller shapes, or without it")
        self.buffers.append(buffer)


def _release(context: int, buffers: list[int]) -> None:
    for buffer in buffers:
        _library().ggml_backend_buffer_free(buffer)
    _library().ggml_free(context)


def _set(tensor: int, value: Tensor) -> None:
    value = value.contiguous()
    _library().ggml_backend_tensor_set(tensor, value.data_ptr(), 0, value.nbytes)


class _Weight:
    """A quantised weight, in the first of the orders that has a kernel for it, as llama.cpp chooses."""

    def __init__(self, number: int, data: Tensor, in_features: int, out_features: int) -> None:
        g, cpu = _library(), _cpu()
        self.shape = out_features, in_features
        for buffer_type in cpu.buffer_types:
            context = _Context(self)
            self.tensor = context.tensor(number, in_features, out_features)
            context.allocate(buffer_type)
            if g.ggml_backend_dev_supports_op(cpu.device, g.ggml_mul_mat(context.handle, self.tensor, context.tensor(F32, in_features, 1))):
                break
        _set(self.tensor, data)


class _Graph:
    """x (rows, in) fp32 -> y (rows, out), with a LoRA in the graph or without one."""

    def __init__(self, weight: _Weight, lora: tuple[Tensor, Tensor] | None) -> None:
        self.weight, self.lora, self.threads, self.x = weight, lora, torch.get_num_threads(), None

    def build(self, rows: int) -> None:
        g, context = _library(), _Context(self)
        out_features, in_features = self.weight.shape
        self.input = context.tensor(F32, in_features, rows)
        y = g.ggml_mul_mat(context.handle, self.weight.tensor, self.input)
        factors = []
        if self.lora:
            factors = [context.tensor(F16, *value.shape[::-1]) for value in self.lora]
            t = g.ggml_mul_mat(context.handle, factors[0], self.input)
            y = g.ggml_add(context.handle, y, g.ggml_mul_mat(context.handle, factors[1], t))
        self.graph = g.ggml_new_graph(context.handle)
        g.ggml_build_forward_expand(self.graph, y)
        context.allocate(_cpu().buffer_types[-1])
        for tensor, value in zip(factors, self.lora or (), strict=True):
            _set(tensor, value.half())
        view = (ctypes.c_float * (rows * out_features)).from_address(g.ggml_get_data(y))
        self.y = torch.frombuffer(view, dtype=torch.float32).view(rows, out_features)

    def __call__(self, x: Tensor) -> Tensor:
        g, cpu = _library(), _cpu()
        if x is not self.x:
            if self.x is None or len(x) != len(self.x):
                self.build(len(x))
            _set(self.input, x)
            self.x = x
            cpu.set_threads(cpu.backend, self.threads)  # of the shared backend: graphs of other numbers do not take turns with this one
        g.ggml_backend_graph_compute(cpu.backend, self.graph)
        return self.y


def _peer(number: int, weight: Tensor) -> Peer:
    out_features, in_features = weight.shape
    g = _library()
    data = torch.empty(out_features * g.ggml_row_size(number, in_features), dtype=torch.uint8)
    weight = weight.contiguous()
    g.ggml_quantize_chunk(number, weight.data_ptr(), data.data_ptr(), 0, out_features, in_features, None)

    def copy() -> Forward:
        return _Graph(_Weight(number, data, in_features, out_features), None)

    def with_lora(forward: _Graph, down: Tensor, up: Tensor) -> Forward:
        return _Graph(forward.weight, (down, up))

    return Peer(torch.float32, data.nbytes, copy, with_lora)
