"""Optimal brain surgery column by column: what GPTQ and SparseGPT share.

Changing column i of a weight W by an error costs ||error X||² for the layer's inputs X. The columns still to come make up for
it best by moving along row i of U, the upper Cholesky factor of (X Xᵀ + damping)⁻¹ (Frantar et al., arXiv 2210.17323, 2301.00774).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..errors import CaloraError
from ..formats import Quantized, WeightFormat
from ..formats.values import VALUES

DAMPING = 0.01  # of the mean of the Gram matrix's diagonal, as published
ESCALATE = 10.0
ATTEMPTS = 8
LAZY = 128  # columns whose updates of the rest are applied at once
ROWS = 256  # of a Gram matrix that are looked at together


def inverse_factor(gram: Tensor, order: Tensor | None = None) -> Tensor:
    """The upper Cholesky factor of (gram + damping)⁻¹, (in, in) float32. gram: X Xᵀ of the inputs, not changed; order: (in,),
    the columns as they shall be taken.

    A factorisation that fails is tried in float64, then with tenfold damping until it succeeds. One matrix of that size is made.
    Raises CaloraError for a Gram matrix that is not finite.
    """
    order = torch.arange(len(gram)) if order is None else order
    diagonal = gram.diagonal()[order]
    if not all(bool(torch.isfinite(rows).all()) for rows in gram.split(ROWS)):
        raise CaloraError("the inputs of this layer are NaN or infinite on the calibration data; check the model and the data")
    mean = float(diagonal.double().mean())
    if mean == 0:  # nothing ever arrived: every column is independent
        return torch.eye(len(gram))
    damping = DAMPING * mean
    for _ in range(ATTEMPTS):
        for dtype in (torch.float32, torch.float64):
            factor = _reordered(gram, order, dtype)
            factor.diagonal().add_(damping)
            if _invert(factor):
                return factor.float()
        damping *= ESCALATE
    # Unreachable for a positive semi-definite matrix: by now the damping is 10^5 times its mean eigenvalue.
    raise CaloraError("the inputs of this layer give no usable Gram matrix; leave calibration out")


def _reordered(gram: Tensor, order: Tensor, dtype: torch.dtype) -> Tensor:
    """gram[order][:, order], column by column in memory, as LAPACK works in place."""
    columns = torch.empty(gram.shape, dtype=dtype)
    for rows, part in zip(columns.split(ROWS), order.split(ROWS), strict=True):
        rows.copy_(gram.t()[part][:, order])
    return columns.t()


def _invert(matrix: Tensor) -> bool:
    """Put the upper Cholesky factor of its inverse in a matrix's place; whether that went well."""
    failed = torch.empty(0, dtype=torch.int32)
    torch.linalg.cholesky_ex(matrix, out=(matrix, failed))
    if failed:
        return False
    torch.cholesky_inverse(matrix, out=matrix)
    torch.linalg.cholesky_ex(matrix, upper=True, out=(matrix, failed))
    return not failed and all(bool(torch.isfinite(columns).all()) for columns in matrix.t().split(ROWS))


def sweep(w: Tensor, factor: Tensor, settle: Callable[[int, Tensor], Tensor], stripe: int = 1, lazy: int = LAZY) -> None:
    """Settle the columns of a weight one after the other, each error spread over those still to come, in place.

    w: (in, out) float32, a column of the layer's weight to a row; factor: (in, in), in the same order. settle(i, column) returns
    what the column becomes; where i is a multiple of `stripe` all columns of the stripe are up to date when it is called.
    """
    lazy = max(lazy // stripe, 1) * stripe
    for begin in range(0, len(w), lazy):
        end = min(begin + lazy, len(w))
        errors = torch.empty_like(w[begin:end])
        for i in range(begin, end):
            settled = settle(i, w[i])
            errors[i - begin] = (w[i] - settled) / factor[i, i]
            w[i] = settled
            w[i + 1 : end].addr_(factor[i, i + 1 : end], errors[i - begin], alpha=-1)
        w[end:].addmm_(factor[begin:end, end:].t(), errors, alpha=-1)


class Grid:
    """The values that a format with scales chosen beforehand can store, column by column."""

    def __init__(self, plain: Quantized, fmt: WeightFormat) -> None:
        """plain: a weight rounded to nearest, whose scales and zero points are the ones to use."""
        self.values = VALUES[fmt.values]
        self.middle = self.values.padding(None)  # the code of 0 where no zero point is stored
        out_features, in_features = plain.codes.shape
        self.columns = fmt.geometry(in_features, out_features).block_columns
        self.scale = plain.scales().t()  # (blocks, out)
        self.zero = None if plain.zero is None else plain.zero.float().t()

    def nearest(self, column: int, w: Tensor) -> tuple[Tensor, Tensor]:
        """Codes (whole numbers) and float32 values nearest to w (out,) in a column of the layer."""
        block = column // self.columns
        scale, zero = self.scale[block], None if self.zero is None else self.zero[block]
        codes = self.values.codes(w, scale, zero)
        return codes, self.values.value(codes, scale, zero)
