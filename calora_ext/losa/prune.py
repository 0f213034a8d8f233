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
    targets: dict[str, Target], revive: bool, done: Callable[[], None],
) -> None:  # fmt: skip
    """Prune every layer in place; its adapter must have been folded in. Layers outside of the blocks, or that no token reaches,
    are pruned by magnitude. revive: whether a weight that was pruned before may come back (SparseGPT moves it away from 0).

    Raises CaloraError naming the layer for weights or inputs that are not finite.
    """

    def choose(name: str, inputs: Statistic | None) -> None:
        layer = layers[name]
        try:
            layer.keep(*prune(layer.base, inputs, pruner, targets[name], None if revive and inputs is not None else layer.mask))
        except CaloraError as error:
            raise CaloraError(f"{name}: {error}") from None

    def visit(block: str, inputs: dict[str, Statistic]) -> None:
        for name in blocks[block]:
            choose(name, inputs.get(name))
        done()

    run_blocks(model, blocks, batches, visit, Gram if pruner == "sparsegpt" else SquaredNorms)
    inside = {name for members in blocks.values() for name in members}
    for name in layers.keys() - inside:
        choose(name, None)
