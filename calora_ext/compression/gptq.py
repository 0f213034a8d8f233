"""GPTQ: rounding a weight column by column, each error spread over the columns still to come.

Frantar, Ashkboos, Hoefler, Alistarh: "GPTQ", 2022 (arXiv 2210.17323). Minimises ||(W - What) X||² for the layer's inputs
X, known through the Gram matrix H = X Xᵀ. Columns are taken in the order of falling H[i, i] (act-order); the scale of a
group comes from the original weights (static groups), so that the order does not disturb the packed layout.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import CaloraError
from ..formats import Quantized, WeightFormat
from ..formats.values import INT4_MAX, INT4_ZERO, INT8_MAX, INT8_ZERO

DAMPING = 0.01  # of the mean of H's diagonal, as published
ESCALATE = 10.0
ATTEMPTS = 8
LAZY = 128  # columns whose updates of the rest are applied at once

# The smallest, largest and (where no zero point is stored) middle code.
CODES = {"int4": (0, INT4_MAX, INT4_ZERO), "int8": (INT8_ZERO - INT8_MAX, INT8_ZERO + INT8_MAX, INT8_ZERO)}


def quantize(weight: Tensor, gram: Tensor, fmt: WeightFormat) -> Quantized:
    """Codes for a weight (out, in) given the Gram matrix (in, in) of its inputs. gram is not changed.

    Columns that saw no input are rounded to nearest. Raises CaloraError for weights or a Gram matrix that are not finite.
    """
    if not torch.isfinite(gram).all():
        raise CaloraError("the inputs of this layer are NaN or infinite on the calibration data; check the model and the data")
    plain = fmt.quantize(weight)  # refuses bad weights; its scales are the static ones
    g = fmt.geometry(weight.shape[1], weight.shape[0])
    low, high, middle = CODES[fmt.values]
    order = torch.argsort(gram.diagonal(), descending=True)
    group = order // g.block_columns
    # Transposed, (in, out): a column of the weight is contiguous.
    w = weight.detach().float().t()[order].contiguous()
    scale = plain.scale.float().t()[group]
    zero = torch.full_like(scale, middle) if plain.zero is None else plain.zero.float().t()[group]
    safe = torch.where(scale == 0, torch.ones_like(scale), scale)
    factor = inverse_factor(gram[order][:, order])
    codes = torch.empty_like(w)
    for begin in range(0, len(w), LAZY):
        end = min(begin + LAZY, len(w))
        errors = torch.empty_like(w[begin:end])
        for i in range(begin, end):
            codes[i] = ((w[i] / safe[i]).round_() + zero[i]).clamp_(low, high)
            errors[i - begin] = (w[i] - (codes[i] - zero[i]) * scale[i]) / factor[i, i]
            w[i:end].addr_(factor[i, i:end], errors[i - begin], alpha=-1)
        w[end:].addmm_(factor[begin:end, end:].t(), errors, alpha=-1)
    back = torch.empty_like(codes)
    back[order] = codes
    return Quantized(back.t().to(torch.uint8), plain.scale, plain.zero)


def inverse_factor(gram: Tensor) -> Tensor:
    """The upper Cholesky factor of (gram + damping)⁻¹. The damping grows tenfold until the factorisation succeeds."""
    gram = gram.float()
    diagonal = gram.diagonal()
    mean = float(diagonal.mean())
    if mean == 0:  # nothing ever arrived: every column is independent
        return torch.eye(len(gram))
    damping = DAMPING * mean
    for _ in range(ATTEMPTS):
        damped = gram.clone()
        damped.diagonal().add_(damping)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not failed and torch.isfinite(upper).all():
                return upper
        damping *= ESCALATE
    # Unreachable for a positive semi-definite matrix: by now the damping is 10^5 times its mean eigenvalue.
    raise CaloraError("the inputs of this layer give no usable Gram matrix; use rounding='rtn'")
