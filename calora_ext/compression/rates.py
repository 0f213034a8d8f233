"""How sparse each block is: rules that turn one sparsity for the model into one rate per block, and the exact counts they mean.

A rule is a function (sparsity, sizes, measured) -> rates: sizes (blocks,) are the weights of each block in the order of the
forward pass, measured is what its companion found out about the dense model, or None. Rules need not meet the sparsity exactly:
:func:`counts` does, to the weight. A rule from elsewhere is such a function and ``register("name", Rule(function))``, after which
``Recipe(rates="name")`` means it; processes that only read such a recipe register it too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..errors import CaloraError
from ..formats import WeightFormat
from ..linear import dense_weight
from ..policy import features
from ..pruning import Target, apportion, parse
from ..recipe import RATES, Recipe
from .calibrate import SquaredNorms, find_blocks, run_blocks
from .residency import RESIDENT, Residency

SPREAD = 0.28  # between the first and the last block of an arithmetic progression, at most
OUTLIER = 5.0  # OWL's M: an outlier is this many times the mean score
OWL_SPREAD = 0.08  # OWL's lambda: rates span twice that
RMI_STEPS = ((0.5, 0.01), (0.6, 0.02), (1.0, 0.03))  # the rates leave the sparsity by so much, up to each sparsity
MIN_SEQUENCES = 8


def uniform(sparsity: float, sizes: Tensor, measured: None) -> Tensor:
    """The same rate everywhere."""
    return torch.full_like(sizes, sparsity)


def arithmetic(sparsity: float, sizes: Tensor, measured: None) -> Tensor:
    """Rates that rise evenly with depth, the mean being the sparsity (the progression of ATP, ICML 2025).

    They span 0.28, or half of what stays between 0 and 1 where that is less.
    """
    spread = min(SPREAD, sparsity, 1 - sparsity) if len(sizes) > 1 else 0.0
    return sparsity + spread * torch.linspace(-0.5, 0.5, len(sizes), dtype=sizes.dtype, device=sizes.device)


def rmi(sparsity: float, sizes: Tensor, similarity: Tensor) -> Tensor:
    """Blocks whose inputs resemble those of all others lose more weights (LoSA, arXiv 2502.14816).

    similarity: (blocks, blocks) linear CKA. The published linear programme (least sum of exp(-beta h) x rate, rates within
    delta of the sparsity, the mean given) has its optimum at the bounds: sparsity + delta from the largest h = sum of a block's
    similarities to the others downwards, sparsity - delta for the rest, and one block between the two where the sizes ask for it.
    """
    delta = min(next(step for limit, step in RMI_STEPS if sparsity <= limit), sparsity, 1 - sparsity)
    h = similarity.sum(1) - similarity.diagonal()
    order = h.argsort(descending=True, stable=True)
    before = sizes[order].cumsum(0) - sizes[order]
    raised = ((sizes.sum() / 2 - before) / sizes[order]).clamp(0, 1)  # how far each block goes from -delta to +delta
    rates = torch.empty_like(sizes)
    rates[order] = sparsity + delta * (2 * raised - 1)
    return rates


def owl(sparsity: float, sizes: Tensor, outliers: Tensor) -> Tensor:
    """Blocks with many outliers lose fewer weights (Yin et al., "OWL", arXiv 2310.05175).

    outliers: (blocks,), the share of scores |W| ||X|| above 5 times their mean. Densities span 0.16 in proportion to it.
    """
    span = outliers.max() - outliers.min()
    if span == 0:
        return uniform(sparsity, sizes, None)
    density = (outliers - outliers.min()) / span * (2 * OWL_SPREAD)
    return sparsity - (density - (density * sizes).sum() / sizes.sum())


def block_similarity(
    model: nn.Module, blocks: dict[str, list[str]], batches: list[Tensor], done: Callable[[], None], residency: Residency = RESIDENT
) -> Tensor:
    """Linear CKA (normalised HSIC) of the inputs of every two blocks, (blocks, blocks) float64; a sample is a sequence.

    One block's inputs are alive at a time. Raises CaloraError for fewer than 8 sequences, and for inputs that are not finite.
    """
    if sum(len(b) for b in batches) < MIN_SEQUENCES:
        raise CaloraError(
            f"rates='rmi' compares {MIN_SEQUENCES} calibration sequences or more, of up to 512 tokens; got {sum(len(b) for b in batches)}: "
            "give more text, or other rates"
        )
    entering: list[Tensor] = []
    grams = {}

    def measure(name: str, _: dict) -> None:
        grams[name] = _centred_gram(entering, residency.rest)
        entering.clear()
        if not torch.isfinite(grams[name]).all():
            raise CaloraError(f"{name}: the inputs of this block are NaN or infinite on the calibration data; check the model and the data")
        done()

    run_blocks(model, blocks, batches, measure, None, changes=False, residency=residency, observe=lambda _, x: entering.append(x))
    k = torch.stack([grams[name].flatten() for name in blocks])
    k /= k.norm(dim=1, keepdim=True).clamp_min(torch.finfo(k.dtype).tiny)
    return k @ k.t()


def _centred_gram(inputs: list[Tensor], rest: Callable[[], None]) -> Tensor:
    """H X Xᵀ H of samples (sequences, length, hidden) in pieces, (sequences, sequences) float64. rest: called between pieces."""
    count = sum(len(x) for x in inputs)
    mean = 0
    for x in inputs:
        mean = mean + x.float().sum(0)
        rest()
    mean = mean / count
    # Centred before the product: differences between sequences are small beside the activations themselves.
    rows = []
    for x in inputs:
        centred = (x.float() - mean).flatten(1)
        rows.append(torch.cat([centred @ (y.float() - mean).flatten(1).t() for y in inputs], dim=1))
        rest()
    return torch.cat(rows).double()


def block_outliers(
    model: nn.Module, blocks: dict[str, list[str]], batches: list[Tensor], done: Callable[[], None], residency: Residency = RESIDENT
) -> Tensor:
    """The share of each block's scores |W[i, j]| ||X[j]|| that exceed 5 times their mean over the block, (blocks,) float64.

    Raises CaloraError for weights or inputs that are not finite.
    """
    found = {}

    def count(block: str, norms: dict[str, SquaredNorms]) -> None:
        scores = [
            (dense_weight(model.get_submodule(name)).float().abs() * norms[name].squares.sqrt()).flatten()
            for name in blocks[block] if name in norms
        ]  # fmt: skip
        joined = torch.cat(scores) if scores else torch.zeros(1)
        if not torch.isfinite(joined).all():
            raise CaloraError(f"{block}: its weights or their inputs on the calibration data hold NaN or infinite values; check the model and the data")
        found[block] = float((joined > OUTLIER * joined.mean()).double().mean())
        done()

    run_blocks(model, blocks, batches, count, SquaredNorms, changes=False, residency=residency)
    return torch.tensor([found[block] for block in blocks], dtype=torch.float64)


class Rule(NamedTuple):
    """rates(sparsity, sizes, measured) -> (blocks,). measure: its companion, which calibration data is asked for; called as ``block_similarity``."""

    rates: Callable[[float, Tensor, Tensor | None], Tensor]
    measure: Callable[[nn.Module, dict[str, list[str]], list[Tensor], Callable[[], None], Residency], Tensor] | None = None


RULES = {
    "uniform": Rule(uniform), "rmi": Rule(rmi, block_similarity), "owl": Rule(owl, block_outliers), "arithmetic": Rule(arithmetic),
}  # fmt: skip


def register(name: str, rule: Rule) -> Callable[[], None]:
    """Let recipes name a rule; returns what takes it away again. Raises CaloraError for a name that is taken."""
    if name in RULES:
        raise CaloraError(f"a rule for rates is called {name!r} already; choose another name")
    RULES[name], RATES[name] = rule, rule.measure is not None

    def remove() -> None:
        del RULES[name], RATES[name]

    return remove


def targets(
    model: nn.Module, formats: dict[str, WeightFormat], recipe: Recipe, batches: list[Tensor] | None = None,
    zeros: dict[str, int] | None = None, done: Callable[[], None] = lambda: None, residency: Residency = RESIDENT,
) -> dict[str, Target]:  # fmt: skip
    """{layer: how much of it is pruned} for the sparse ones among `formats`; the model may be on the meta device.

    batches: token ids of the calibration data, for the rules that measure. zeros: {layer: weights that are pruned already}.
    done: called after each block that is measured. residency: told which weights are needed for that.
    Raises CaloraError for rates that do not fit the model.
    """
    sparse = [name for name, fmt in formats.items() if fmt.sparse]
    if isinstance(recipe.sparsity, str):
        return dict.fromkeys(sparse, parse(recipe.sparsity))
    sizes = {name: math.prod(features(model.get_submodule(name))) for name in sparse}
    if not sizes:
        return {}
    if isinstance(recipe.rates, dict):
        rates = table_rates(recipe.rates, recipe.sparsity, sizes)
    else:
        blocks, rule = find_blocks(model, sparse), RULES[recipe.rates]
        if not blocks and recipe.rates != "uniform":
            raise CaloraError(f"rates={recipe.rates!r} needs a model with a list of blocks, which this one lacks; use rates='uniform'")
        measured = None if rule.measure is None else rule.measure(model, blocks, batches, done, residency)
        rates = block_rates(rule, recipe.sparsity, sizes, blocks, measured)
    return counts(rates, recipe.sparsity, sizes, zeros or {})


def block_rates(rule: Rule, sparsity: float, sizes: dict[str, int], blocks: dict[str, list[str]], measured: Tensor | None) -> dict[str, float]:
    """{layer: rate}, the same within a block; layers outside of every block get the sparsity itself. sizes: {layer: weights}."""
    rates = dict.fromkeys(sizes, sparsity)
    if blocks:
        weights = _floats(sum(sizes[name] for name in members) for members in blocks.values())
        for members, rate in zip(blocks.values(), rule.rates(sparsity, weights, measured).tolist(), strict=True):
            rates.update(dict.fromkeys(members, rate))
    return rates


def table_rates(table: dict[str, float], sparsity: float, sizes: dict[str, int]) -> dict[str, float]:
    """{layer: rate} by a user's table, whose keys are names of layers or of what holds them ("model.layers.3"); the longest counts.

    Layers that it does not name share what is left of the sparsity. Raises CaloraError for a name that no layer has, and for a
    table that the sparsity cannot be met with.
    """
    rates, used = {}, set()
    for name in sizes:
        keys = [key for key in table if name == key or name.startswith(f"{key}.")]
        if keys:
            rates[name] = table[max(keys, key=len)]
            used.update(keys)
    unknown = [key for key in table if key not in used]
    if unknown:
        raise CaloraError(f"rates names {unknown[0]!r}, which neither is nor holds a layer that is pruned; see model.named_modules()")
    total, given = sum(sizes.values()), sum(rates[name] * sizes[name] for name in rates)
    left = sum(size for name, size in sizes.items() if name not in rates)
    if not left and abs(given / total - sparsity) > 1e-3:
        raise CaloraError(f"rates name every layer and come to {given / total:.4f}, sparsity is {sparsity}; make them agree, or leave a layer out")
    rest = (sparsity * total - given) / left if left else sparsity
    if not -1e-9 <= rest <= 1 + 1e-9:
        raise CaloraError(f"with these rates the other layers would need {rest:.4f} to reach sparsity={sparsity}; change one or the other")
    return {name: rates.get(name, rest) for name in sizes}


def counts(rates: dict[str, float], sparsity: float, sizes: dict[str, int], zeros: dict[str, int]) -> dict[str, int]:
    """{layer: weights to prune}, which add up to round(sparsity * all weights), or to the zeros where there are more already.

    zeros: {layer: weights that are pruned already and stay so}.
    """
    caps = _floats(sizes.values())
    floors = _floats(zeros.get(name, 0) for name in sizes)
    pruned = apportion(round(sparsity * sum(sizes.values())), caps * _floats(rates[name] for name in sizes), floors, caps)
    return dict(zip(sizes, pruned.tolist(), strict=True))


def _floats(values: Iterable[float]) -> Tensor:
    """On the CPU: transformers plans on the meta device, which it makes the default."""
    return torch.tensor(list(values), dtype=torch.float64, device="cpu")
