"""Cross-entropy that holds the logits once: with a large vocabulary they are the largest tensor of a training step."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

_PIECE = 1 << 21  # logits at a time in fp32: 8 MB


class _SummedCrossEntropy(torch.autograd.Function):
    """Softmax in fp32, rows by rows, in forward and again in backward; kept are the logits as they came and one number per row."""

    @staticmethod
    def forward(ctx, logits: Tensor, labels: Tensor, ignored: int) -> Tensor:
        total, normalisers = logits.new_zeros((), dtype=torch.float32), logits.new_empty(len(logits), dtype=torch.float32)
        for rows in _pieces(logits):
            piece, wanted = logits[rows].float(), labels[rows]
            normalisers[rows] = piece.logsumexp(-1)
            losses = normalisers[rows] - piece.gather(-1, wanted.clamp_min(0)[:, None]).squeeze(-1)
            total += losses.masked_fill(wanted == ignored, 0.0).sum()
        ctx.save_for_backward(logits, labels, normalisers)
        ctx.ignored = ignored
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        logits, labels, normalisers = ctx.saved_tensors
        result = torch.empty_like(logits)
        for rows in _pieces(logits):
            wanted = labels[rows]
            piece = (logits[rows].float() - normalisers[rows, None]).exp_()
            piece.scatter_add_(-1, wanted.clamp_min(0)[:, None], piece.new_full((len(piece), 1), -1.0))
            result[rows] = piece.mul_(grad).masked_fill_((wanted == ctx.ignored)[:, None], 0.0)
        return result, None, None


def summed_cross_entropy(logits: Tensor, labels: Tensor, ignored: int) -> Tensor:
    """Sum over rows of -log softmax(logits)[label], in fp32, as torch's cross_entropy has it.

    logits: (rows, classes). labels: (rows,) int64; rows with the label ``ignored`` (negative) do not count.
    """
    return _SummedCrossEntropy.apply(logits, labels, ignored)


def _pieces(logits: Tensor) -> list[slice]:
    step = max(1, _PIECE // logits.shape[-1])
    return [slice(first, first + step) for first in range(0, len(logits), step)]
