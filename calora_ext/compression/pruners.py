"""Pruners that look at a layer's inputs: Wanda, and SparseGPT, which rounds jointly where the weights are quantised.

Both answer for one layer, unstructured or n of m along in_features; :mod:`calora_ext.pruning` has the exact counts and the
plain magnitude. `allowed` (out, in) bool is what may be kept: weights pruned before stay pruned, and without it SparseGPT may
revive a weight that was 0.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ..errors import CaloraError
from ..formats import Quantized, WeightFormat
from ..pruning import NofM, Target, apportion, largest, magnitude, n_of_m
from .calibrate import Gram, Statistic
from .obs import Grid, inverse_factor, sweep

STRIPE = 128  # columns that SparseGPT ranks together, as published


def prune(
    weight: Tensor, inputs: Statistic | None, pruner: str, target: Target, allowed: Tensor | None = None
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(weight, mask), both (out, in), by a pruner's name. inputs: what entered the layer; None, where nothing did, ranks by magnitude."""
    if pruner == "magnitude" or inputs is None:
        return weight, magnitude(weight, target, allowed)
    if pruner == "wanda":
        return weight, wanda(weight, inputs.squares, target, allowed)
    return sparsegpt(weight, inputs.matrix, target, allowed)


def wanda(weight: Tensor, squares: Tensor, target: Target, allowed: Tensor | None = None) -> Tensor:
    """The mask (out, in) that keeps the largest |W[i, j]| ||X[j]|| of every output row, or of every m columns of it.

    Sun, Liu, Bair, Kolter: "A Simple and Effective Pruning Approach for Large Language Models" (arXiv 2306.11695). squares: (in,),
    ||X[j]||² of the layer's inputs; all 0 ranks by |W|. A count that the rows do not divide leaves the first ones a weight less.
    Raises CaloraError for weights or inputs that are not finite.
    """
    weight = weight.detach().float()
    if not (torch.isfinite(weight).all() and torch.isfinite(squares).all()):
        raise CaloraError("the weight or its inputs on the calibration data hold NaN or infinite values; check the model and the data")
    rows, columns = weight.shape
    allowed = weight != 0 if allowed is None else allowed
    norms = squares.sqrt() if squares.any() else torch.ones_like(squares)
    scores = weight.abs() * norms
    if isinstance(target, NofM):
        return n_of_m(scores, target, allowed)
    shares = torch.full((rows,), target / rows, dtype=torch.float64)
    pruned = apportion(target, shares, columns - allowed.sum(1), torch.full((rows,), columns))
    return largest(scores, columns - pruned, allowed)


def sparsegpt(weight: Tensor, gram: Tensor | Gram, target: Target | Tensor, allowed: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(weight, mask) after pruning; the kept weights have moved to make up for the pruned ones.

    Frantar, Alistarh: "SparseGPT" (arXiv 2301.00774). weight: (out, in); gram: (in, in), X Xᵀ of the layer's inputs, not
    changed, or a Gram, which gives it way (``Gram.give_way``). Of every 128 columns the same share is pruned, by W² / U_jj² over all rows; n of m by row; weights that no input reaches go first.
    target: a mask (out, in) prunes just that.
    Raises CaloraError for weights or inputs that are not finite.
    """
    _check(weight)
    moved, mask, _ = _surgery(weight, *_factored(gram), target, allowed, None)
    return moved.t().contiguous(), mask


def sparsegpt_rounded(
    weight: Tensor, gram: Tensor | Gram, fmt: WeightFormat, target: Target | Tensor, allowed: Tensor | None = None
) -> Quantized:
    """SparseGPT with every kept weight rounded to the grid of `fmt` before its error is spread; arguments as in :func:`sparsegpt`.

    Scales are static: those of the weight that SparseGPT alone would give, so that they span what is kept as it will have moved.
    """
    _check(weight)
    factor, live = _factored(gram)
    moved, mask, _ = _surgery(weight, factor, live, target, allowed, None)
    moved = moved.t().contiguous()
    plain = fmt.quantize(moved, mask)
    del moved
    _, mask, codes = _surgery(weight, factor, live, target, allowed, Grid(plain, fmt))
    return replace(plain, codes=codes, mask=mask)


def _factored(gram: Tensor | Gram) -> tuple[Tensor, Tensor]:
    """The inverse's factor (in, in), and which inputs (in,) ever were anything but 0."""
    if isinstance(gram, Gram):
        return gram.give_way(), gram.squares > 0
    return inverse_factor(gram), gram.diagonal() > 0


def _check(weight: Tensor) -> None:
    if not torch.isfinite(weight).all():
        raise CaloraError("the weight holds NaN or infinite values; the checkpoint is damaged or training diverged")


def _surgery(
    weight: Tensor, factor: Tensor, live: Tensor, target: Target | Tensor, allowed: Tensor | None, grid: Grid | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The new weight (in, out), its mask (out, in) and, with a grid, codes (out, in). Inside everything is (in, out): columns are contiguous."""
    w = torch.empty(weight.shape[1], len(weight)).copy_(weight.detach().t())  # a Conv1D's weight lies this way round: it must not change
    may = torch.ones_like(w, dtype=torch.bool) if allowed is None else allowed.t().contiguous()
    mask = target.t() & may if isinstance(target, Tensor) else torch.empty_like(may)
    codes = None if grid is None else torch.empty_like(w, dtype=torch.uint8)
    stripe = 1 if isinstance(target, Tensor) else target.of if isinstance(target, NofM) else STRIPE
    quota = _quota(target, may) if isinstance(target, int) else []
    importance = (factor.diagonal() ** -2 * (live if live.any() else 1)).unsqueeze(1)

    def choose(begin: int) -> None:
        """The mask of the stripe that begins there, by its weights as they are now."""
        part = slice(begin, begin + stripe)
        scores = w[part].square() * importance[part]
        if isinstance(target, NofM):
            mask[part] = n_of_m(scores.t(), target, may[part].t()).t()
        else:
            keep = torch.tensor([scores.numel() - quota[begin // stripe]])
            mask[part] = largest(scores.view(1, -1), keep, may[part].reshape(1, -1)).view_as(scores)

    def settle(i: int, column: Tensor) -> Tensor:
        if not isinstance(target, Tensor) and i % stripe == 0:
            choose(i)
        if grid is None:
            return column * mask[i]
        nearest, settled = grid.nearest(i, column)
        codes[i] = torch.where(mask[i], nearest, grid.middle)
        return settled * mask[i]

    sweep(w, factor, settle, stripe)
    return w, mask.t().contiguous(), None if codes is None else codes.t().contiguous()


def _quota(prune: int, may: Tensor) -> list[int]:
    """How many weights to prune of each stripe of columns; may: (in, out) bool."""
    columns, rows = may.shape
    sizes = torch.tensor([rows * min(STRIPE, columns - begin) for begin in range(0, columns, STRIPE)])
    pruned_before = torch.stack([(~piece).sum() for piece in may.split(STRIPE)])
    return apportion(prune, sizes * (prune / may.numel()), pruned_before, sizes).tolist()
