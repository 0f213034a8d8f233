"""Recovery that starts from what compression lost: the best low-rank part of W - Ŵ as the inputs see it, without training.

A recovery module is not linear, but the erf GELU nearly is around 0: 2 / e GELU(e z) = z + 0.8 e z² + O(e³ z⁴). So each of its
rows carries one direction of the residual, and training bends it from there. (Pairs of rows make GELU(z) - GELU(-z) = z exact,
at half the rank: that was worse, trained and untrained.)
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor, nn

from ..adapters import adapter_banks
from ..compression.calibrate import MIN_TOKENS, Gram, Statistics, find_blocks, inputs_of, run_blocks
from ..errors import CaloraError
from ..evaluate import evaluating
from ..io.batches import Sample
from ..linear import CompressedLinear, dense_weight
from ..lowrank import Factors
from ..progress import progress
from .teacher import unwrapped

TOKENS = 16384  # of the training data, at most, for the statistics of the inputs
BATCH, CUT = 512, 1.25  # tokens in a forward pass of several samples; how much longer than the shortest of them one may be
# e, the standard deviation of what enters the GELU: nearly linear is best where it stays, but U, which goes with 1 / e, then hardly moves
# in training.
UNTRAINED_BEND, TRAINED_BEND = 0.05, 0.25
DAMPING = 1e-4  # of the mean of the inputs' second moments


def start_from_residual(
    student: nn.Module, name: str, teacher: nn.Module, inherited: Collection[str], samples: list[Sample], bend: float, seed: int
) -> None:
    """Give the recovery branches of an adapter their start from the residual, but for those that were inherited.

    Arguments as of ``from_residual``; name: of the adapter, active on the student.
    """
    branches = {path: bank.branches(name) for path, bank in adapter_banks(student, name).items() if path not in inherited}
    fresh = {path: recovery for path, (_, recovery) in branches.items() if recovery is not None}
    for path, recovery in from_residual(student, teacher, fresh, samples, bend, seed).items():
        adapter_banks(student, name)[path].add(name, branches[path][0], recovery)


def from_residual(
    student: nn.Module, teacher: nn.Module, fresh: dict[str, Factors], samples: list[Sample], bend: float, seed: int
) -> dict[str, Factors]:
    """Recovery branches with GELU(x Dᵀ) Uᵀ · scale near x (W - Ŵ)ᵀ for the student's inputs x, by module path.

    student: compressed, with what it has of adapters active. teacher: the dense model. fresh: the branches as they are without this, D random
    and U = 0; rows that the residual does not need stay so. samples: their first 16384 tokens are run. bend: e, above. The best product of a rank is the
    truncated SVD of (W - Ŵ) L over L⁻¹ x, where L Lᵀ is the second moment of x. Layers without a residual or without inputs
    are left out. Raises CaloraError where the teacher has no such layer, for values that are not finite, and for fewer than 64 tokens.
    """
    lossy = [path for path in fresh if residual(student, teacher, path).any()]
    blocks = find_blocks(student, lossy)
    outside = sorted(set(lossy) - {path for members in blocks.values() for path in members})  # a pooler, an output head
    factors: dict[str, Factors] = {}
    generator = torch.Generator().manual_seed(seed)

    def visit(_: str | None, inputs: dict[str, Gram]) -> None:
        roots: dict[int, Tensor] = {}  # q, k and v share their inputs
        for path, gram in inputs.items():
            if not gram.squares.any():
                continue
            if id(gram) not in roots:
                roots[id(gram)] = root(gram.matrix / gram.tokens)
            start, left = fresh[path], residual(student, teacher, path)
            rank = min(start.rank, *left.shape)
            down, up = truncated(left, roots[id(gram)], rank, generator)
            down = torch.cat((bend * down, start.down[rank:].to(down)))
            up = torch.cat((2 / (bend * start.scale) * up, start.up[:, rank:].to(up)), 1)
            factors[path] = Factors(down, up, start.scale)
        bar.update()

    if lossy:
        batches = sample_batches(samples)
        with progress(None, "residuals", "block", len(blocks) + bool(outside)) as bar:
            if blocks:
                run_blocks(student, blocks, batches, visit, changes=False)
            if outside:
                visit(None, _inputs(student, outside, batches))
    return factors


def sample_batches(samples: list[Sample]) -> list[Tensor]:
    """Token ids (sequences, length) of about the first 16384 tokens. Samples of similar length go together, cut to the shortest of
    them, so that none is padded and each begins as in training: texts that were joined would show an encoder other inputs."""
    lengths = torch.tensor([len(sample["input_ids"]) for sample in samples])
    if lengths.sum() < MIN_TOKENS:
        raise CaloraError(f'Recovery(init="residual") needs {MIN_TOKENS} tokens of data, got {lengths.sum()}; use init="zero"')
    count = int((lengths.cumsum(0) < TOKENS).sum()) + 1
    batches: list[list[Tensor]] = []
    for ids in sorted((sample["input_ids"] for sample in samples[:count]), key=len):
        shortest = len(batches[-1][0]) if batches else 0
        if len(ids) > CUT * shortest or (len(batches[-1]) + 1) * shortest > BATCH:
            batches.append([])
        batches[-1].append(ids)
    return [torch.stack([ids[: len(batch[0])] for ids in batch]) for batch in batches]


def _inputs(student: nn.Module, paths: list[str], batches: list[Tensor]) -> dict[str, Gram]:
    """What enters layers that no block holds."""
    statistics = Statistics({path: student.get_submodule(path) for path in paths})
    try:
        with evaluating(student), torch.no_grad():
            for ids in batches:
                student(**inputs_of(student, ids))
    finally:
        statistics.remove()
    return statistics.of


def residual(student: nn.Module, teacher: nn.Module, path: str) -> Tensor:
    """W - Ŵ of a layer, (out, in) float32. Raises CaloraError where the teacher has no such layer, and for weights that are not finite."""
    layer = student.get_submodule(path)
    ours = layer.decode() if isinstance(layer, CompressedLinear) else dense_weight(layer)
    try:
        layer = unwrapped(teacher).get_submodule(path)
    except AttributeError:
        raise CaloraError(f"the teacher has no layer {path}; distil from the model that was compressed") from None
    layer = getattr(layer, "base_layer", layer)
    theirs = layer.decode() if isinstance(layer, CompressedLinear) else dense_weight(layer)
    if ours.shape != theirs.shape:
        raise CaloraError(
            f"{path} is {tuple(theirs.shape)} in the teacher and {tuple(ours.shape)} here; distil from the model that was compressed"
        )
    left = theirs.to(ours.device).float() - ours.float()
    if not torch.isfinite(left).all():
        raise CaloraError(f"{path}: the weight of the teacher or the student holds NaN or infinite values; check both models")
    return left


def root(moment: Tensor) -> Tensor:
    """Lower triangular L, (in, in) float32, with L Lᵀ = moment + damping. Raises CaloraError for a moment that is not finite."""
    damped = moment.double()
    damped.diagonal().add_(DAMPING * damped.diagonal().mean())
    lower, failed = torch.linalg.cholesky_ex(damped)
    if failed or not torch.isfinite(lower).all():
        raise CaloraError("the inputs of a layer are NaN or infinite on this data; check the model and the data")
    return lower.float()


def truncated(matrix: Tensor, lower: Tensor, rank: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """D (rank, in) and U (out, rank): U D x is the best product of that rank near matrix x, where L Lᵀ is the second moment of
    x and the entries of D x have variance 1. By a randomised SVD (Halko et al., arXiv 0909.4061) with four power iterations."""
    seen = matrix @ lower
    probes = torch.randn(matrix.shape[1], min(rank + 8, *matrix.shape), generator=generator).to(seen)
    for _ in range(4):
        probes = torch.linalg.qr(seen.t() @ torch.linalg.qr(seen @ probes).Q).Q
    basis = torch.linalg.qr(seen @ probes).Q  # (out, rank + 8)
    u, s, vt = torch.linalg.svd(basis.t() @ seen, full_matrices=False)
    down = torch.linalg.solve_triangular(lower, vt[:rank], upper=False, left=False)
    return down, (basis @ u[:, :rank]) * s[:rank]
