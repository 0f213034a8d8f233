"""An arm of CA-LoRA's grid: what is trained, from where it starts, what teaches it. Every way to train (``adapt``, ``CaloraTrainer``) runs one."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from torch import nn

from ..adapters import list_adapters
from ..arguments import require_kind, require_model
from ..errors import CaloraError
from ..io.batches import Sample, sample_key
from . import cache, student
from .config import Distill, Lora, Recovery
from .loop import derived_seed
from .residual import TRAINED_BEND, UNTRAINED_BEND, start_from_residual
from .teacher import LiveTeacher, Teacher, fingerprint, frozen, unwrapped


class Arm:
    """The arguments of ``adapt`` of the same names, checked against each other and against the model, which is left as it is.

    inherited: what ``inherit`` holds. plan: which layers get what. distill: resolved. Raises CaloraError for what does not fit together.
    """

    def __init__(
        self, model: nn.Module, adapter_name: str, task: str, teacher: nn.Module | None, teacher_cache: str | os.PathLike | None,
        inherit: str | os.PathLike | None, lora: Lora | bool | None, recovery: Recovery | None, distill: Distill | None,
    ) -> None:  # fmt: skip
        _check(model, teacher, teacher_cache, inherit, lora, recovery, distill)
        if teacher is not None:
            _check_teacher(model, teacher, task)
        if adapter_name in list_adapters(model):
            raise CaloraError(f"adapter {adapter_name!r} is loaded already; choose another adapter_name or delete_adapter it")
        self.model, self.adapter_name, self.task = model, adapter_name, task
        self.teacher, self.teacher_cache = teacher, teacher_cache
        self.inherited = None if inherit is None else student.read_inherited(inherit)
        self.lora = Lora() if lora is None and self.inherited is None else lora
        self.recovery = recovery
        self.distill = distill and distill.resolve(student.taught(teacher, self.inherited))
        self.plan = student.plan(model, task, self.lora or None, recovery, self.inherited)

    @property
    def name(self) -> str:
        """The published shorthand, e.g. "i-rc-d"."""
        first = None if self.lora is False else "rd" if self.inherited is None else "i"
        return "-".join(part for part in (first, self.recovery and "rc", self.distill and "d") if part)

    def facts(self, samples: list[Sample], max_length: int, chosen_on: list[Sample] | None = None) -> dict:
        """What must be equal for a checkpoint to be continued, but for the settings of the optimisation; JSON. Before ``attach``.

        chosen_on: held-out samples on which the best step is chosen, if one is.
        """
        digest = lambda part: hashlib.blake2b("".join(map(sample_key, part)).encode(), digest_size=16).hexdigest()  # noqa: E731
        parts = {"lora": self.lora, "recovery": self.recovery, "distill": self.distill}
        return {
            "model": fingerprint(self.model), "data": digest(samples), "inherited adapter": self._digest, "task": self.task,
            "eval_data": None if chosen_on is None else digest(chosen_on),
            "max_length": max_length, **{k: repr(v) for k, v in parts.items()},
        }  # fmt: skip

    @contextmanager
    def teaching(
        self, samples: list[Sample], tokenizer, max_length: int, pad_id: int, batch_size: int, disable_tqdm: bool | None
    ) -> Iterator[Teacher | None]:
        """The source of the targets, or None: the teacher with the inherited LoRA, frozen, or its cache, made first where it is missing."""
        if self.distill is None:
            yield None
            return
        with student.teaching(self.teacher, self.inherited):
            if self.teacher_cache is None:
                with frozen(self.teacher):
                    yield LiveTeacher(self.teacher, self.task, self.distill)
                return
            about = cache.facts(samples, tokenizer, self.task, max_length, self.distill, self._digest)
            if self.teacher is not None and not Path(self.teacher_cache).exists():
                cache.write(
                    self.teacher_cache, self.teacher, samples, pad_id, self.task, self.distill, about,
                    batch_size=batch_size, disable_tqdm=disable_tqdm,
                )  # fmt: skip
            yield cache.TeacherCache(self.teacher_cache, about, self.teacher)

    def attach(self, seed: int) -> None:
        """Make the planned branches resident and active."""
        student.attach(
            self.model, self.adapter_name, self.plan, self.lora or None, self.recovery, self.inherited, self.task,
            derived_seed(seed, "initial"),
        )  # fmt: skip

    def start(self, samples: list[Sample], seed: int, trained: bool) -> None:
        """Bring the attached branches to where they start from. trained: whether steps follow."""
        if self.recovery is not None and self.recovery.init == "residual":
            kept = self.inherited.recovery if self.inherited else {}
            bend = TRAINED_BEND if trained else UNTRAINED_BEND
            start_from_residual(self.model, self.adapter_name, self.teacher, kept, samples, bend, derived_seed(seed, "residual"))

    def training(self) -> AbstractContextManager[dict[str, nn.Parameter]]:
        """The trained parameters by name, the model in train mode; see ``student.training``."""
        return student.training(*self._trained)

    def start_training(self) -> Callable[[], None]:
        """The same without an end of its own; see ``student.start_training``."""
        return student.start_training(*self._trained)

    def parameters(self) -> dict[str, nn.Parameter]:
        """What is trained, as the model has it now."""
        return student.trained_parameters(self.model, self.adapter_name, self.plan)

    @property
    def _trained(self) -> tuple:
        return self.model, self.adapter_name, self.plan, self.lora or None, self.recovery, self.distill is not None

    @property
    def _digest(self) -> str | None:
        return None if self.inherited is None else self.inherited.digest


def _check(model, teacher, teacher_cache, inherit, lora, recovery, distill) -> None:
    """Raises CaloraError unless the pieces make one run."""
    require_model("model", model)
    require_kind("lora", None if lora is False else lora, Lora, "None, False")
    require_kind("recovery", recovery, Recovery)
    require_kind("distill", distill, Distill)
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


# Of a config, by the names that transformers gives them in every architecture, where it has them.
_ARCHITECTURE = ("model_type", "num_hidden_layers", "num_decoder_layers", "decoder_layers", "hidden_size", "vocab_size")


def _check_teacher(model, teacher, task) -> None:
    """Raises CaloraError unless the teacher is what the student was before compression, but for its weights: hidden states, logits and
    residuals are compared one by one, and another model of the same width would be imitated without a word."""
    require_model("teacher", teacher)
    ours, theirs = ({n: getattr(m.config.get_text_config(), n, None) for n in _ARCHITECTURE} for m in (model, teacher))
    if task == "sequence-classification":
        ours["num_labels"], theirs["num_labels"] = model.config.num_labels, teacher.config.num_labels
    for name, value in ours.items():
        if theirs[name] != value:
            raise CaloraError(f"the teacher has {name} {theirs[name]}, the student {value}; teach with the model that was compressed")
    if student.heads(unwrapped(teacher)) != student.heads(unwrapped(model)):
        kinds = (type(unwrapped(m)).__name__ for m in (teacher, model))
        raise CaloraError("the teacher is a {}, the student a {}, with another head; teach with the model that was compressed".format(*kinds))
