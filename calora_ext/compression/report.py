"""What compression did: coverage, bytes, and the error it made in every layer."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from torch import Tensor

from .. import ops
from ..embedding import CompressedEmbedding
from ..formats.layout import CHUNK
from ..linear import CompressedLinear
from ..policy import Coverage
from ..recipe import Recipe
from ..tables import format_bytes, table


def relative_error(dense: Tensor, layer: CompressedLinear | CompressedEmbedding) -> float:
    """||W - What|| / ||W|| (Frobenius) of a dense weight (out, in); 0 for a weight of zeros that stayed so."""
    packed, norm, error = list(layer.packed_tensors().values()), 0.0, 0.0
    step = max(1, CHUNK // layer.in_features)
    for begin in range(0, layer.out_features, step):  # a few rows at a time: no second dense copy
        rows = slice(begin, min(begin + step, layer.out_features))
        want = dense[rows].float()
        norm += float(want.square().sum())
        error += float((want - ops.decode(packed, layer.format, layer.in_features, layer.out_features, rows)).square().sum())
    return math.sqrt(error / norm) if norm > 0 else math.sqrt(error)


@dataclass
class Outcome:
    """What happened to each module, by dotted name.

    errors: relative error of each compressed weight, ||W - What|| / ||W|| (Frobenius). pruned: of each sparse weight, how many are
    not kept, and of how many. uncalibrated: layers that no calibration token reached, which were done as if there were none.
    """

    errors: dict[str, float] = field(default_factory=dict)
    pruned: dict[str, tuple[int, int]] = field(default_factory=dict)
    uncalibrated: list[str] = field(default_factory=list)

    @property
    def sparsity(self) -> float | None:
        """The share of weights that are not kept over all sparse layers; None where there are none."""
        weights = sum(size for _, size in self.pruned.values())
        return sum(pruned for pruned, _ in self.pruned.values()) / weights if weights else None


@dataclass(frozen=True)
class Report:
    """recipe: as applied, nothing left to default. coverage: every module, compressed or not, and why. outcome: what it cost.
    seconds: how long it took.
    """

    recipe: Recipe
    coverage: Coverage
    outcome: Outcome
    seconds: float = 0.0

    @property
    def errors(self) -> dict[str, float]:
        """Relative error of each compressed weight."""
        return self.outcome.errors

    @property
    def bytes_before(self) -> int:
        return self.coverage.dense_nbytes

    @property
    def bytes_after(self) -> int:
        return self.coverage.nbytes

    def to_dict(self) -> dict:
        return {
            "recipe": self.recipe.to_dict(), "bytes_before": self.bytes_before, "bytes_after": self.bytes_after,
            "seconds": self.seconds, "errors": self.errors, "coverage": self.coverage.to_dict(), "sparsity": self.outcome.sparsity,
            "layer_sparsity": {name: pruned / size for name, (pruned, size) in self.outcome.pruned.items()},
            "uncalibrated": self.outcome.uncalibrated,
        }  # fmt: skip

    def __str__(self) -> str:
        worst = sorted(self.errors.items(), key=lambda item: -item[1])[:5]
        ratio = self.bytes_before / max(self.bytes_after, 1)
        return "\n".join([
            str(self.coverage), "",
            table(("largest errors", "relative error"), [(name, f"{error:.4f}") for name, error in worst]), "", *self.notes(),
            f"{format_bytes(self.bytes_before)} -> {format_bytes(self.bytes_after)} ({ratio:.2f} times smaller) in {self.seconds:.1f} s",
        ])  # fmt: skip

    def _rates(self) -> str:
        if self.recipe.rates == "uniform":
            return ""
        return ", rates of a table" if isinstance(self.recipe.rates, dict) else f", rates {self.recipe.rates}"

    def notes(self) -> list[str]:
        """Sentences on what was pruned, and on layers that the calibration data did not reach."""
        notes = []
        if self.outcome.sparsity is not None:
            shares = [pruned / size for pruned, size in self.outcome.pruned.values()]
            weights = sum(size for _, size in self.outcome.pruned.values())
            notes.append(
                f"{self.recipe.pruner}{self._rates()}: {100 * self.outcome.sparsity:.2f} % of {weights:,} weights pruned, "
                f"{100 * min(shares):.2f} to {100 * max(shares):.2f} % of a layer"
            )
        if self.outcome.uncalibrated:
            done = "pruned by magnitude and rounded to nearest" if self.recipe.sparsity is not None else "rounded to nearest"
            names = self.outcome.uncalibrated
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            notes.append(f"no calibration token reached {', '.join(names[:3])}{more}: {done}")
        return notes
