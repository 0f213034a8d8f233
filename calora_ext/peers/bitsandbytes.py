"""bitsandbytes' 4-bit layer on a CPU."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec

import torch
from torch import Tensor

from . import Forward, Peer

NAME = "bitsandbytes"


def peers(in_features: int, out_features: int) -> dict[str, Callable[[Tensor], Peer]]:
    if find_spec("bitsandbytes") is None or in_features % 64:  # else its CPU kernel fails, or takes the wrong scales
        return {}
    import bitsandbytes.nn  # noqa: F401  what is broken says so here

    return {"bitsandbytes nf4": _nf4}


def _nf4(weight: Tensor) -> Peer:
    from bitsandbytes.nn import Linear4bit

    out_features, in_features = weight.shape

    def copy() -> Forward:
        layer = Linear4bit(in_features, out_features, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4")
        layer.weight.data = weight.clone()
        return layer.to("cpu").eval()

    return Peer(torch.bfloat16, in_features * out_features // 2 + in_features * out_features // 64 * 4, copy)
