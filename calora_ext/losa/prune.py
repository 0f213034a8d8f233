"""Choosing the masks anew on merged weights, block by block, each seeing what the earlier ones have become."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from ..compression.calibrate import Gram, SquaredNorms, Statistic, run_blocks
from ..compression.pruners import prune
from ..errors import CaloraError
from ..pruning import Target
from .masked import MaskedLinear


def prune_layers(
    model: nn.Module, layers: dict[str, MaskedLinear], blocks: dict[str, list[str]], batches: list[Tensor], pruner: str,
    targets: dict[str, Target], revive: bool, done: Callable[[], None], lost: Callable[[str, Tensor, Gram], None] | None = None,
) -> None:  # fmt: skip
    """Prune every layer in place; its adapter must have been folded in. Layers outside of the blocks, or that no token reaches,
    are pruned by magnitude. revive: whether a weight that was pruned before may come back (SparseGPT moves it away from 0).
    lost: told of each layer that tokens reach what it was less what it is now, and the Gram matrix of its inputs.

    Raises CaloraError naming the layer for weights or inputs that are not finite.
    """

    def choose(name: str, inputs: Statistic | None) -> None:
        layer = layers[name]
        before = layer.base
        try:
            layer.keep(*prune(before, inputs, pruner, targets[name], None if revive and inputs is not None else layer.mask))
            if lost is not None and inputs is not None and inputs.squares.any():
                lost(name, before - layer.base, inputs)
        except CaloraError as error:
            raise CaloraError(f"{name}: {error}") from None

    def visit(block: str, inputs: dict[str, Statistic]) -> None:
        for name in blocks[block]:
            choose(name, inputs.get(name))
        done()

    run_blocks(model, blocks, batches, visit, SquaredNorms if pruner != "sparsegpt" and lost is None else Gram)
    inside = {name for members in blocks.values() for name in members}
    for name in layers.keys() - inside:
        choose(name, None)
