"""The training loop: AdamW on a few parameters, gradients accumulated exactly, every step a function of (seed, step)."""

from __future__ import annotations

import hashlib
import logging
import math
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

from .. import heap
from ..errors import CaloraError
from ..io.batches import Sample, collate
from . import checkpoint
from .best import Best
from .objective import Objective
from .settings import Settings
from .teacher import Teacher

log = logging.getLogger("calora_ext")


@dataclass(frozen=True)
class Trained:
    """What a run was: one row per step ({"step", "loss", "task", "hidden", "logits", "learning_rate", "grad_norm"}), and its cost."""

    history: list[dict]
    seconds: float
    tokens: int
    resumed_at: int


class DataOrder:
    """An endless stream of sample numbers: permutations of the data, one after another, each drawn from (seed, epoch)."""

    def __init__(self, samples: int, seed: int) -> None:
        self.samples, self.seed = samples, seed
        self._epoch, self._permutation = -1, torch.empty(0)

    def __getitem__(self, position: int) -> int:
        epoch, at = divmod(position, self.samples)
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(derived_seed(self.seed, "epoch", epoch))
            self._epoch, self._permutation = epoch, torch.randperm(self.samples, generator=generator)
        return int(self._permutation[at])


def derived_seed(*parts) -> int:
    """A seed of 63 bits from anything that prints: neighbours share nothing."""
    return int.from_bytes(hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest(), "little") >> 1


def train(
    model: nn.Module,
    parameters: dict[str, nn.Parameter],
    samples: list[Sample],
    objective: Objective,
    teacher: Teacher | None,
    settings: Settings,
    pad_id: int,
    run: dict,
    skip: int = 0,
    title: str = "adapt",
    best: Best | None = None,
) -> Trained:
    """Train the parameters (fp32) of a model in train mode. run: facts that a checkpoint must share to be resumed.
    skip: samples of the data order that an earlier run took. title: of the progress bar.
    best: keeps the parameters with the lowest held-out loss, which the model has afterwards; its measurements are "eval_loss" in the history.

    Raises CaloraError when the loss or its gradient is no longer finite, before it changes a parameter.
    """
    steps = settings.steps(len(samples))
    optimizer = torch.optim.AdamW(
        [{"params": [p for p in parameters.values() if p.dim() > 1]}, {"params": [p for p in parameters.values() if p.dim() < 2], "weight_decay": 0.0}],
        lr=settings.learning_rate, betas=(settings.adam_beta1, settings.adam_beta2), eps=settings.adam_epsilon,
        weight_decay=settings.weight_decay, fused=True,
    )  # fmt: skip
    order = DataOrder(len(samples), settings.seed if settings.data_seed is None else settings.data_seed)
    history, start = [], 0
    if path := checkpoint.newest(settings.resume_from_checkpoint, settings.output_dir):
        saved = checkpoint.load(path, run, parameters)
        checkpoint.restore(saved, parameters, optimizer)
        if best is not None:
            if saved.best is None:
                raise CaloraError(f"{path} holds no best step: that run did not ask for one; leave load_best_model_at_end out or start afresh")
            best.step, best.loss, best.tensors = saved.best
        history, start = saved.history, saved.step
        log.info("resumed from %s", path)
    elif best is not None:
        best.offer(0, parameters)
    save_every = settings.save_every(steps) if settings.output_dir else 0
    eval_every = settings.eval_every(steps) if best is not None else 0
    began, tokens = time.monotonic(), 0
    bar = tqdm(total=steps, initial=start, unit="step", desc=title, disable=settings.disable_tqdm, dynamic_ncols=True)
    with bar, torch.random.fork_rng(enabled=True):
        for step in range(start, steps):
            torch.manual_seed(derived_seed(settings.seed, "step", step))
            first = skip + step * settings.samples_per_step
            picked = [samples[order[i]] for i in range(first, first + settings.samples_per_step)]
            row = _step(model, parameters, picked, objective, teacher, settings, pad_id, optimizer, settings.rate(step, steps), step + 1)
            history.append({"step": step + 1, **row})
            tokens += sum(len(s["input_ids"]) for s in picked)
            bar.set_postfix_str(f"loss {row['loss']:.4f}, {tokens / (time.monotonic() - began):,.0f} tokens/s", refresh=False)
            bar.update()
            if eval_every and ((step + 1) % eval_every == 0 or step + 1 == steps):
                history[-1]["eval_loss"] = best.offer(step + 1, parameters)
            if save_every and ((step + 1) % save_every == 0 or step + 1 == steps):
                checkpoint.save(
                    Path(settings.output_dir), step + 1, run, history, parameters, optimizer, settings.save_total_limit, best
                )
    if best is not None:
        best.put_back(parameters)
    return Trained(history, time.monotonic() - began, tokens, start)


def _step(model, parameters, picked, objective, teacher, settings, pad_id, optimizer, rate, number) -> dict:
    """One optimiser step over its micro-batches, counted from 1; its losses."""
    size = settings.per_device_train_batch_size
    pieces = [picked[i : i + size] for i in range(0, len(picked), size)]
    batches = [collate(piece, pad_id) for piece in pieces]
    counts = objective.counts(batches)
    sums: dict[str, float] = {}
    for piece, batch in zip(pieces, batches, strict=True):
        with torch.autocast("cpu", torch.bfloat16, enabled=settings.bf16):
            targets = None if teacher is None else teacher.targets(piece, batch)
            terms = objective.loss(model, batch, targets, counts)
        if settings.gradient_checkpointing:
            heap.trim()  # backward takes other sizes than forward left behind
        sum(terms.values()).backward()
        for name, term in terms.items():
            sums[name] = sums.get(name, 0.0) + term.item()
    loss = sum(sums.values())
    require_finite("loss", loss, number, settings.learning_rate)
    norm = torch.nn.utils.clip_grad_norm_(parameters.values(), settings.max_grad_norm or math.inf).item()
    require_finite("norm of the gradient", norm, number, settings.learning_rate)  # clipping by it made every gradient NaN
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.step()
    optimizer.zero_grad()
    return {"loss": loss, **sums, "learning_rate": rate, "grad_norm": norm}


def require_finite(what: str, value: float, step: int, learning_rate: float) -> None:
    """Raises CaloraError where training diverges. step: counted from 1."""
    if not math.isfinite(value):
        raise CaloraError(f"the {what} is {value} at step {step}; lower learning_rate ({learning_rate:g}) or raise warmup_steps")
