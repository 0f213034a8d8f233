"""How far each block's output is from the dense model's, and the rank it gets for it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..compression.calibrate import inputs_of
from ..errors import CaloraError
from ..evaluate import evaluating
from ..pruning import apportion
from .masked import MaskedLinear, as_dense

LARGEST = 2  # times the mean rank over the run: no block gets more; published: 16 where the mean is 8


def errors(model: nn.Module, layers: dict[str, MaskedLinear], blocks: list[str], batches: list[Tensor], done: Callable[[], None]) -> Tensor:
    """Relative squared error of every block's output, its mean over the channels: (blocks,) float64.

    With D (tokens, channels) of the dense model and Y of the sparse one, the error of a channel is ||D - Y||^2 / ||D||^2; what
    earlier blocks did is in it. One batch's outputs of one model are alive at a time. Raises CaloraError where one is not finite.
    """
    sums: dict[str, list[Tensor]] = {}
    for ids in batches:
        with as_dense(layers.values()):
            dense = _outputs(model, blocks, ids)
        sparse = _outputs(model, blocks, ids)
        for name in blocks:
            pairs = list(zip(dense[name], sparse[name], strict=True))
            parts = [torch.stack([(d - s).square().sum(0), d.square().sum(0)]).double() for d, s in pairs]
            sums[name] = sums.get(name, 0) + sum(parts)
        done()
    found = torch.stack([torch.where(size > 0, error / size.clamp_min(torch.finfo(size.dtype).tiny), 0).mean() for error, size in sums.values()])
    if not torch.isfinite(found).all():
        raise CaloraError("the model's hidden states are NaN or infinite on the calibration data; check the model and the data")
    return found


def _outputs(model: nn.Module, blocks: list[str], ids: Tensor) -> dict[str, list[Tensor]]:
    """What every block returns, (tokens, channels) float32, once per call."""
    outputs: dict[str, list[Tensor]] = {name: [] for name in blocks}

    def collect(name: str) -> Callable:
        def hook(module: nn.Module, args: tuple, output) -> None:
            hidden = output if isinstance(output, Tensor) else output[0]
            outputs[name].append(hidden.detach().flatten(0, -2).float())

        return hook

    handles = [model.get_submodule(name).register_forward_hook(collect(name)) for name in blocks]
    try:
        with evaluating(model), torch.no_grad():
            model(**inputs_of(model, ids))
    finally:
        for handle in handles:
            handle.remove()
    return outputs


def ranks(errors: Tensor, mean: float, caps: Tensor) -> list[int]:
    """Ranks of the blocks in proportion to their errors, from 1 to the caps, which add up to round(mean * blocks) exactly.

    errors: (blocks,); all 0 are taken as equal. caps: (blocks,). The published rule clips and then corrects in one pass, which
    misses the sum; here what is clipped is shared out again.
    """
    total = round(mean * len(errors))
    shares = errors.double() if errors.any() else torch.ones_like(errors, dtype=torch.float64)
    return apportion(total, shares / shares.sum() * total, torch.ones_like(shares), caps).tolist()
