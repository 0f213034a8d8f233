"""torch's own layers: fp32, bf16, INT4 and dynamically quantised INT8."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import linear

from . import Forward, Peer, int4_groups

NAME = "torch"


def peers(in_features: int, out_features: int) -> dict[str, Callable[[Tensor], Peer]]:
    there = {"torch fp32": partial(_dense, torch.float32), "torch bf16": partial(_dense, torch.bfloat16)}
    if hasattr(torch.ops.aten, "_weight_int4pack_mm_for_cpu") and in_features % 128 == 0 and out_features % 32 == 0:
        there["torch int4 g128"] = _int4
    return there | {"torch dynamic int8": _int8}


def _dense(dtype: torch.dtype, weight: Tensor) -> Peer:
    weight = weight.to(dtype)

    def copy() -> Forward:
        own = weight.clone()
        return lambda x: linear(x, own)

    return Peer(dtype, weight.nbytes, copy)


def _int4(weight: Tensor, group_size: int = 128) -> Peer:
    """aten::_weight_int4pack_mm_for_cpu: what torch itself and torchao run for INT4 on a CPU."""
    codes, scale = int4_groups(weight, group_size)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.int(), 1)
    scales = torch.stack((scale.t(), torch.zeros_like(scale.t())), -1).bfloat16().contiguous()  # (groups, out, scale and offset)

    def copy() -> Forward:
        own, s = packed.clone(), scales.clone()
        return lambda x: torch.ops.aten._weight_int4pack_mm_for_cpu(x, own, group_size, s)

    return Peer(torch.bfloat16, packed.nbytes + scales.nbytes, copy)


def _int8(weight: Tensor) -> Peer:
    """torch.ao's dynamically quantised nn.Linear: int8 weights, activations quantised per call."""
    out_features, in_features = weight.shape
    dense = torch.nn.Linear(in_features, out_features, bias=False)
    dense.weight.data = weight

    def copy() -> Forward:
        return torch.ao.quantization.quantize_dynamic(torch.nn.Sequential(dense), {torch.nn.Linear}, torch.qint8)

    return Peer(torch.float32, in_features * out_features, copy)
