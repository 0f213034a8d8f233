"""What a run of ``adapt`` did: a table for people, ``to_dict`` for JSON."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field


@dataclass(frozen=True)
class AdaptResult:
    """adapter_name: where the trained adapter is resident. arm: published shorthand, e.g. "i-rc-d" (inherited, recovery, distilled).

    history: one row per optimiser step. eval_before, eval_after: {"loss", and for classification "accuracy"} on eval_data: of
    the model with the adapter as it is attached (the inherited branches; fresh ones change nothing yet), without the start that
    ``Recovery(init="residual")`` then gives it, and with the adapter as it was kept; None without eval_data. parameters: trained ones by kind. adapter_bytes: in fp32.
    run: every setting, and hashes of what went in. peak_rss_bytes: of the whole process so far. resumed_at: the step of the checkpoint it went on from.
    kept_step: the step whose parameters were kept for their loss on eval_data; None if that was not asked for (the last one was).
    """

    adapter_name: str
    arm: str
    task: str
    data: str
    max_length: int
    steps: int
    history: list[dict] = field(repr=False)
    eval_before: dict | None
    eval_after: dict | None
    parameters: dict[str, int]
    adapter_bytes: int
    seconds: float
    tokens_per_second: float
    peak_rss_bytes: int
    resumed_at: int
    run: dict = field(repr=False)
    kept_step: int | None = None

    @property
    def losses(self) -> list[float]:
        return [row["loss"] for row in self.history]

    def to_dict(self) -> dict:
        return asdict(self)

    def __str__(self) -> str:
        rows = [("adapter", f"{self.adapter_name} ({self.arm})"), ("data", f"{self.data}, {self.task}")]
        if self.history:
            first, last = self.history[0], self.history[-1]
            terms = ", ".join(f"{k} {last[k]:.4f}" for k in ("task", "hidden", "logits") if k in last)
            rows.append(("loss", f"{first['loss']:.4f} -> {last['loss']:.4f} ({terms}) in {self.steps} steps"))
        if self.kept_step is not None:
            rows.append(("kept", f"step {self.kept_step}, the lowest held-out loss"))
        for name in self.eval_after or ():
            rows.append((f"held-out {name}", f"{self.eval_before[name]:.4f} -> {self.eval_after[name]:.4f}"))
        counts = ", ".join(f"{k} {n:,}" for k, n in self.parameters.items() if n)
        rows.append(("trained", f"{counts} parameters, {self.adapter_bytes / 1e6:.2f} MB"))
        rows.append(
            (
                "time",
                f"{self.seconds:.1f} s, {self.tokens_per_second:,.0f} tokens/s, peak memory {self.peak_rss_bytes / 1e6:,.0f} MB",
            )
        )
        width = max(len(name) for name, _ in rows)
        return "\n".join(f"{name:{width}}  {value}" for name, value in rows)
