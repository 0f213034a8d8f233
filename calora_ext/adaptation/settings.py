"""Settings of the optimisation, under the names that transformers.TrainingArguments gives them, and its schedules."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from numbers import Integral, Real

from ..errors import CaloraError

# Fields of TrainingArguments that say how to log, evaluate or place the run and change nothing about what is learnt.
_WITHOUT_EFFECT = {
    "do_train", "do_eval", "do_predict", "logging_strategy", "logging_steps", "logging_first_step", "logging_dir",
    "log_level", "log_level_replica", "log_on_each_node", "logging_nan_inf_filter", "report_to", "run_name", "project",
    "eval_strategy", "eval_delay", "eval_on_start",
    "metric_for_best_model", "greater_is_better", "prediction_loss_only", "disable_tqdm", "use_cpu",
    "dataloader_num_workers", "dataloader_pin_memory", "dataloader_persistent_workers", "dataloader_prefetch_factor",
    "remove_unused_columns", "skip_memory_metrics", "save_strategy", "include_num_input_tokens_seen", "local_rank",
    "trackio_space_id", "average_tokens_across_devices", "ddp_timeout", "ddp_broadcast_buffers", "optim",
}  # fmt: skip
_NUMBERS = {"int": (Integral, "a whole number"), "float": (Real, "a finite number")}
_OPTIMIZERS = ("adamw_torch", "adamw_torch_fused")


@dataclass(frozen=True)
class Settings:
    """How to train. Fields mean what they mean in transformers.TrainingArguments.

    max_steps: optimiser steps; -1 takes num_train_epochs passes over the data. lr_scheduler_type: linear, cosine, constant,
    constant_with_warmup, or noam (BMTrain's: lr / sqrt(warmup) * t / warmup, then lr / sqrt(t)). warmup_steps: a number below
    1 is a share of all steps. save_steps: a checkpoint every so many steps into output_dir (0: none; below 1: a share).
    resume_from_checkpoint: True (the newest in output_dir, if any) or a checkpoint's directory. load_best_model_at_end: keep the step with the lowest loss on eval_data, measured before the first
    step, every eval_steps (below 1: a share of all steps) and after the last, instead of the last one. disable_tqdm: None shows the
    progress bar on terminals only.
    """

    learning_rate: float = 1e-3
    max_steps: int = -1
    num_train_epochs: float = 1.0
    per_device_train_batch_size: int = 8
    gradient_accumulation_steps: int = 1
    lr_scheduler_type: str = "cosine"
    warmup_steps: float = 0.05
    weight_decay: float = 0.0
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_epsilon: float = 1e-8
    max_grad_norm: float = 1.0
    seed: int = 42
    data_seed: int | None = None
    bf16: bool = False
    gradient_checkpointing: bool = False
    per_device_eval_batch_size: int = 8
    output_dir: str | None = None
    save_steps: float = 0
    save_total_limit: int | None = None
    resume_from_checkpoint: str | bool | None = None
    load_best_model_at_end: bool = False
    eval_steps: float = 0.1
    disable_tqdm: bool | None = None

    def __post_init__(self) -> None:
        for field in fields(self):
            kind, value = field.type.removesuffix(" | None"), getattr(self, field.name)
            if kind in _NUMBERS and not (value is None and field.default is None):
                number, words = _NUMBERS[kind]
                endless = field.name == "max_grad_norm" and value == math.inf  # no clipping
                if isinstance(value, bool) or not isinstance(value, number) or not (math.isfinite(value) or endless):
                    raise CaloraError(f"{field.name} must be {words}, got {value!r}")
        at_least = {
            "per_device_train_batch_size": 1, "per_device_eval_batch_size": 1, "gradient_accumulation_steps": 1, "warmup_steps": 0,
            "weight_decay": 0, "max_grad_norm": 0, "save_steps": 0,
        }  # fmt: skip
        for name, least in at_least.items():
            if getattr(self, name) < least:
                raise CaloraError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if not (math.isfinite(self.learning_rate) and self.learning_rate > 0):
            raise CaloraError(f"learning_rate must be positive, got {self.learning_rate}")
        if self.load_best_model_at_end and not self.eval_steps > 0:
            raise CaloraError(f"load_best_model_at_end needs eval_steps above 0, got {self.eval_steps}")
        if self.max_steps < 0 and not self.num_train_epochs > 0:
            raise CaloraError(f"num_train_epochs must be positive, got {self.num_train_epochs}")
        if self.lr_scheduler_type not in _SCHEDULES:
            raise CaloraError(
                f"lr_scheduler_type {self.lr_scheduler_type!r} is not supported; choose one of {', '.join(_SCHEDULES)}"
            )
        if (self.save_steps or self.resume_from_checkpoint is True) and not self.output_dir:
            raise CaloraError("checkpoints need output_dir, the directory to write them to and to resume from")

    @classmethod
    def of(cls, args) -> Settings:
        """Settings as they are, or those of transformers.TrainingArguments; CaloraError names a field set there that is not honoured."""
        if args is None:
            return cls()
        if isinstance(args, cls):
            return args
        if not hasattr(args, "lr_scheduler_type"):
            raise CaloraError(
                f"args must be transformers.TrainingArguments or calora_ext.adaptation.Settings, got {type(args).__name__}"
            )
        ours = {f.name for f in fields(cls)}
        default = type(args)(output_dir=args.output_dir)
        unsupported = [
            f.name
            for f in fields(args)
            if f.init and f.name not in ours | _WITHOUT_EFFECT and getattr(args, f.name) != getattr(default, f.name)
        ]
        if unsupported:
            raise CaloraError(
                f"calora_ext.adapt does not honour TrainingArguments({', '.join(unsupported)}); leave these at their defaults"
            )
        if str(getattr(args.optim, "value", args.optim)) not in _OPTIMIZERS:
            raise CaloraError(f"optim={args.optim} is not supported; the optimiser is AdamW ({' or '.join(_OPTIMIZERS)})")
        values = {name: getattr(args, name) for name in ours}
        if args.load_best_model_at_end:
            how = str(getattr(args.eval_strategy, "value", args.eval_strategy))
            if how != "steps" or args.metric_for_best_model not in (None, "loss", "eval_loss") or args.greater_is_better:
                raise CaloraError(
                    f"load_best_model_at_end keeps the lowest loss every eval_steps; got eval_strategy={how!r}, metric_for_best_model="
                    f"{args.metric_for_best_model!r}, greater_is_better={args.greater_is_better}; pass eval_strategy='steps' and leave the others out"
                )
        else:
            del values["eval_steps"]
        values["lr_scheduler_type"] = getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type)
        values["gradient_checkpointing"] = bool(args.gradient_checkpointing)
        values["disable_tqdm"] = args.disable_tqdm or None
        if args.save_strategy == "no":
            values["save_steps"] = 0
        return cls(**values)

    @property
    def samples_per_step(self) -> int:
        return self.per_device_train_batch_size * self.gradient_accumulation_steps

    def steps(self, samples: int) -> int:
        """Optimiser steps over a data set of so many samples."""
        return self.max_steps if self.max_steps >= 0 else math.ceil(self.num_train_epochs * samples / self.samples_per_step)

    def save_every(self, steps: int) -> int:
        """Steps between checkpoints, 0 for none."""
        return _steps_of(self.save_steps, steps)

    def eval_every(self, steps: int) -> int:
        """Steps between measurements on held-out data, where the best is kept."""
        return _steps_of(self.eval_steps, steps)

    def rate(self, step: int, steps: int) -> float:
        """Learning rate of step 0..steps-1."""
        warmup = math.ceil(self.warmup_steps * steps) if self.warmup_steps < 1 else int(self.warmup_steps)
        return self.learning_rate * _SCHEDULES[self.lr_scheduler_type](step, warmup, steps)


def _steps_of(number: float, steps: int) -> int:
    """A number of steps, or a share of all."""
    return math.ceil(number * steps) if 0 < number < 1 else int(number)


def _warm(then):
    return lambda step, warmup, steps: step / warmup if step < warmup else then((step - warmup) / max(1, steps - warmup))


_SCHEDULES = {
    "linear": _warm(lambda done: 1 - done),
    "cosine": _warm(lambda done: 0.5 * (1 + math.cos(math.pi * done))),
    "constant": lambda step, warmup, steps: 1.0,
    "constant_with_warmup": _warm(lambda done: 1.0),
    "noam": lambda step, warmup, steps: min((step + 1) ** -0.5, (step + 1) * max(1, warmup) ** -1.5),
}
