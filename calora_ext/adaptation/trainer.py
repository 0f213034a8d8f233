"""``CaloraTrainer``: transformers' Trainer on what ``adapt`` trains, for several processes, and for its callbacks and logs.

Of a step it shares everything with ``loop.train``: samples, their order, random draws, loss, checkpoints. What differs is who runs it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import fields
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.data import Sampler
from transformers import Trainer, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME

from ..adapters import active_adapters, delete_adapter, save_adapter, set_adapter
from ..compression.calibrate import find_blocks
from ..errors import CaloraError
from ..evaluate import pad_id_of, task_loss
from ..io.batches import Sample, collate, task_name
from . import checkpoint
from .arm import Arm
from .config import Distill, Lora, Recovery
from .loop import DataOrder, derived_seed, require_finite
from .objective import Objective
from .run import NOT_OF_THE_RUN, checkpointed, samples_of, training_length
from .settings import Settings

_RESUME = "training"  # what a checkpoint holds beside the adapter: ``checkpoint``'s files


class CaloraTrainer(Trainer):
    """Trains an adapter on a compressed model, frozen and packed, in one process or several (``torchrun``, ``accelerate launch``).

    model, teacher, teacher_cache, inherit, lora, recovery, distill, task, adapter_name, max_length and the columns are those of ``adapt``;
    train_dataset and eval_dataset are what it calls data and eval_data. args: transformers.TrainingArguments. processing_class: the tokenizer.
    trainer: what else Trainer takes (callbacks, compute_metrics, optimizer_cls_and_kwargs ...).

    The adapter is resident and active from here on, and trained by ``train``. A step's losses are means over the predictions of all its
    micro-batches in all processes, so that only the product of processes, batch size and accumulation matters; one process takes the
    steps that ``adapt`` takes. Processes exchange the adapter's gradients, nothing of the base: packed weights stay the one mapping of their file.
    With ``TrainingArguments(fsdp=True)`` FSDP2 also shards adapter and optimiser state, block by block; the model stays sharded after ``train``.
    A checkpoint is an adapter directory (``load_adapter``) with what is needed to go on, nothing of it pickled.
    ``train(resume_from_checkpoint=True)`` goes on from the newest whole one, or starts where there is none, so that a script under ``torchrun
    --max-restarts`` always passes it. On CPUs (gloo) start that with ``TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1``: torch 2.13 otherwise keeps one
    store for all restarts, and a worker that finds a dead one's address in it waits for ever.

    Raises CaloraError, leaving the model as it was, for input that does not fit together.
    """

    loss_is_scaled_for_ga = True  # by the counts of the whole step

    def __init__(
        self,
        model: nn.Module,
        args: TrainingArguments | None = None,
        *,
        train_dataset,
        processing_class,
        eval_dataset=None,
        teacher: nn.Module | None = None,
        teacher_cache=None,
        inherit=None,
        lora: Lora | bool | None = None,
        recovery: Recovery | None = Recovery(),  # noqa: B008 (frozen)
        distill: Distill | None = Distill(),  # noqa: B008 (frozen)
        task: str = "causal-lm",
        adapter_name: str = "default",
        max_length: int | None = None,
        text_column: str | None = None,
        pair_column: str | None = None,
        label_column: str | None = None,
        **trainer,
    ) -> None:
        args, self._sharding = _supported(args, trainer)
        self.arm = Arm(model, adapter_name, task_name(task), teacher, teacher_cache, inherit, lora, recovery, distill)
        columns = {"text_column": text_column, "pair_column": pair_column, "label_column": label_column}
        self._length = training_length(model, max_length)
        read = partial(samples_of, model, processing_class, task=self.arm.task, length=self._length, columns=columns)
        samples = read(train_dataset)[0]
        held_out = None if eval_dataset is None else read(eval_dataset)[0]
        self._pad_id = pad_id_of(model, processing_class)
        self._objective = Objective(self.arm.task, self.arm.distill)
        self._source = None
        self._parameters: dict[str, nn.Parameter] = {}
        super().__init__(model, args, partial(_with_samples, pad_id=self._pad_id), samples, held_out, processing_class, **trainer)
        self.accelerator.device_placement = args.device.type != "cpu"  # see _move_model_to_device
        settings = {f.name: getattr(args, f.name) for f in fields(Settings) if f.name not in NOT_OF_THE_RUN}
        self._run = self.arm.facts(samples, self._length) | settings | {"processes": args.world_size}
        acted = active_adapters(model)
        self.arm.attach(args.seed)
        try:
            self.arm.start(samples, args.seed, trained=True)
        except BaseException:
            delete_adapter(model, adapter_name)
            if acted:
                set_adapter(model, acted)
            raise

    # -- a run ----------------------------------------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: str | bool | None = None, **options):
        """As Trainer's. True starts afresh where there is no whole checkpoint. Raises CaloraError for one of another run, and when the
        loss or its gradient is no longer finite."""
        if self._parameters:
            raise CaloraError(
                "this trainer has sharded the model, which stays so; make another one, on a model loaded anew, to train again"
            )
        args, arm = self.args, self.arm
        asked = args.resume_from_checkpoint if resume_from_checkpoint is None else resume_from_checkpoint
        with ExitStack() as stack:
            with args.main_process_first(local=False):  # which writes the teacher's cache
                size = args.per_device_train_batch_size
                teaching = arm.teaching(
                    self.train_dataset, self.processing_class, self._length, self._pad_id, size, args.disable_tqdm
                )
                self._source = stack.enter_context(teaching)
            stack.enter_context(checkpointed(self.model, args))
            finish = arm.start_training()
            if not self._sharding:  # FSDP2 has no way back: the adapter stays in training
                stack.callback(self._forget)
                stack.callback(finish)
            stack.enter_context(self._distributed())
            self._parameters = arm.parameters()
            return super().train(_checkpoint_of(asked, args.output_dir), **options)

    def _move_model_to_device(self, model: nn.Module, device: torch.device) -> None:
        """Not within a CPU: a process under torchrun calls it cpu:0, and torch would copy every mapped weight from cpu to there."""
        if device.type != "cpu":
            super()._move_model_to_device(model, device)

    @contextmanager
    def _distributed(self) -> Iterator[None]:
        """What processes exchange: of the base, nothing. Its packed weights would be copies of their own in every process."""
        model = self.model
        model._is_accelerate_prepared = self._sharding  # by us; else Trainer does it, also if it evaluated the model before
        if self._sharding:
            mesh = init_device_mesh(self.args.device.type, (self.args.world_size,))
            frozen = {p for p in model.parameters() if not p.requires_grad}
            for block in find_blocks(model, self.arm.plan.lora | self.arm.plan.recovery):
                fully_shard(model.get_submodule(block), mesh=mesh, ignored_params=frozen)
            fully_shard(model, mesh=mesh, ignored_params=frozen)
            yield
            return
        frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
        model._ddp_params_and_buffers_to_ignore = [*frozen, *(name for name, _ in model.named_buffers())]
        try:
            yield
        finally:
            del model._ddp_params_and_buffers_to_ignore
            self.accelerator.unwrap_model(self.model_wrapped, keep_fp32_wrapper=False)
            model._is_accelerate_prepared = False

    def _forget(self) -> None:
        """The parameters become a resident adapter again; nothing may go on optimising them."""
        self._parameters, self._source = {}, None
        self.optimizer = self.lr_scheduler = None
        self.model_wrapped = self.model

    # -- a step -----------------------------------------------------------------------------------------------------------------

    def _get_train_sampler(self, train_dataset=None) -> Sampler:
        return _Order(len(self.train_dataset), self.args, lambda: int(self.state.epoch or 0))

    def get_batch_samples(self, epoch_iterator, num_batches: int, device: torch.device):
        """The micro-batches of a step, and what its losses are divided by: counts over all of them, in all processes."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        counts = self._objective.counts(batches)
        if self.args.world_size > 1:
            total = self.accelerator.reduce(torch.tensor(list(counts.values()), device=device), "sum")
            counts = dict(zip(counts, total.tolist(), strict=True))
        rank = [self.args.process_index] if self.args.process_index else []  # each its own dropout, the first that of ``adapt``
        torch.manual_seed(derived_seed(self.args.seed, "step", self.state.global_step, *rank))
        return batches, counts

    def compute_loss(self, model, inputs, return_outputs: bool = False, num_items_in_batch: dict[str, int] | None = None):
        """This process's part of the step's loss, times the processes: their gradients are averaged."""
        samples = inputs.pop("samples")
        with self.accelerator.autocast():
            targets = None if self._source is None else self._source.targets(samples, inputs)
            loss = sum(self._objective.loss(model, inputs, targets, num_items_in_batch).values())
        require_finite("loss", loss.item(), self.state.global_step + 1, self.args.learning_rate)
        loss = loss * self.args.world_size
        return (loss, None) if return_outputs else loss

    def _get_grad_norm(self, model, grad_norm=None):
        """Trainer's, of the averaged gradients and thus the same in every process, none of which takes a step where it is not finite."""
        norm = super()._get_grad_norm(model, grad_norm)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm  # FSDP2: a process has the norm of its shards
        require_finite("norm of the gradient", float(norm), self.state.global_step + 1, self.args.learning_rate)
        return norm

    def prediction_step(self, model, inputs, prediction_loss_only: bool, ignore_keys=None):
        """The task's loss alone, a mean over the predictions of the batch."""
        inputs = self._prepare_inputs(inputs)
        del inputs["samples"]
        with torch.no_grad(), self.accelerator.autocast():
            loss, count, output = task_loss(model, inputs, self.arm.task)
        loss = loss / max(1, count)
        return (loss, None, None) if prediction_loss_only else (loss, output.logits, inputs["labels"])

    # -- files ------------------------------------------------------------------------------------------------------------------

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the adapter (``save_adapter``), never the base. All processes must call it together."""
        with _whole(self.model):
            if self.args.should_save:
                save_adapter(self.model, self.arm.adapter_name, output_dir or self.args.output_dir)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Adapter", revision=self.args.hub_revision)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        tensors = checkpoint.snapshot(self._parameters, self.optimizer)
        if self.args.should_save:
            state = {"step": self.state.global_step, "run": self._run, "history": [], "scheduler": self.lr_scheduler.state_dict()}
            checkpoint.write(Path(output_dir) / _RESUME, state, tensors)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        checkpoint.restore(self._saved(resume_from_checkpoint), self._parameters, None)

    def _load_optimizer_and_scheduler(self, resume_from_checkpoint: str | None) -> None:
        if resume_from_checkpoint is None:
            return
        checkpoint.restore(self._saved(resume_from_checkpoint), self._parameters, self.optimizer)
        state = checkpoint.read(Path(resume_from_checkpoint) / _RESUME, self._run, {"scheduler"})
        self.lr_scheduler.load_state_dict(state["scheduler"])
        for group, rate in zip(self.optimizer.param_groups, self.lr_scheduler.get_last_lr(), strict=True):
            group["lr"] = rate

    def _load_best_model(self) -> None:
        self._load_from_checkpoint(self.state.best_model_checkpoint)

    def _saved(self, directory: str) -> checkpoint.Checkpoint:
        return checkpoint.load(Path(directory) / _RESUME, self._run, self._parameters)

    def _save_rng_state(self, output_dir: str) -> None:
        """Nothing: every draw is a function of the seed and the step."""

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Nothing, likewise."""


def _supported(args: TrainingArguments | None, trainer: dict) -> tuple[TrainingArguments, bool]:
    """The arguments as they are passed on, and whether adapter and optimiser are to be sharded."""
    if not isinstance(args, TrainingArguments | None):
        raise CaloraError(f"args must be transformers.TrainingArguments, got {type(args).__name__}")
    args = TrainingArguments() if args is None else copy.copy(args)
    if wrong := [
        name for name in ("model_init", "data_collator", "compute_loss_func", "optimizers") if trainer.get(name) is not None
    ]:
        raise CaloraError(
            f"CaloraTrainer makes its own {wrong[0]}; leave it out (an optimiser is chosen by args.optim or optimizer_cls_and_kwargs)"
        )
    if args.fp16:
        raise CaloraError("adapters are trained in fp32 or under bf16 autocast; pass bf16=True instead of fp16=True")
    if args.train_sampling_strategy != "random":
        raise CaloraError(f"train_sampling_strategy={args.train_sampling_strategy!r} is not supported; leave it at its default")
    sharding = bool(args.fsdp)
    if sharding and args.fsdp_plugin_args != TrainingArguments(args.output_dir, fsdp=True, use_cpu=args.use_cpu).fsdp_plugin_args:
        raise CaloraError(
            "fsdp_config is not honoured: every block's adapters are a unit of FSDP2, and the base is never sharded; leave it out"
        )
    if sharding and args.world_size < 2:
        raise CaloraError("fsdp=True shards over several processes; start them with torchrun, or leave it out")
    args.fsdp, args.fsdp_plugin_args = None, None  # sharded here: Trainer knows it for GPUs only, and would shard the base
    args.ddp_broadcast_buffers = False
    if args.ddp_find_unused_parameters is None:
        args.ddp_find_unused_parameters = False
    args.activation_checkpointing_kwargs = {"use_reentrant": False, **(args.activation_checkpointing_kwargs or {})}
    return args, sharding


class _Order(Sampler):
    """The samples of an epoch in the order of ``adapt``, whatever the number of processes."""

    def __init__(self, samples: int, args: TrainingArguments, epoch: Callable[[], int]) -> None:
        self.order, self.epoch = DataOrder(samples, args.seed if args.data_seed is None else args.data_seed), epoch

    def __len__(self) -> int:
        return self.order.samples

    def __iter__(self) -> Iterator[int]:
        first = self.epoch() * len(self)
        return (self.order[first + i] for i in range(len(self)))


def _with_samples(samples: list[Sample], pad_id: int) -> dict[str, Tensor | list[Sample]]:
    """A batch, and what it was made of, by which a teacher's cache finds its targets."""
    return {**collate(samples, pad_id), "samples": samples}


def _checkpoint_of(asked: str | bool | None, output_dir: str) -> str | None:
    """The checkpoint to go on from: the one that is named, or for True the newest whole one, if any."""
    if not asked:
        return None
    if asked is not True and str(asked).lower() != "true":
        if not _finished(Path(asked)):
            raise CaloraError(
                f"{asked} is not a whole checkpoint: it holds no readable {TRAINER_STATE_NAME}; give another one, or True for the newest"
            )
        return str(asked)
    named = sorted(
        Path(output_dir).glob("checkpoint-*"), key=lambda p: int(p.name.rpartition("-")[2]) if p.name[11:].isdecimal() else -1
    )
    return next((str(path) for path in reversed(named) if _finished(path)), None)


def _finished(path: Path) -> bool:
    """Whether all of a checkpoint was written: Trainer's own state comes last."""
    try:
        TrainerState.load_from_json(str(path / TRAINER_STATE_NAME))
    except (OSError, ValueError, TypeError):
        return False
    return True


@contextmanager
def _whole(model: nn.Module) -> Iterator[None]:
    """Parameters that FSDP2 sharded as whole tensors for the time being, in every process."""
    sharded = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for module in sharded:
        module.unshard()
    try:
        yield
    finally:
        for module in sharded:
            module.reshard()
