"""ONNX Runtime's MatMulNBits with int8 activations (accuracy_level 4), its fast path: blocks of 128, fp32 x and LoRA."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

from . import Forward, Peer, int4_groups

NAME = "ONNX Runtime"
BLOCK = 128


def peers(in_features: int, out_features: int) -> dict[str, Callable[[Tensor], Peer]]:
    if find_spec("onnxruntime") is None or find_spec("onnx") is None or in_features % BLOCK:
        return {}
    import onnx  # noqa: F401  what is broken says so here

    if _threads() != torch.get_num_threads():
        raise RuntimeError(f"its threads are a process's, here {_threads()}; time {torch.get_num_threads()} by a process of their own")
    return {"onnxruntime int4": _matmul_nbits}


@cache
def _threads() -> int:
    """Threads of the one pool that all sessions share (a pool for each of hundreds would spin beside its peers): torch's number at the first use."""
    import onnxruntime

    threads = torch.get_num_threads()
    onnxruntime.set_global_thread_pool_sizes(threads, 1)
    return threads


def _matmul_nbits(weight: Tensor) -> Peer:
    codes, scales = int4_groups(weight, BLOCK)
    packed = (codes[:, 0::2] | codes[:, 1::2] << 4).view(len(weight), -1, BLOCK // 2)

    def copy() -> Forward:
        return _Session(packed, scales, None)

    def with_lora(forward: Forward, down: Tensor, up: Tensor) -> Forward:  # in the graph
        return _Session(packed, scales, (down, up))

    return Peer(torch.float32, packed.nbytes + scales.nbytes, copy, with_lora)


class _Session:
    """One layer as a graph: x (rows, in) fp32 -> y (rows, out)."""

    def __init__(self, packed: Tensor, scales: Tensor, lora: tuple[Tensor, Tensor] | None) -> None:
        import onnxruntime
        from onnx import TensorProto, helper, numpy_helper

        self.out_features, in_features = len(packed), packed.shape[1] * BLOCK
        held = {"w": packed, "s": scales.flatten()}
        nodes = [helper.make_node("MatMulNBits", ["x", "w", "s"], ["y0"], domain="com.microsoft", K=in_features, N=self.out_features, bits=4,
                                  block_size=BLOCK, accuracy_level=4)]  # fmt: skip
        if lora is None:
            nodes.append(helper.make_node("Identity", ["y0"], ["y"]))
        else:
            held |= {"a": lora[0].t(), "b": lora[1].t()}
            nodes += [helper.make_node("MatMul", ["x", "a"], ["t"]), helper.make_node("MatMul", ["t", "b"], ["d"]),
                      helper.make_node("Add", ["y0", "d"], ["y"])]  # fmt: skip
        ends = [[helper.make_tensor_value_info(name, TensorProto.FLOAT, ["rows", size])] for name, size in (("x", in_features), ("y", self.out_features))]
        graph = helper.make_graph(nodes, "layer", *ends, [numpy_helper.from_array(t.contiguous().numpy(), name) for name, t in held.items()])
        opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
        options = onnxruntime.SessionOptions()
        options.use_per_session_threads = False
        model = helper.make_model(graph, opset_imports=opsets, ir_version=8).SerializeToString()
        self.session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        self.binding, self.x, self.y = self.session.io_binding(), None, None

    def __call__(self, x: Tensor) -> Tensor:
        if x is not self.x:
            import numpy

            self.x, self.y = x, torch.empty(len(x), self.out_features)
            self.binding.bind_input("x", "cpu", 0, numpy.float32, tuple(x.shape), x.data_ptr())
            self.binding.bind_output("y", "cpu", 0, numpy.float32, tuple(self.y.shape), self.y.data_ptr())
        self.session.run_with_iobinding(self.binding)
        return self.y
