"""How much of the demo's story is told: formats, arms, steps, seeds."""

from __future__ import annotations

from dataclasses import dataclass

# What is trained and against what, by the published shorthand: i inherited LoRA, rd a fresh one, rc recovery modules,
# d distillation from the dense model with its LoRA. "ceiling" trains the dense model's LoRA on the same text.
ARMS = {
    "ceiling": "dense + LoRA, trained on",
    "rd": "+ LoRA from scratch",
    "i": "+ LoRA, inherited, trained on",
    "i-big": "+ larger LoRA, inherited, trained on",
    "i-rc-d": "+ CA-LoRA",
}
FORMATS = {
    "int8": {"weights": "int8"},
    "int4 g64": {"weights": "int4", "group_size": 64},
    "int4 row": {"weights": "int4", "group_size": -1},
    # The harshest there is: one scale per row, for the embeddings and the output head tied to them as well.
    "int4 everywhere": {"weights": "int4", "group_size": -1, "embeddings": "int4"},
}  # fields of a Recipe


@dataclass(frozen=True)
class Plan:
    """formats: evaluated, names of FORMATS. trained: names among them that the arms are trained on. arms: names of ARMS.
    steps of batch_size windows of 256 tokens; windows: of held-out text per evaluation, None for all of it. new_tokens:
    generated per timing. bench_seconds: per peer of the kernel timing."""

    formats: tuple[str, ...] = tuple(FORMATS)
    trained: tuple[str, ...] = ("int4 everywhere",)
    arms: tuple[str, ...] = ("ceiling", "i", "i-rc-d")
    steps: int = 150
    seeds: tuple[int, ...] = (0,)
    batch_size: int = 4
    learning_rate: float = 1e-3
    windows: int | None = 96
    new_tokens: int = 48
    bench_seconds: float = 1.0


QUICK = Plan()
FULL = Plan(trained=("int4 row", "int4 everywhere"), arms=tuple(ARMS), steps=300, seeds=(0, 1, 2), windows=None)
