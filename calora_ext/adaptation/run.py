"""``adapt``: CA-LoRA from one call, every arm of its ablation grid included (arXiv 2307.07705)."""

from __future__ import annotations

import hashlib
import os
import resource
import sys
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path

from torch import nn

from ..adapters import active_adapters, delete_adapter, list_adapters, set_adapter
from ..errors import CaloraError
from ..evaluate import accuracy, context_of, mean_loss, pad_id_of, window_of
from ..io.batches import Sample, sample_key, task_name, tokenize
from ..io.data import read_records
from . import cache, student
from .config import Distill, Lora, Recovery
from .loop import derived_seed, train
from .objective import Objective
from .residual import TRAINED_BEND, UNTRAINED_BEND, start_from_residual
from .result import AdaptResult
from .settings import Settings
from .teacher import LiveTeacher, fingerprint, frozen

LONGEST_DEFAULT = 512  # tokens per training sample, unless max_length says otherwise
# Settings that may differ between a run and its continuation.
NOT_OF_THE_RUN = (
    "output_dir",
    "save_steps",
    "save_total_limit",
    "resume_from_checkpoint",
    "disable_tqdm",
    "per_device_eval_batch_size",
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
    args: ``Settings`` or transformers.TrainingArguments. max_length: tokens per sample, default the model's context but at most 512.

    Raises CaloraError, leaving the model as it was, for input that does not fit together.
    """
    task, settings = task_name(task), Settings.of(args)
    _check_arms(model, teacher, teacher_cache, inherit, lora, recovery, distill)
    if adapter_name in list_adapters(model):
        raise CaloraError(f"adapter {adapter_name!r} is loaded already; choose another adapter_name or delete_adapter it")
    columns = {"text_column": text_column, "pair_column": pair_column, "label_column": label_column}
    length = training_length(model, max_length)
    samples, said = samples_of(model, tokenizer, data, task, length, columns)
    held_out = None if eval_data is None else samples_of(model, tokenizer, eval_data, task, length, columns)[0]
    pad_id = pad_id_of(model, tokenizer)
    inherited = None if inherit is None else student.read_inherited(inherit)
    digest = None if inherited is None else inherited.digest
    if lora is None and inherited is None:
        lora = Lora()
    wanted = lora or None
    distill = distill and distill.resolve(student.taught(teacher, inherited))
    chosen = student.plan(model, task, wanted, recovery, inherited)
    run = _facts(model, samples, settings, task, length, lora, recovery, distill, digest)
    with ExitStack() as stack:
        source = None
        if distill is not None:
            stack.enter_context(student.teaching(teacher, inherited))
            about = cache.facts(samples, tokenizer, task, length, distill, digest)
            source = _teacher(stack, teacher, teacher_cache, samples, pad_id, task, distill, about, settings)
        acted = active_adapters(model)
        student.attach(model, adapter_name, chosen, wanted, recovery, inherited, task, derived_seed(settings.seed, "initial"))
        try:
            before = evaluate(model, held_out, task, pad_id, settings)
            if recovery is not None and recovery.init == "residual":
                kept = inherited.recovery if inherited else {}
                bend = TRAINED_BEND if settings.steps(len(samples)) else UNTRAINED_BEND
                start_from_residual(model, adapter_name, teacher, kept, samples, bend, derived_seed(settings.seed, "residual"))
            with (
                student.training(model, adapter_name, chosen, wanted, recovery) as parameters,
                checkpointed(model, settings),
            ):
                trained = train(model, parameters, samples, Objective(task, distill), source, settings, pad_id, run)
            after = evaluate(model, held_out, task, pad_id, settings)
        except BaseException:
            delete_adapter(model, adapter_name)
            if acted:
                set_adapter(model, acted)
            raise
    counts = chosen.parameters(model)
    return AdaptResult(
        adapter_name, _arm(lora, inherit, recovery, distill), task, said, length, len(trained.history), trained.history, before, after,
        counts, 4 * sum(counts.values()), trained.seconds, trained.tokens / max(trained.seconds, 1e-9), peak_rss(), trained.resumed_at, run,
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


def _check_arms(model, teacher, teacher_cache, inherit, lora, recovery, distill) -> None:
    """Raises CaloraError unless the pieces make one run."""
    if lora is True or not (lora is None or lora is False or isinstance(lora, Lora)):
        raise CaloraError(f"lora must be None, False or a calora_ext.adaptation.Lora, got {lora!r:.60}")
    if lora is False and inherit is not None:
        raise CaloraError(
            "lora=False trains recovery alone and inherits nothing; drop inherit (a teacher may have its adapter loaded by hand)"
        )
    if lora is False and recovery is None:
        raise CaloraError("lora=False and recovery=None leave nothing to train")
    residual = recovery is not None and recovery.init == "residual"
    if residual and teacher is None:
        raise CaloraError('Recovery(init="residual") compares weights: pass teacher=... (the dense model), or use init="zero"')
    if distill is None and ((teacher is not None and not residual) or teacher_cache is not None):
        raise CaloraError("distill=None trains without a teacher; drop teacher and teacher_cache, or say what to distil")
    if distill is not None and teacher is None and teacher_cache is None:
        raise CaloraError(
            "distillation needs teacher=... (the dense model) or teacher_cache=...; pass distill=None to train without"
        )
    if teacher is model:
        raise CaloraError("teacher and student are the same model; load the dense model beside the compressed one")


def samples_of(model, tokenizer, data, task, length, columns) -> tuple[list[Sample], str]:
    """Samples of a task for a model, and a line on what was made; arguments as in ``adapt``, length in tokens."""
    config = model.config
    labels = {"label_names": config.label2id, "classes": config.num_labels} if task == "sequence-classification" else {}
    return tokenize(read_records(data, **columns), tokenizer, task, length, **labels)


def _teacher(stack, teacher, teacher_cache, samples, pad_id, task, distill, about, settings):
    if teacher_cache is None:
        stack.enter_context(frozen(teacher))
        return LiveTeacher(teacher, task, distill)
    if teacher is not None and not Path(teacher_cache).exists():
        size = settings.per_device_train_batch_size
        cache.write(
            teacher_cache, teacher, samples, pad_id, task, distill, about, batch_size=size, disable_tqdm=settings.disable_tqdm
        )
    return cache.TeacherCache(teacher_cache, about, teacher)


def _facts(model, samples, settings, task, length, lora, recovery, distill, digest) -> dict:
    """What must be equal for a checkpoint to be continued; JSON."""
    data = hashlib.blake2b("".join(sample_key(s) for s in samples).encode(), digest_size=16).hexdigest()
    plain = {k: v for k, v in asdict(settings).items() if k not in NOT_OF_THE_RUN}
    parts = {"lora": lora, "recovery": recovery, "distill": distill}
    return {
        "model": fingerprint(model), "data": data, "inherited adapter": digest, "task": task, "max_length": length,
        **{k: repr(v) for k, v in parts.items()}, **plain,
    }  # fmt: skip


def checkpointed(model: nn.Module, settings: Settings) -> ExitStack:
    """Gradient checkpointing for the time being, where it is asked for."""
    stack = ExitStack()
    if settings.gradient_checkpointing and not model.is_activation_checkpointing:
        model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
        stack.callback(model.activation_checkpointing_disable)
    return stack


def evaluate(model, samples, task, pad_id, settings) -> dict | None:
    """{"loss", and for classification "accuracy"}; None without samples."""
    if samples is None:
        return None
    size = settings.per_device_eval_batch_size
    found = {"loss": mean_loss(model, samples, task, pad_id, size)}
    if task == "sequence-classification":
        found["accuracy"] = accuracy(model, samples, pad_id, size)
    return found


def _arm(lora, inherit, recovery, distill) -> str:
    parts = [None if lora is False else "i" if inherit is not None else "rd", recovery and "rc", distill and "d"]
    return "-".join(p for p in parts if p)


def peak_rss() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak
