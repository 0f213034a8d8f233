"""What is trained and against what: the LoRA, the recovery modules, the distillation (CA-LoRA, arXiv 2307.07705)."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from ..errors import CaloraError

Sites = str | Iterable[str]  # "all", a regular expression for the whole module path, or names matched as suffixes (PEFT's rules)


TAUGHT_LOGITS = 16.0  # weight of the KL divergence from a teacher that knows the task


@dataclass(frozen=True)
class Lora:
    """The LoRA branch: y += alpha / rank * (dropout(x) A^T) B^T.

    rank: of every target. alpha: default 2 * rank, or the inherited scale if an adapter is inherited. targets: "all" (every compressed linear),
    a list of names (the ends of module paths) or a regular expression for whole paths. With an inherited adapter this asks
    for a larger one: the added rows start as a fresh LoRA does, so that the start is still what was inherited.
    """

    rank: int = 16
    alpha: float | None = None
    targets: Sites = "all"
    dropout: float = 0.0

    def __post_init__(self) -> None:
        _check_branch("Lora", self.rank, self.alpha, self.dropout)


@dataclass(frozen=True)
class Recovery:
    """The recovery modules: y += alpha / rank * GELU(dropout(x) D^T) U^T beside the linear layers, with the erf GELU.

    rank: of every site. sites: as ``Lora.targets``. dropout: one probability, or {name or regular expression of a site: probability}.
    init: "zero", D uniform and U = 0, so that training starts from the model without recovery, or "residual", the best low-rank
    part of W - Ŵ for the data's inputs, which needs the teacher. alpha: default rank (scale 1).
    """

    rank: int = 32
    sites: Sites = "all"
    dropout: float | Mapping[str, float] = 0.0
    init: str = "zero"
    alpha: float | None = None

    def __post_init__(self) -> None:
        rates = list(self.dropout.values()) if isinstance(self.dropout, Mapping) else [self.dropout]
        for rate in rates or [0.0]:
            _check_branch("Recovery", self.rank, self.alpha, rate)
        if self.init not in ("zero", "residual"):
            raise CaloraError(f'Recovery(init={self.init!r}) is not supported; init is "zero" or "residual"')

    @property
    def scale(self) -> float:
        return 1.0 if self.alpha is None else self.alpha / self.rank

    def dropout_at(self, path: str) -> float:
        if isinstance(self.dropout, Mapping):
            return next((rate for sites, rate in self.dropout.items() if matches(path, [sites]) or matches(path, sites)), 0.0)
        return self.dropout


@dataclass(frozen=True)
class Distill:
    """Distillation from the teacher: loss += sum of weight * MSE(hidden states) + logits * KL(teacher || student).

    hidden: {which: weight}. An index counts into transformers' ``hidden_states``: 0 is the embeddings, i the output of the
    i-th block, which is the input of the next; -1 is the last one, after the final norm, and -2 therefore the *input of the
    last block*. Encoder-decoder models have two stacks: "encoder:-2", "decoder:-2" (a bare index is the decoder's).
    logits, temperature: weight of the KL divergence at that temperature, times temperature squared, over predicted positions.
    None weighs it 16 if the teacher has an adapter, inherited or its own, that is if it was trained on the task, else 0. A large
    weight matters: the labels alone, seen before, make a small adapter overfit; a published run (``presets``) has none.
    mask_padding: leave padding out of the MSE (the published code counts it).

    The dropout that the model itself has is off while it is distilled, as the teacher's is; that of ``Lora`` and ``Recovery`` acts.
    """

    hidden: Mapping[int | str, float] = field(default_factory=lambda: {-1: 0.05})
    logits: float | None = None
    temperature: float = 1.0
    mask_padding: bool = True

    def __post_init__(self) -> None:
        for key, weight in self.hidden.items():
            hidden_index(key)
            _check_weight(f"Distill(hidden={{{key!r}: ...}})", weight)
        if self.logits is not None:
            _check_weight("Distill(logits=...)", self.logits)
        if not (math.isfinite(self.temperature) and self.temperature > 0):
            raise CaloraError(f"Distill(temperature={self.temperature}) must be positive")
        if not any(self.hidden.values()) and self.logits == 0:
            raise CaloraError("Distill has no weight above 0; pass distill=None to train without a teacher")

    def resolve(self, taught: bool) -> Distill:
        """With a number for logits. taught: whether the teacher has an adapter."""
        return self if self.logits is not None else replace(self, logits=TAUGHT_LOGITS if taught else 0.0)

    def targets(self) -> dict[str, tuple[str, int]]:
        """{"decoder:-1": ("decoder", -1), ...}: the hidden states with a weight, by a name that does not depend on the spelling."""
        return {f"{s}:{i}": (s, i) for s, i in (hidden_index(k) for k, weight in self.hidden.items() if weight)}

    def weights(self) -> dict[str, float]:
        return {"{}:{}".format(*hidden_index(k)): weight for k, weight in self.hidden.items() if weight}


def hidden_index(key: int | str) -> tuple[str, int]:
    """-1 -> ("decoder", -1); "encoder:-2" -> ("encoder", -2)."""
    if isinstance(key, int) and not isinstance(key, bool):
        return "decoder", key
    found = re.fullmatch(r"(?:(encoder|decoder):)?(-?\d+)", key) if isinstance(key, str) else None
    if found is None:
        raise CaloraError(f'a hidden state is named by an index or like "encoder:-2", got {key!r}')
    return found[1] or "decoder", int(found[2])


def matches(path: str, sites: Sites) -> bool:
    """Whether a module path is chosen: "all" chooses each, a string is a regular expression for the whole, names match as suffixes."""
    if isinstance(sites, str):
        return sites == "all" or re.fullmatch(sites, path) is not None
    return any(path == name or path.endswith(f".{name}") for name in sites)


def _check_branch(what: str, rank: int, alpha: float | None, dropout: float) -> None:
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
        raise CaloraError(f"{what}(rank={rank!r}) must be a whole number of at least 1")
    if alpha is not None and not (math.isfinite(alpha) and alpha > 0):
        raise CaloraError(f"{what}(alpha={alpha}) must be positive")
    if not 0.0 <= dropout < 1.0:
        raise CaloraError(f"{what}(dropout={dropout}) must lie in [0, 1)")


def _check_weight(what: str, weight: float) -> None:
    if not (math.isfinite(weight) and weight >= 0):
        raise CaloraError(f"{what} must be at least 0, got {weight}")
