"""Compressing a planned model in place: by what the calibration data shows inside the blocks, without it elsewhere."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from ..errors import CaloraError
from ..formats import Quantized, WeightFormat
from ..linear import CompressedLinear, dense_weight
from ..policy import Coverage, tied_modules
from ..pruning import Target
from ..recipe import Recipe
from . import gptq
from .calibrate import Gram, SquaredNorms, Statistic, find_blocks, run_blocks
from .pruners import prune, sparsegpt, sparsegpt_rounded
from .replace import forget_ties, pack, tie
from .report import Outcome, relative_error
from .residency import RESIDENT, Residency


def apply(
    model: nn.Module, coverage: Coverage, recipe: Recipe, targets: dict[str, Target | Tensor | Quantized], batches: list[Tensor] | None,
    done: Callable[[], None], residency: Residency = RESIDENT,
) -> Outcome:  # fmt: skip
    """Replace every module that `coverage` gives a format.

    recipe: resolved; how weights are pruned, and what later blocks see of earlier ones. targets: how much of each sparse weight, the mask
    (out, in) that it has already, or the codes.
    batches: token ids of the calibration data for pruner and rounding, or None. done: called after each module. residency: told
    which weights are needed; default: all are in memory.
    Raises CaloraError naming the module for weights or inputs that are not finite.
    """
    outcome = Outcome()
    formats = coverage.formats
    tied = tied_modules(model)

    def replace(name: str, inputs: Statistic | None = None) -> None:
        dense, fmt, target = model.get_submodule(name), formats[name], targets.get(name)
        packed = None
        if isinstance(target, Quantized):
            packed = fmt.pack_quantized(target)
        elif inputs is not None:
            try:
                packed = fmt.pack_quantized(calibrated(dense_weight(dense), inputs, fmt, recipe, target))
            except CaloraError as error:
                raise CaloraError(f"{name}: {error}") from None
        layer = pack(name, dense, fmt, target, packed)
        weight = dense.weight if isinstance(dense, nn.Embedding) else dense_weight(dense)
        outcome.errors[name] = relative_error(weight.detach(), layer)
        if fmt.sparse:
            kept = fmt.kept(layer.packed_tensors(), layer.in_features, layer.out_features)
            outcome.pruned[name] = (weight.numel() - kept, weight.numel())
        if isinstance(layer, CompressedLinear):
            layer.activations = recipe.activations
        model.set_submodule(name, layer)
        if isinstance(dense, nn.Embedding):
            tie(model, name, [target for target, source in tied.items() if source == name])
        del dense, weight
        residency.rest()
        done()

    if batches is not None:
        blocks = find_blocks(model, formats)
        if not blocks:
            raise CaloraError("the model has no list of blocks to calibrate one by one; leave calibration out")

        def compress(block: str, inputs: dict[str, Statistic]) -> None:
            for name in blocks[block]:
                if name not in inputs:
                    outcome.uncalibrated.append(name)
                replace(name, inputs.pop(name, None))  # a Gram matrix goes with the last layer that shares it

        gram = recipe.rounding == "gptq" or recipe.pruner == "sparsegpt"
        run_blocks(model, blocks, batches, compress, Gram if gram else SquaredNorms, residency=residency)
    for group in residency.grouped([name for name in formats if name not in outcome.errors], finished=True):
        for name in group:
            replace(name)
            if batches is not None and formats[name].sparse:
                outcome.uncalibrated.append(name)
    forget_ties(model)
    outcome.errors = {name: outcome.errors[name] for name in formats}
    return outcome


def calibrated(weight: Tensor, inputs: Statistic, fmt: WeightFormat, recipe: Recipe, target: Target | Tensor | None) -> Quantized:
    """The codes of a weight (out, in) given its inputs, by the recipe's pruner and rounding. What is 0 stays 0; target may be the
    mask, which then holds as it is. SparseGPT uses the Gram matrix up."""
    if not fmt.sparse:
        return gptq.quantize(weight, inputs.matrix, fmt)
    allowed = None if isinstance(target, Tensor) else weight != 0
    if allowed is not None and recipe.pruner != "sparsegpt":
        target = prune(weight, inputs, recipe.pruner, target, allowed)[1]
    if recipe.rounding == "gptq":
        return sparsegpt_rounded(weight, inputs, fmt, target, allowed)
    return fmt.quantize(*((weight, target) if isinstance(target, Tensor) else sparsegpt(weight, inputs, target, allowed)))
