"""The other ways to compute a linear layer that an environment has: what ``calora bench`` and the benchmarks time us beside.

A peer computes y = x W^T with the weight that it was given, in its own format, and says how a user of it would run a LoRA: inside its
own graph where it has one, else as PEFT does, beside the layer.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import linear

Forward = Callable[[Tensor], Tensor]  # x (rows, in_features) -> y (rows, out_features)


def beside(forward: Forward, down: Tensor, up: Tensor) -> Forward:
    """What PEFT adds to any layer: two more products and a sum. down: (rank, in_features), up: (out_features, rank)."""
    return lambda x: forward(x) + linear(linear(x, down), up)


@dataclass(frozen=True)
class Peer:
    """A way to compute the layer. dtype: of x and of a LoRA. nbytes: of one stored weight. copy(): a forward with a weight of its own.
    with_lora(forward, down, up): the same with a LoRA. Threads are torch's number at the time of copy() and with_lora(). A y may be the
    forward's own memory: it is good until the next call, and no longer than the forward."""

    dtype: torch.dtype
    nbytes: int
    copy: Callable[[], Forward]
    with_lora: Callable[[Forward, Tensor, Tensor], Forward] = beside


def installed(in_features: int, out_features: int) -> dict[str, Callable[[Tensor], Peer]]:
    """The peers that are installed and take a layer of that size: name -> a function of the dense weight, (out, in) fp32.

    One that is installed and cannot be used is left out, with a warning that says why.
    """
    from . import aten, bitsandbytes, ggml, onnxruntime

    there = {}
    for module in (aten, bitsandbytes, onnxruntime, ggml):
        try:
            there |= module.peers(in_features, out_features)
        except (ImportError, OSError, AttributeError, RuntimeError) as broken:  # a library that is not what it was
            warnings.warn(f"{module.NAME} is left out: {broken}", stacklevel=2)
    return there


def int4_groups(weight: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    """Codes 0 to 15, (out, in) uint8, and scales, (out, in / group_size) fp32, of weight = scale * (code - 8)."""
    groups = weight.view(len(weight), -1, group_size)
    scales = groups.abs().amax(-1).clamp_min_(1e-12) / 7
    codes = (groups / scales.unsqueeze(-1)).round_().add_(8)
    return codes.to(torch.uint8).view(weight.shape), scales
