"""Which weights a sparse layer keeps, given a score for each: exact counts, n of m, and the magnitude as a score.

A mask is (out, in) bool, True where the weight is kept. How much is pruned is a :data:`Target`: a number of weights of the
layer, or :class:`NofM`. Of equal scores the first is kept.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from .errors import CaloraError

CHUNK = 1 << 22  # scores that are ranked at a time
LARGEST_GROUP = 128  # columns in a group of n:m


@dataclass(frozen=True)
class NofM:
    """Keep `keep` of every `of` columns along a row; a last group that is shorter keeps as many, if it has them."""

    keep: int
    of: int

    def __str__(self) -> str:
        return f"{self.keep}:{self.of}"


Target = NofM | int  # int: how many weights of the layer are pruned


def parse(sparsity: str | float) -> NofM | float:
    """``"2:4"`` keeps 2 of 4 (any 1 <= n < m <= 128); a number from 0 to 1 is the share to remove. Raises CaloraError for others."""
    if isinstance(sparsity, str):
        match = re.fullmatch(r"(\d{1,3}):(\d{1,3})", sparsity)
        if match and 0 < int(match[1]) < int(match[2]) <= LARGEST_GROUP:
            return NofM(int(match[1]), int(match[2]))
    elif isinstance(sparsity, int | float) and not isinstance(sparsity, bool) and 0 <= sparsity <= 1:
        return float(sparsity)
    raise CaloraError(
        f"sparsity must be a pattern such as '2:4', which keeps 2 of every 4, or the share of weights to remove, from 0 to 1; got {sparsity!r}"
    )


def magnitude(weight: Tensor, target: Target, allowed: Tensor | None = None) -> Tensor:
    """The mask that keeps the largest weights of an (out, in) layer, ranked over the whole layer.

    allowed: (out, in) bool, the weights that may be kept; what was pruned before stays pruned. Without it a weight that is 0
    is not kept. Raises CaloraError for weights that are not finite.
    """
    weight = weight.detach()
    if not torch.isfinite(weight).all():
        raise CaloraError("the weight holds NaN or infinite values; the checkpoint is damaged or training diverged")
    allowed = weight != 0 if allowed is None else allowed
    if isinstance(target, NofM):
        return n_of_m(weight.abs(), target, allowed)
    keep = torch.tensor([weight.numel() - target], device=weight.device)
    return largest(weight.abs().reshape(1, -1), keep, allowed.reshape(1, -1)).view(weight.shape)


def largest(scores: Tensor, keep: Tensor, allowed: Tensor) -> Tensor:
    """The `keep` largest of every group among those allowed, to the weight; all of the allowed where there are fewer.

    scores: (groups, size), not negative; keep: (groups,); allowed: (groups, size) bool. Returns a mask (groups, size).
    """
    size = scores.shape[1]
    keep = torch.minimum(keep, allowed.sum(1))
    mask = torch.zeros_like(allowed)
    for k in keep.unique().tolist():  # a few: all groups have nearly the same
        if k == 0:
            continue
        for groups in (keep == k).nonzero().squeeze(1).split(max(1, CHUNK // size)):
            s = torch.where(allowed[groups], scores[groups], scores.new_full((), -1))
            threshold = s.kthvalue(size - k + 1, dim=1, keepdim=True).values
            above, equal = s > threshold, s == threshold
            missing = k - above.sum(1, keepdim=True)
            mask[groups] = above | (equal & (equal.cumsum(1) <= missing))
    return mask


def n_of_m(scores: Tensor, target: NofM, allowed: Tensor) -> Tensor:
    """The mask that keeps the largest of every group of columns. scores: (out, in), not negative; allowed: (out, in) bool."""
    columns = scores.shape[1]
    place = torch.arange(target.of, device=scores.device)
    parts = []
    for s, a in zip(*(t.split(max(1, CHUNK // columns)) for t in (scores, allowed)), strict=True):
        s = pad(torch.where(a, s, s.new_full((), -1)), (0, -columns % target.of), value=-1).view(len(s), -1, target.of)
        order = s.argsort(dim=-1, descending=True, stable=True)
        kept = torch.zeros_like(s, dtype=torch.bool).scatter_(-1, order, (place < target.keep).expand_as(order))
        parts.append(kept.view(len(s), -1)[:, :columns] & a)
    return torch.cat(parts)


def apportion(total: int, shares: Tensor, floors: Tensor, caps: Tensor) -> Tensor:
    """Whole numbers between floors and caps that add up to `total`, as near to `shares` as that allows.

    shares: (n,) float, floors and caps: (n,) whole; all of them shift by the same fraction of their cap where the shares add up
    to something else, and the largest fractions are rounded up. A total out of reach gives the floors, or the caps.
    """
    shares, floors, caps = shares.double(), floors.double(), caps.double()
    total = min(max(total, int(floors.sum())), int(caps.sum()))

    def shifted(by: float) -> Tensor:
        return (shares + by * caps).clamp(floors, caps)

    low, high = -2.0, 2.0
    for _ in range(64):
        middle = (low + high) / 2
        low, high = (middle, high) if float(shifted(middle).sum()) < total else (low, middle)
    exact = shifted(high)
    whole = exact.floor()
    missing = total - int(whole.sum())
    # Shares such as 0.7 * 10 lie a rounding error beside a whole number: noise must not decide who is rounded up.
    fraction = torch.where(whole < caps, (exact - whole).mul(1e6).round(), -1.0)
    whole[fraction.argsort(descending=True, stable=True)[:missing]] += 1
    return whole.long()
