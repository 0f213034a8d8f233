"""The rows of a group: this package's formats, and what a user could run instead, with and without a LoRA.

Only sizes matter to speed, so peers get random weights; every row's output is checked for shape and finiteness once.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator

import torch
from _bench import Case, Group
from torch import Tensor
from torch.nn.functional import linear

from calora_ext import WeightFormat, ops
from calora_ext.bench import installed
from calora_ext.measure import copies_for

RANK = 16
SCALE = 2.0


def cases(group: Group) -> dict[str, Case]:
    rows: dict[str, Case] = {}
    builders = [calora, others]
    if group.isa.startswith("avx512"):  # cannot be capped to AVX2
        builders += [onnxruntime_int4]
    for build in builders:
        try:
            rows |= build(group)
        except ImportError as missing:
            print(f"left out: {build.__name__} ({missing})", file=sys.stderr)
    for name, row in rows.items():
        y = row.call(0)
        y = y if isinstance(y, Tensor) else torch.from_numpy(y.numpy())
        if y.shape != (group.m, group.out_features) or not torch.isfinite(y).all():
            raise RuntimeError(f"row {name} computed {tuple(y.shape)} or values that are not finite")
    return rows


def lora_nbytes(group: Group, rank: int = RANK) -> int:
    return 2 * rank * (group.in_features + group.out_features)


def lora_factors(group: Group, copies: int, rank: int = RANK, dtype=torch.bfloat16) -> list[tuple[Tensor, Tensor]]:
    """(A, B) of each copy: (rank, in) and (out, rank)."""
    return [((torch.randn(rank, group.in_features) / group.in_features**0.5).to(dtype), torch.randn(group.out_features, rank).to(dtype))
            for _ in range(copies)]  # fmt: skip


def with_lora(group: Group, name: str, nbytes: int, copies: int, base: Callable[[int], Tensor], x: Tensor) -> dict[str, Case]:
    """A row, and the same one with a LoRA beside it as PEFT computes it."""
    factors = lora_factors(group, copies)
    x16 = x.bfloat16()

    def adapted(i: int) -> Tensor:
        a, b = factors[i]
        y = base(i)
        return y + (linear(linear(x16, a), b) * SCALE).to(y.dtype)

    return {
        name: Case(nbytes, copies, base),
        f"{name} + LoRA r{RANK}": Case(nbytes + lora_nbytes(group), copies, adapted),
    }


# ---- this package -----------------------------------------------------------------------------------------------------


def calora(group: Group) -> dict[str, Case]:
    rows: dict[str, Case] = {}
    decode = group.m <= 8
    for fmt in (WeightFormat("int4", 128), WeightFormat("int4", 64), WeightFormat("nf4", 64), WeightFormat("int8"), WeightFormat("bf16")):
        name = f"calora {fmt.values}" + (f" g{fmt.group_size}" if fmt.group_size > 0 else "")
        banks = [(0, 0), (RANK, RANK)]  # (rank, identity rank)
        if fmt.values == "int4" and decode:
            banks += [(2 * RANK, RANK), (64, 64)]
        if fmt.values in ("int8", "bf16"):
            banks = banks[:1]
        rows |= dict(calora_rows(group, name, fmt, banks, "int8", torch.bfloat16))
        if fmt.values == "int4" and fmt.group_size == 128:
            rows |= dict(calora_rows(group, f"{name} exact bf16", fmt, banks[:1], "exact", torch.bfloat16))
            rows |= dict(calora_rows(group, f"{name} exact fp32", fmt, banks[:1], "exact", torch.float32))
    return rows


def calora_rows(group: Group, name: str, fmt: WeightFormat, banks, activations: str, dtype) -> Iterator[tuple[str, Case]]:
    k, n = group.in_features, group.out_features
    nbytes = fmt.nbytes(k, n)
    copies = copies_for(nbytes)
    first = fmt.pack(torch.randn(n, k) / k**0.5)
    packed = [[t.clone() for t in first.values()] for _ in range(copies)]
    x = torch.randn(group.m, k).to(dtype)
    for rank, identity in banks:
        factors = [(a, ops.tile_up(b)) for a, b in lora_factors(group, copies, rank)] if rank else [(None, None)] * copies

        def call(i: int, factors=factors, identity=identity) -> Tensor:
            down, up = factors[i]
            return ops.linear(x, packed[i], fmt, k, n, None, down, up, identity, activations)

        label = {0: name, RANK: f"{name} + LoRA r{RANK}", 2 * RANK: f"{name} + LoRA r{RANK} + recovery r{RANK}"}
        yield label.get(rank, f"{name} + LoRA r{rank}"), Case(nbytes + (lora_nbytes(group, rank) if rank else 0), copies, call)


# ---- peers ------------------------------------------------------------------------------------------------------------


def others(group: Group) -> dict[str, Case]:
    """The peers of ``calora bench``. bitsandbytes cannot be capped to AVX2, so it is left out there."""
    rows: dict[str, Case] = {}
    weight = torch.randn(group.out_features, group.in_features)
    for name, build in installed(group.in_features, group.out_features).items():
        if name == "bitsandbytes nf4" and not group.isa.startswith("avx512"):
            continue
        peer = build(weight)
        layers = [peer.copy() for _ in range(copies_for(peer.nbytes))]
        x = torch.randn(group.m, group.in_features).to(peer.dtype)
        rows |= with_lora(group, name, peer.nbytes, len(layers), lambda i, x=x, layers=layers: layers[i](x), x)
    return rows


def onnxruntime_int4(group: Group) -> dict[str, Case]:
    """MatMulNBits with int8 activations (accuracy_level 4), its fast path; blocks of 128, fp32 x and LoRA."""
    import numpy
    import onnx
    import onnxruntime
    from onnx import helper, numpy_helper

    k, n, block = group.in_features, group.out_features, 128
    nbytes = n * k // 2 + 4 * n * k // block
    copies = copies_for(nbytes)
    rng = numpy.random.default_rng(0)
    codes = rng.integers(0, 256, (n, k // block, block // 2), dtype=numpy.uint8)
    weights = [numpy_helper.from_array(codes, "w"), numpy_helper.from_array(numpy.full(n * k // block, 0.01, numpy.float32), "s")]
    quantised = helper.make_node("MatMulNBits", ["x", "w", "s"], ["y0"], domain="com.microsoft", K=k, N=n, bits=4,
                                 block_size=block, accuracy_level=4)  # fmt: skip
    factors = [rng.standard_normal((k, RANK), numpy.float32) / k**0.5, rng.standard_normal((RANK, n), numpy.float32)]
    lora = [helper.make_node("MatMul", ["x", "a"], ["t"]), helper.make_node("MatMul", ["t", "b"], ["d"]),
            helper.make_node("Add", ["y0", "d"], ["y"])]  # fmt: skip
    x = onnxruntime.OrtValue.ortvalue_from_numpy(rng.standard_normal((group.m, k), numpy.float32))
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = group.threads

    def row(adapted: bool) -> Case:
        nodes = [quantised, *lora] if adapted else [quantised, helper.make_node("Identity", ["y0"], ["y"])]
        initial = weights + [numpy_helper.from_array(f, name) for f, name in zip(factors, "ab", strict=True)] * adapted
        value = lambda name, shape: helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape)  # noqa: E731
        graph = helper.make_graph(nodes, "layer", [value("x", [group.m, k])], [value("y", [group.m, n])], initial)
        opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=8).SerializeToString()
        bindings = []
        for _ in range(copies):
            session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
            binding = session.io_binding()
            binding.bind_ortvalue_input("x", x)
            y = onnxruntime.OrtValue.ortvalue_from_numpy(numpy.empty((group.m, n), numpy.float32))
            binding.bind_ortvalue_output("y", y)
            bindings.append((session, binding, y))

        def call(i: int):
            session, binding, y = bindings[i]
            session.run_with_iobinding(binding)
            return y

        return Case(nbytes + 2 * lora_nbytes(group) * adapted, copies, call)

    return {"onnxruntime int4": row(False), f"onnxruntime int4 + LoRA r{RANK}": row(True)}
