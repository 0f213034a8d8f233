"""``adapt``: CA-LoRA from one call, every arm of its ablation grid included (arXiv 2307.07705)."""

from __future__ import annotations

import os
import resource
import sys
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path

from torch import nn

from .. import heap
from ..adapters import active_adapters, delete_adapter, set_adapter
from ..arguments import require_model
from ..errors import CaloraError
from ..evaluate import accuracy, context_of, mean_loss, pad_id_of, window_of
from ..io.batches import Sample, task_name, tokenize
from ..io.data import read_records
from . import cache, student
from .arm import Arm
from .best import Best
from .config import Distill, Lora, Recovery
from .loop import train
from .objective import Objective
from .result import AdaptResult
from .settings import Settings

LONGEST_DEFAULT = 512  # tokens per training sample, unless max_length says otherwise
# Settings that may differ between a run and its continuation.
NOT_OF_THE_RUN = (
    "output_dir",
    "save_steps",
    "save_total_limit",
    "resume_from_checkpoint",
    "disable_tqdm",
    "per_device_eval_batch_size",
    "load_best_model_at_end",
    "eval_steps",
)


def adapt(
    model: nn.Module,
    *,
    data,
    tokenizer,
    teacher: nn.Module | None = None,
    teacher_cache: str | os.PathLike | None = None,
    inherit: str | os.PathLike | None = None,
    lora: Lora | bool | None = None,
    recovery: Recovery | None = Recovery(),  # noqa: B008 (frozen)
    distill: Distill | None = Distill(),  # noqa: B008 (frozen)
    task: str = "causal-lm",
    args=None,
    adapter_name: str = "default",
    eval_data=None,
    max_length: int | None = None,
    text_column: str | None = None,
    pair_column: str | None = None,
    label_column: str | None = None,
) -> AdaptResult:
    """Train an adapter on a compressed model that recovers what compression lost; it stays resident and active.

    model: a compressed transformers model (a dense one works too: then it is plain LoRA training). Its weights stay packed and
    frozen; LoRA and recovery train jointly, in fp32.
    teacher: the dense model, which distillation and ``Recovery(init="residual")`` need. Unless an adapter acts on it already, it gets the inherited one for the time of the call. It runs
    in evaluation mode, without gradients. teacher_cache: a directory with its targets (``cache_teacher``), read instead of running
    it, and made first if it does not exist and a teacher is given.
    inherit: a PEFT LoRA directory trained on the dense model, or one of ours; None starts LoRA afresh.
    lora: None (the inherited LoRA, else ``Lora()``), False (recovery alone) or a ``Lora``, which may enlarge the inherited one.
    recovery: None for none. distill: None for the task's loss alone.
    data, eval_data: a file or rows (``io.data.read_records``); *_column: its columns. task: causal-lm, seq2seq-lm or
    sequence-classification, whose head is trained in full with the adapter, as PEFT's SEQ_CLS does.
    args: ``Settings`` or transformers.TrainingArguments; load_best_model_at_end keeps the step with the lowest loss on eval_data. max_length: tokens per sample, default the model's context but at most 512.

    Raises CaloraError, leaving the model as it was, for input that does not fit together.
    """
    task, settings = task_name(task), Settings.of(args)
    if settings.load_best_model_at_end and eval_data is None:
        raise CaloraError("load_best_model_at_end needs eval_data, on which the best step is chosen")
    arm = Arm(model, adapter_name, task, teacher, teacher_cache, inherit, lora, recovery, distill)
    columns = {"text_column": text_column, "pair_column": pair_column, "label_column": label_column}
    length = training_length(model, max_length)
    samples, said = samples_of(model, tokenizer, data, task, length, columns)
    held_out = None if eval_data is None else samples_of(model, tokenizer, eval_data, task, length, columns)[0]
    pad_id = pad_id_of(model, tokenizer)
    run = arm.facts(samples, length, held_out if settings.load_best_model_at_end else None) | {k: v for k, v in asdict(settings).items() if k not in NOT_OF_THE_RUN}
    teaching = arm.teaching(samples, tokenizer, length, pad_id, settings.per_device_train_batch_size, settings.disable_tqdm)
    with teaching as source:
        acted = active_adapters(model)
        arm.attach(settings.seed)
        try:
            before = evaluate(model, held_out, task, pad_id, settings)
            best = _best(model, held_out, task, pad_id, settings) if settings.load_best_model_at_end else None
            arm.start(samples, settings.seed, trained=settings.steps(len(samples)) > 0)
            with arm.training() as parameters, checkpointed(model, settings):
                trained = train(model, parameters, samples, Objective(task, arm.distill), source, settings, pad_id, run, best=best)
            after = evaluate(model, held_out, task, pad_id, settings)
        except BaseException:
            delete_adapter(model, adapter_name)
            if acted:
                set_adapter(model, acted)
            raise
    counts = arm.plan.parameters(model)
    return AdaptResult(
        adapter_name, arm.name, task, said, length, len(trained.history), trained.history, before, after,
        counts, 4 * sum(counts.values()), trained.seconds, trained.tokens / max(trained.seconds, 1e-9), peak_rss(), trained.resumed_at, run,
        None if best is None else best.step,
    )  # fmt: skip


def cache_teacher(
    directory: str | os.PathLike,
    teacher: nn.Module,
    *,
    data,
    tokenizer,
    inherit: str | os.PathLike | None = None,
    distill: Distill = Distill(),  # noqa: B008 (frozen)
    task: str = "causal-lm",
    max_length: int | None = None,
    dtype: str = "bfloat16",
    top_k: int | None = 64,
    batch_size: int = 8,
    text_column: str | None = None,
    pair_column: str | None = None,
    label_column: str | None = None,
) -> Path:
    """Write the teacher's targets for ``adapt(teacher_cache=directory)``, which must be called with the same data, tokenizer,
    task, length, inherit and distill: then the teacher need not be in memory.

    dtype: float32 or bfloat16, of what is stored. top_k: logits kept per position, None for all. Raises CaloraError.
    """
    task = task_name(task)
    require_model("teacher", teacher)
    if not isinstance(distill, Distill):
        raise CaloraError(f"distill must be a calora_ext.adaptation.Distill, which says what to keep, got {distill!r:.60}")
    columns = {"text_column": text_column, "pair_column": pair_column, "label_column": label_column}
    length = training_length(teacher, max_length)
    samples, _ = samples_of(teacher, tokenizer, data, task, length, columns)
    inherited = None if inherit is None else student.read_inherited(inherit)
    distill = distill.resolve(student.taught(teacher, inherited))
    about = cache.facts(samples, tokenizer, task, length, distill, None if inherited is None else inherited.digest)
    with student.teaching(teacher, inherited):
        return cache.write(
            directory, teacher, samples, pad_id_of(teacher, tokenizer), task, distill, about, dtype, top_k, batch_size
        )


def training_length(model: nn.Module, max_length: int | None) -> int:
    return window_of(model, max_length) if max_length is not None else min(context_of(model) or LONGEST_DEFAULT, LONGEST_DEFAULT)


def samples_of(model, tokenizer, data, task, length, columns) -> tuple[list[Sample], str]:
    """Samples of a task for a model, and a line on what was made; arguments as in ``adapt``, length in tokens."""
    config = model.config
    labels = {"label_names": config.label2id, "classes": config.num_labels} if task == "sequence-classification" else {}
    return tokenize(read_records(data, **columns), tokenizer, task, length, **labels)


def checkpointed(model: nn.Module, settings: Settings) -> ExitStack:
    """Gradient checkpointing for the time being, where it is asked for, and with it the other way to pay for memory with time."""
    stack = ExitStack()
    if settings.gradient_checkpointing:
        stack.enter_context(heap.frugal(heap.STEP))
    if settings.gradient_checkpointing and not model.is_activation_checkpointing:
        model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
        stack.callback(model.activation_checkpointing_disable)
    return stack


def _best(model, samples, task, pad_id, settings) -> Best:
    return Best(lambda: mean_loss(model, samples, task, pad_id, settings.per_device_eval_batch_size))


def evaluate(model, samples, task, pad_id, settings) -> dict | None:
    """{"loss", and for classification "accuracy"}; None without samples."""
    if samples is None:
        return None
    size = settings.per_device_eval_batch_size
    found = {"loss": mean_loss(model, samples, task, pad_id, size)}
    if task == "sequence-classification":
        found["accuracy"] = accuracy(model, samples, pad_id, size)
    return found


def peak_rss() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak
