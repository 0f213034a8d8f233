"""Compressing a planned model in place: by GPTQ inside the blocks, to nearest elsewhere."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from ..errors import CaloraError
from ..linear import CompressedLinear, dense_weight
from ..policy import Coverage, tied_modules
from ..recipe import Recipe
from . import gptq
from .calibrate import Gram, find_blocks, run_blocks
from .replace import forget_ties, pack, tie
from .report import relative_error


def apply(model: nn.Module, coverage: Coverage, recipe: Recipe, batches: list[Tensor] | None, done: Callable[[], None]) -> dict[str, float]:
    """Replace every module that `coverage` gives a format; returns the relative error of each.

    recipe: how weights are pruned, and what later blocks see of earlier ones. batches: token ids for GPTQ, or None to round
    to nearest. done: called after each module. Raises CaloraError naming the module for weights or inputs that are not finite.
    """
    errors: dict[str, float] = {}
    formats = coverage.formats
    tied = tied_modules(model)

    def replace(name: str, gram: Gram | None = None) -> None:
        dense, fmt = model.get_submodule(name), formats[name]
        packed = None
        if gram is not None:
            try:
                packed = fmt.pack_quantized(gptq.quantize(dense_weight(dense), gram.matrix, fmt))
            except CaloraError as error:
                raise CaloraError(f"{name}: {error}") from None
        layer = pack(name, dense, fmt, recipe, packed)
        weight = dense.weight if isinstance(dense, nn.Embedding) else dense_weight(dense)
        errors[name] = relative_error(weight.detach(), layer)
        if isinstance(layer, CompressedLinear):
            layer.activations = recipe.activations
        model.set_submodule(name, layer)
        if isinstance(dense, nn.Embedding):
            tie(model, name, [target for target, source in tied.items() if source == name])
        done()

    if batches is not None:
        blocks = find_blocks(model, formats)
        if not blocks:
            raise CaloraError("the model has no list of blocks to calibrate one by one; use rounding='rtn'")

        def compress(block: str, grams: dict[str, Gram]) -> None:
            for name in blocks[block]:
                replace(name, grams.get(name))  # a layer that no token reached is rounded to nearest

        run_blocks(model, blocks, batches, compress)
    for name in formats:
        if name not in errors:
            replace(name)
    forget_ties(model)
    return {name: errors[name] for name in formats}
