"""How much of the story is told: what is compressed, which arms are trained on which task, steps, seeds."""

from __future__ import annotations

import re
from dataclasses import dataclass

# What adapters there are, and a prompt for each.
TASKS = {"docs": "Returns the", "cpp": "template <"}
TASK_TITLES = {"docs": "docstrings of torch's modules", "cpp": "torch's C++ headers"}

DENSE = "dense"
FORMATS = {
    "int8": {"weights": "int8"},
    "int4 g64": {"weights": "int4", "group_size": 64},
    # The harshest of the dense formats: one scale per row, for the embeddings and the output head tied to them as well.
    "int4 everywhere": {"weights": "int4", "group_size": -1, "embeddings": "int4"},
    # Pruned and rounded together, by SparseGPT on text of both tasks.
    "2:4 int4": {"weights": "int4", "sparsity": "2:4"},
    "70 % int4": {"weights": "int4", "sparsity": 0.7},
}  # fields of a Recipe
HARSHEST = "70 % int4"

# What is beside the base, by the published shorthand: i inherited LoRA, rd a fresh one, rc recovery modules, d distillation
# from the dense model with its LoRA. The first two are not trained; "i" on the dense model is the ceiling.
ARMS = {
    "none": "no adapter",
    "inherited": "LoRA as it came",
    "rd": "LoRA from scratch",
    "i": "LoRA trained on",
    "i-big": "larger LoRA trained on",
    "i-rc-d": "CA-LoRA",
}
UNTRAINED = ("none", "inherited")
TRAINED = tuple(arm for arm in ARMS if arm not in UNTRAINED)


def file_name(*parts: str) -> str:
    """Titles as part of a file's name."""
    return re.sub(r"[^a-z0-9]+", "-", " ".join(parts).lower()).strip("-")


@dataclass(frozen=True)
class Plan:
    """formats: evaluated, names of FORMATS. trained: (task, format) pairs on which all TRAINED arms are run, and the ceiling.
    steps of batch_size windows of 256 tokens, for each of the seeds. learning_rates: each arm takes the one that is best for it
    on the validation text (first seed); None: the packaged results' choice. windows: of held-out text per evaluation.
    new_tokens: generated per timing. bench_seconds: per peer of the kernel timing."""

    formats: tuple[str, ...] = tuple(FORMATS)
    trained: tuple[tuple[str, str], ...] = (("docs", HARSHEST),)
    arms: tuple[str, ...] = TRAINED
    steps: int = 150
    seeds: tuple[int, ...] = (0,)
    batch_size: int = 2
    learning_rates: tuple[float, ...] | None = None
    windows: int = 64
    new_tokens: int = 16
    bench_seconds: float = 1.0


QUICK = Plan()
FULL = Plan(
    trained=(*(("docs", form) for form in (HARSHEST, "2:4 int4", "int4 everywhere")), ("cpp", HARSHEST)),
    steps=240,
    seeds=(0, 1, 2),
    learning_rates=(2e-4, 1e-3),
)
