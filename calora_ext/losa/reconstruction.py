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
    earlier blocks did is in it. The dense model's outputs for one batch are alive at once, the sparse model's one at a time. Raises
    CaloraError where one is not finite.
    """
    sums: dict[str, Tensor] = {}
    dense: dict[str, list[Tensor]] = {name: [] for name in blocks}

    def keep(name: str, hidden: Tensor) -> None:
        dense[name].append(hidden)

    def compare(name: str, hidden: Tensor) -> None:
        d, y = dense[name].pop(0).float(), hidden.float()
        sums[name] = sums.get(name, 0) + torch.stack([(d - y).square().sum(0), d.square().sum(0)]).double()

    for ids in batches:
        with as_dense(layers.values()):
            _run(model, blocks, ids, keep)
        _run(model, blocks, ids, compare)
        done()
    for name in blocks:
        if not torch.isfinite(sums[name]).all():
            raise CaloraError(f"{name}: what this block returns is NaN or infinite on the calibration data; check the model and the data")
    tiny = torch.finfo(torch.float64).tiny
    return torch.stack([torch.where(size > 0, error / size.clamp_min(tiny), 0).mean() for error, size in (sums[name] for name in blocks)])


def _run(model: nn.Module, blocks: list[str], ids: Tensor, tell: Callable[[str, Tensor], None]) -> None:
    """A forward pass; ``tell(block, output)`` is called whenever a block returns, the output being (tokens, channels)."""

    def hook(name: str) -> Callable:
        def collect(module: nn.Module, args: tuple, output) -> None:
            hidden = output if isinstance(output, Tensor) else output[0]
            tell(name, hidden.detach().flatten(0, -2))

        return collect

    handles = [model.get_submodule(name).register_forward_hook(hook(name)) for name in blocks]
    try:
        with evaluating(model), torch.no_grad():
            model(**inputs_of(model, ids))
    finally:
        for handle in handles:
            handle.remove()


def ranks(errors: Tensor, mean: float, caps: Tensor) -> list[int]:
    """Ranks of the blocks in proportion to their errors, from 1 to the caps, which add up to round(mean * blocks) exactly.

    errors: (blocks,); all 0 are taken as equal. caps: (blocks,). The published rule clips and then corrects in one pass, which
    misses the sum; here what is clipped is shared out again.
    """
    total = round(mean * len(errors))
    shares = errors.double() if errors.any() else torch.ones_like(errors, dtype=torch.float64)
    return apportion(total, shares / shares.sum() * total, torch.ones_like(shares), caps).tolist()
