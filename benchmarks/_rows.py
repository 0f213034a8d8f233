"""The rows of a group: this package's formats, and what a user could run instead, with and without a LoRA.

Only sizes matter to speed, so peers get random weights; every row's output is checked for shape and finiteness once.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from _bench import Case, Group
from torch import Tensor

from calora_ext import WeightFormat, ops
from calora_ext.measure import copies_for
from calora_ext.peers import installed

RANK = 16
SCALE = 2.0


def cases(group: Group) -> dict[str, Case]:
    rows = calora(group) | others(group)
    for name, row in rows.items():
        y = row.call(0)
        if y.shape != (group.m, group.out_features) or not torch.isfinite(y).all():
            raise RuntimeError(f"row {name} computed {tuple(y.shape)} or values that are not finite")
    return rows


def lora_nbytes(group: Group, rank: int = RANK) -> int:
    """Of a bf16 LoRA: what ours reads."""
    return 2 * rank * (group.in_features + group.out_features)


def lora_factors(group: Group, copies: int, rank: int = RANK, dtype=torch.bfloat16) -> list[tuple[Tensor, Tensor]]:
    """(A, B) of each copy: (rank, in) and (out, rank)."""
    return [((torch.randn(rank, group.in_features) / group.in_features**0.5).to(dtype), torch.randn(group.out_features, rank).to(dtype))
            for _ in range(copies)]  # fmt: skip


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
    """The peers of ``calora bench``, with and without a LoRA. Only torch can be capped to AVX2, so the rest is left out there."""
    rows: dict[str, Case] = {}
    weight = torch.randn(group.out_features, group.in_features)
    for name, build in installed(group.in_features, group.out_features).items():
        if not name.startswith("torch") and not group.isa.startswith("avx512"):
            continue
        peer = build(weight)
        layers = [peer.copy() for _ in range(copies_for(peer.nbytes))]
        factors = lora_factors(group, len(layers), dtype=peer.dtype)
        adapted = [peer.with_lora(layer, a, SCALE * b) for layer, (a, b) in zip(layers, factors, strict=True)]
        x = torch.randn(group.m, group.in_features).to(peer.dtype)
        rows[name] = Case(peer.nbytes, len(layers), lambda i, x=x, layers=layers: layers[i](x))
        rows[f"{name} + LoRA r{RANK}"] = Case(peer.nbytes + lora_nbytes(group), len(layers), lambda i, x=x, adapted=adapted: adapted[i](x))
    return rows
