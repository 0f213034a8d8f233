"""Which weights a sparse layer keeps. Every pruner answers with a mask (out, in); the packed formats hold any mask of theirs."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from .errors import CaloraError

CHUNK = 1 << 22  # weights that are ranked at a time


def magnitude(weight: Tensor, sparsity: str | float) -> Tensor:
    """The mask (out, in) that keeps the largest weights of an (out, in) weight; of equals the first.

    sparsity: ``"2:4"`` keeps two of every four along a row; a number is the share of all weights to remove. A weight that is 0 is not kept: it stays 0 whatever is merged
    into the layer later. Raises CaloraError for another sparsity, or weights that are not finite.
    """
    if sparsity != "2:4" and (isinstance(sparsity, str) or not 0 <= sparsity <= 1):
        raise CaloraError(f"magnitude pruning knows sparsity='2:4' and numbers from 0 to 1, got {sparsity!r}")
    if not torch.isfinite(weight).all():
        raise CaloraError("the weight holds NaN or infinite values; the checkpoint is damaged or training diverged")
    if sparsity != "2:4":
        return _largest(weight.detach().abs(), weight.numel() - round(sparsity * weight.numel()))
    rows = max(1, CHUNK // max(weight.shape[1], 1))
    return torch.cat([_largest_of(piece, 2, 4) for piece in weight.detach().split(rows)])


def _largest(size: Tensor, keep: int) -> Tensor:
    if keep == 0:
        return torch.zeros_like(size, dtype=torch.bool)
    flat = size.flatten()
    least = flat.kthvalue(len(flat) - keep + 1).values  # of those that are kept
    mask = flat > least
    mask[(flat == least).nonzero().view(-1)[: keep - int(mask.sum())]] = True
    return (mask & (flat > 0)).view_as(size)


def _largest_of(weight: Tensor, keep: int, of: int) -> Tensor:
    columns = weight.shape[1]
    size = pad(weight.abs(), (0, -columns % of)).view(len(weight), -1, of)
    mine, other = size.unsqueeze(-1), size.unsqueeze(-2)
    earlier = torch.ones(of, of, dtype=torch.bool).tril(-1)
    rank = ((other > mine) | ((other == mine) & earlier)).sum(-1)
    return ((rank < keep) & (size > 0)).view(len(weight), -1)[:, :columns]
