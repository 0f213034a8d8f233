"""The loss: task cross-entropy + sum of lambda_k MSE(hidden_k) + lambda KL(logits).

Every term is a sum over a micro-batch divided by a count over the *whole* step, so that accumulating gradients over
micro-batches is the same as one large batch, whatever the padding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..errors import CaloraError
from ..evaluate import task_loss
from ..io.batches import IGNORED, Batch
from .config import Distill


@dataclass(frozen=True)
class Targets:
    """What a teacher says about a batch. hidden: {"decoder:-1": (B, T, width)}. logits: (B, T, vocabulary), or for
    classification (B, classes). top: instead of logits, (log-probabilities (B, T, k), token ids (B, T, k)) at the temperature."""

    hidden: dict[str, Tensor]
    logits: Tensor | None = None
    top: tuple[Tensor, Tensor] | None = None


def hidden_state(output, stack: str, index: int) -> Tensor:
    """One hidden state of a transformers output; CaloraError where the model has no such stack or layer."""
    states = getattr(output, f"{stack}_hidden_states", None)
    if states is None:
        if stack == "encoder":
            raise CaloraError("the model has no encoder; name a hidden state of a decoder by its index alone")
        states = output.hidden_states
    if not -len(states) <= index < len(states):
        raise CaloraError(
            f"there is no hidden state {index}: the model has {len(states)}, from the embeddings (0) to the last ({len(states) - 1})"
        )
    return states[index]


def mask_of(batch: Batch, stack: str, task: str) -> Tensor:
    """(B, T) bool: the positions of a stack that are not padding."""
    return batch["labels"] != IGNORED if task == "seq2seq-lm" and stack == "decoder" else batch["attention_mask"].bool()


class Objective:
    """The loss of a task with an optional distillation. ``loss`` sums its terms over one micro-batch of a step."""

    def __init__(self, task: str, distill: Distill | None) -> None:
        self.task, self.distill = task, distill

    def counts(self, batches: Sequence[Batch]) -> dict[str, int]:
        """What each term is divided by: predictions, and positions of each stack, in a whole step."""
        shift = self.task == "causal-lm"
        counts = {"predictions": sum(int((b["labels"][:, 1:] if shift else b["labels"]).ne(IGNORED).sum()) for b in batches)}
        if self.distill is not None:
            for stack, _ in self.distill.targets().values():
                masks = [mask_of(b, stack, self.task) for b in batches]
                counts[stack] = sum(int(m.sum()) if self.distill.mask_padding else m.numel() for m in masks)
        return counts

    def loss(self, student: nn.Module, batch: Batch, targets: Targets | None, counts: dict[str, int]) -> dict[str, Tensor]:
        """{"task", and with targets "hidden", "logits"}: terms to be added up, already weighted and divided."""
        wanted = {} if targets is None else self.distill.targets()
        summed, _, output = task_loss(student, batch, self.task, output_hidden_states=bool(wanted))
        terms = {"task": summed / max(1, counts["predictions"])}
        if wanted:
            weights = self.distill.weights()
            terms["hidden"] = sum(
                weights[name]
                * self._squared_error(hidden_state(output, stack, index), targets.hidden[name], batch, stack)
                / max(1, counts[stack])
                for name, (stack, index) in wanted.items()
            )
        if targets is not None and self.distill.logits:
            kl = self._divergence(output.logits, targets, batch)
            terms["logits"] = self.distill.logits * self.distill.temperature**2 * kl / max(1, counts["predictions"])
        return terms

    def _squared_error(self, ours: Tensor, theirs: Tensor, batch: Batch, stack: str) -> Tensor:
        """Sum over positions of the mean over the width, in fp32."""
        if ours.shape != theirs.shape:
            raise CaloraError(
                f"student and teacher have hidden states of width {ours.shape[-1]} and {theirs.shape[-1]}; distil from the model that was compressed"
            )
        error = (ours.float() - theirs.to(ours.device).float()).square().mean(-1)
        if self.distill.mask_padding:
            error = error * mask_of(batch, stack, self.task).to(error.device)
        return error.sum()

    def _divergence(self, ours: Tensor, targets: Targets, batch: Batch) -> Tensor:
        """Sum over predicted positions of KL(teacher || student) at the temperature, in fp32."""
        q = (ours.float() / self.distill.temperature).log_softmax(-1)
        if targets.top is not None:
            p, ids = (t.to(q.device) for t in targets.top)
            q = q.gather(-1, ids)
            kl = (p.exp() * (p - q)).sum(-1) + _rest(p, q)
        else:
            if targets.logits.shape != ours.shape:
                raise CaloraError(
                    f"student and teacher have {ours.shape[-1]} and {targets.logits.shape[-1]} outputs and cannot be compared"
                )
            p = (targets.logits.to(q.device).float() / self.distill.temperature).log_softmax(-1)
            kl = (p.exp() * (p - q)).sum(-1)
        if self.task == "sequence-classification":
            return kl.sum()
        labels = batch["labels"].to(kl.device)
        return (kl[:, :-1] * (labels[:, 1:] != IGNORED)).sum() if self.task == "causal-lm" else (kl * (labels != IGNORED)).sum()


def _rest(p: Tensor, q: Tensor) -> Tensor:
    """The term of all outcomes that are not among the top k, taken as one. p, q: (..., k) log-probabilities."""
    tiny = torch.finfo(torch.float32).eps
    p_rest, q_rest = (1 - t.exp().sum(-1) for t in (p, q))
    p_rest, q_rest = p_rest.clamp_min(0), q_rest.clamp_min(tiny)
    return torch.where(p_rest > tiny, p_rest * (p_rest.clamp_min(tiny) / q_rest).log(), torch.zeros_like(p_rest))
