"""What a run of ``sparse_adapt`` did: tables for people, ``to_dict`` for JSON."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field

from ..compression.report import Outcome
from ..recipe import Recipe
from ..tables import format_bytes, table

COLUMNS = ("pruning", "pruned", "pruned per block", "mean rank", "rank per block", "steps", "training loss")


@dataclass(frozen=True)
class SparseAdaptResult:
    """recipe: as applied, nothing left to default. phases: one row per pruning {"pruning", "pruned", "weights", "sparsity", and by
    block "rates", "errors", "ranks"; "mean_rank", "steps"}. history: one row per optimiser step of all phases.

    eval_dense, eval_merged, eval_packed: {"loss", ...} on eval_data of the model as it came, of the sparse one with fp32 weights, and
    as it is packed; None without eval_data. outcome: rounding error of every layer, and what is not kept. bytes_before, bytes_after: of
    the whole model. resumed_at: optimiser steps that an earlier run had done. run: every setting, and hashes of what went in.
    """

    recipe: Recipe
    task: str
    data: str
    max_length: int
    phases: list[dict]
    history: list[dict] = field(repr=False)
    outcome: Outcome = field(repr=False)
    eval_dense: dict | None
    eval_merged: dict | None
    eval_packed: dict | None
    bytes_before: int
    bytes_after: int
    seconds: float
    tokens_per_second: float
    peak_rss_bytes: int
    resumed_at: int
    run: dict = field(repr=False)

    @property
    def sparsity(self) -> float:
        """The share of weights that are not kept, over all sparse layers."""
        return self.outcome.sparsity

    @property
    def errors(self) -> dict[str, float]:
        """What packing changed: ||W - What|| / ||W|| of every layer's merged weight, by rounding (and, with gptq, making up for it)."""
        return self.outcome.errors

    @property
    def losses(self) -> list[float]:
        return [row["loss"] for row in self.history]

    def to_dict(self) -> dict:
        return {**asdict(self), "recipe": self.recipe.to_dict(), "sparsity": self.sparsity}

    def phase_table(self) -> tuple[tuple[str, ...], list[tuple]]:
        """Columns and rows: one per pruning."""
        rows, start = [], 0
        for phase in self.phases:
            rates, ranks = phase["rates"].values(), phase["ranks"].values()
            losses = self.losses[start : start + phase["steps"]]
            start += phase["steps"]
            rows.append((
                phase["pruning"], f"{100 * phase['sparsity']:.2f} %", f"{100 * min(rates):.1f} to {100 * max(rates):.1f} %", f"{phase['mean_rank']:.1f}",
                f"{min(ranks)} to {max(ranks)}", phase["steps"], f"{losses[0]:.4f} -> {losses[-1]:.4f}" if losses else None,
            ))  # fmt: skip
        return COLUMNS, rows

    def rows(self) -> list[tuple[str, str]]:
        """(quantity, value) of the end."""
        rows = [("data", self.data), ("weights pruned", f"{100 * self.sparsity:.2f} %")]
        for name in self.eval_dense or ():
            found = (self.eval_dense[name], self.eval_merged[name], self.eval_packed[name])
            rows.append((f"held-out {name}: dense, merged, packed", ", ".join(f"{v:.4f}" for v in found)))
        worst = max(self.errors.items(), key=lambda item: item[1])
        rows.append(("largest change by packing", f"{worst[1]:.4f} of {worst[0]}"))
        rows.append(("weights", f"{format_bytes(self.bytes_before)} -> {format_bytes(self.bytes_after)}"))
        rows.append(("time", f"{self.seconds:.1f} s, {self.tokens_per_second:,.0f} tokens per second while training"))
        return [*rows, ("peak memory", format_bytes(self.peak_rss_bytes))]

    def __str__(self) -> str:
        return "\n\n".join([table(*self.phase_table()), table(("LoSA", str(self.recipe.format())), self.rows())])
