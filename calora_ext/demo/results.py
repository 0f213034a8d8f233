"""The rows of the demo: one measurement each, which row counts where several exist, and the verdict they allow."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, stdev

from .plan import DENSE

WORTH_RECOVERING = 0.02  # nats
ASKED = 0.8  # of a gap, to be closed
LEARNING_RATE = 1e-3  # where no packaged result chose one


@dataclass(frozen=True)
class Row:
    """Held-out loss (nats per token) of an arm on a task. losses: one per seed, a single one where nothing was trained.
    bytes: of the weight files of model and adapter. packaged: measured by `calora demo --full` before the package was made."""

    task: str
    format: str
    arm: str
    losses: tuple[float, ...]
    bytes: int
    steps: int = 0
    learning_rate: float | None = None
    parameters: int = 0
    tokens_per_second: float | None = None
    packaged: bool = False

    @property
    def loss(self) -> float:
        return mean(self.losses)

    @property
    def sd(self) -> float:
        return stdev(self.losses) if len(self.losses) > 1 else 0.0

    def to_dict(self) -> dict:
        return {**asdict(self), "losses": list(self.losses), "loss": self.loss, "sd": self.sd}


class Rows:
    """Rows by (task, format, arm); the first one given counts, so live rows go before packaged ones."""

    def __init__(self, rows: Iterable[Row]) -> None:
        self._by_key: dict[tuple[str, str, str], Row] = {}
        for row in rows:
            self._by_key.setdefault((row.task, row.format, row.arm), row)

    def get(self, task: str, form: str, arm: str) -> Row | None:
        return self._by_key.get((task, form, arm))

    def __iter__(self):
        return iter(self._by_key.values())

    def verdict(self, task: str, form: str, worth: float = WORTH_RECOVERING, unit: str = "nats") -> dict | None:
        """How much of what compression cost the adapter CA-LoRA brings back, or None where an arm is missing that the answer needs.

        worth, unit: the smallest gap that is worth recovering, in the unit of the losses. ``met``: 80 % of it is closed, and both LoRAs
        are behind by more than a standard deviation; where there is nothing to recover, that CA-LoRA is not worse than what was inherited.
        """
        arms = {arm: self.get(task, form, arm) for arm in ("inherited", "i", "i-big", "i-rc-d")}
        came, trained_on = self.get(task, DENSE, "inherited"), self.get(task, DENSE, "i")
        if None in (arms["inherited"], arms["i-rc-d"], came, trained_on):
            return None
        ours, inherited = arms["i-rc-d"], arms["inherited"].loss
        # Training on can overfit: the ceiling is the better of the dense model's two LoRAs, so that a gap is never flattered.
        ceiling = min(came, trained_on, key=lambda row: row.loss)
        gap = inherited - ceiling.loss
        large = gap >= worth and gap >= 3 * max(ceiling.sd, ours.sd)
        found = {
            "task": task, "format": form, "ceiling": ceiling.loss, "inherited": inherited, "ca_lora": ours.loss, "gap": gap,
            "closed": (inherited - ours.loss) / gap if large else None, "seeds": len(ours.losses), "packaged": ours.packaged,
        }  # fmt: skip
        if not large:
            worse = ours.loss - inherited
            says = f"nothing to recover: the gap is {gap:.4f} {unit}; CA-LoRA is {abs(worse):.4f} {'worse' if worse > 0 else 'better'} than inherited"
            return found | {"says": says, "met": ours.loss - ours.sd <= inherited}
        if None in arms.values():
            return None
        met = found["closed"] >= ASKED
        says = f"CA-LoRA closes {100 * found['closed']:.0f} % of the gap of {gap:.4f} {unit}"
        for arm, name in (("i", "the LoRA trained on"), ("i-big", "the larger LoRA")):
            ahead, sd = arms[arm].loss - ours.loss, max(arms[arm].sd, ours.sd)
            found[f"ahead_of_{arm}"] = ahead
            met &= ahead > sd
            says += f"; {name}: {ahead:+.4f}" + (f" ({ahead / sd:.0f} sd)" if sd else "")
        return found | {"says": says, "met": met}


def packaged(assets: Path) -> list[Row]:
    """Trained rows of the `calora demo --full` that was run before the package was made; none if it holds no such file."""
    path = assets / "full.json"
    if not path.is_file():
        return []
    rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
    names = Row.__dataclass_fields__
    made = [Row(**{k: tuple(v) if k == "losses" else v for k, v in row.items() if k in names} | {"packaged": True}) for row in rows]
    return [row for row in made if row.steps]
