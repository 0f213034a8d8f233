"""GPTQ: rounding a weight column by column, each error spread over the columns still to come.

Frantar, Ashkboos, Hoefler, Alistarh: "GPTQ", 2022 (arXiv 2210.17323). Minimises ||(W - What) X||² for the layer's inputs
X, known through the Gram matrix H = X Xᵀ. Columns are taken in the order of falling H[i, i] (act-order); the scale of a
group comes from the original weights (static groups), so that the order does not disturb the packed layout.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ..formats import Quantized, WeightFormat
from .obs import Grid, inverse_factor, sweep


def quantize(weight: Tensor, gram: Tensor, fmt: WeightFormat) -> Quantized:
    """Codes for a weight (out, in) given the Gram matrix (in, in) of its inputs. gram is not changed.

    Columns that saw no input are rounded to nearest. Raises CaloraError for weights or a Gram matrix that are not finite.
    """
    plain = fmt.quantize(weight)  # refuses bad weights; its scales are the static ones
    grid = Grid(plain, fmt)
    order = torch.argsort(gram.diagonal(), descending=True)
    factor = inverse_factor(gram, order)
    w = weight.detach().t()[order].float().contiguous()
    codes = torch.empty(w.shape, dtype=torch.uint8)
    columns = order.tolist()

    def settle(i: int, column: Tensor) -> Tensor:
        codes[columns[i]], settled = grid.nearest(columns[i], column)
        return settled

    sweep(w, factor, settle)
    return replace(plain, codes=codes.t().contiguous())
