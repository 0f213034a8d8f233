"""Putting the trained branches on the student: which layers, inherited or fresh, larger than inherited, with recovery or without."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from ..adapters import active_adapters, adapter_banks, check_fits, delete_adapter, install, set_adapter
from ..errors import CaloraError
from ..io.peft_adapter import CONFIG_NAME, LoraAdapter, read_adapter
from ..io.recovery import has_recovery, read_recovery
from ..linear import CompressedLinear
from ..lowrank import Branch, Factors
from .config import Lora, Recovery, Sites, matches
from .mode import enter_train_mode

_HEADS = ("score", "classifier")  # what PEFT's SEQ_CLS trains in full beside the LoRA


@dataclass(frozen=True)
class Plan:
    """The branches that will be trained. lora, recovery: rank by module path. head: path of a head trained in full."""

    lora: dict[str, int]
    recovery: dict[str, int]
    head: str | None

    def parameters(self, model: nn.Module) -> dict[str, int]:
        """Numbers of trained parameters: {"lora", "recovery", "head"}."""
        size = lambda path: sum(features(model.get_submodule(path)))  # noqa: E731
        counts = {kind: sum(rank * size(path) for path, rank in getattr(self, kind).items()) for kind in ("lora", "recovery")}
        counts["head"] = 0 if self.head is None else sum(p.numel() for p in model.get_submodule(self.head).parameters())
        return counts


def plan(model: nn.Module, task: str, lora: Lora | None, recovery: Recovery | None, inherited: Inherited | None = None) -> Plan:
    """Which layers get what. lora None: what is inherited, as it is. Works on any device, meta included.

    Raises CaloraError where a name or an expression chooses no layer, where a LoRA would be larger than its layer,
    or where the inherited adapter is larger than what is asked for or belongs to another model.
    """
    if inherited is not None:
        check_fits(model, str(inherited.directory), inherited.lora, inherited.recovery)
    ranks = {path: f.rank for path, f in inherited.lora.factors.items()} if inherited else {}
    if lora is not None:
        for path in sites(model, lora.targets, "Lora(targets=...)"):
            if ranks.get(path, 0) > lora.rank:
                raise CaloraError(
                    f"the inherited LoRA has rank {ranks[path]} at {path}, more than Lora(rank={lora.rank}); ask for at least that, or pass lora=None"
                )
            size = min(features(model.get_submodule(path)))
            if ranks.get(path, 0) < lora.rank and lora.rank > size:  # what is inherited may stay as it is
                raise CaloraError(f"Lora(rank={lora.rank}) is above the size of {path}, which is {size}; ask for a smaller rank or other targets")
            ranks[path] = lora.rank
    recovered = {} if recovery is None else dict.fromkeys(sites(model, recovery.sites, "Recovery(sites=...)"), recovery.rank)
    return Plan(ranks, recovered, head_of(model) if task == "sequence-classification" else None)


def sites(model: nn.Module, which: Sites, what: str) -> list[str]:
    """Paths of the linear layers chosen. "all": every compressed one, or in a dense model every one, but not heads."""
    linears = {path: m for path, m in model.named_modules() if is_linear(m)}
    if which == "all":
        output = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
        linears = {p: m for p, m in linears.items() if m is not output and not set(_HEADS) & set(p.split("."))}
        compressed = [p for p, m in linears.items() if isinstance(m, CompressedLinear)]
        chosen = compressed or list(linears)
    else:
        which = which if isinstance(which, str) else list(which)
        chosen = [p for p in linears if matches(p, which)]
        for name in [] if isinstance(which, str) else which:
            if not any(matches(p, [name]) for p in linears):
                raise CaloraError(
                    f"{what} names {name!r}, which no linear layer of the model is called; see model.named_modules()"
                )
    if not chosen:
        raise CaloraError(f"{what} chooses no linear layer of the model; see model.named_modules()")
    return chosen


def is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or (type(module).__name__ == "Conv1D" and hasattr(module, "nf"))


def features(module: nn.Module) -> tuple[int, int]:
    """(in_features, out_features) of nn.Linear, CompressedLinear or transformers' Conv1D."""
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    return tuple(module.weight.shape)


def heads(model: nn.Module) -> tuple[str | None, bool]:
    """The name of a classification head, if there is one, and whether there is an output matrix over the vocabulary."""
    found = next((name for name in _HEADS if isinstance(getattr(model, name, None), nn.Module)), None)
    return found, hasattr(model, "get_output_embeddings") and model.get_output_embeddings() is not None


def head_of(model: nn.Module) -> str:
    found, _ = heads(model)
    if found is None:
        raise CaloraError(
            f"{type(model).__name__} has no head called {' or '.join(_HEADS)}; load it with AutoModelForSequenceClassification"
        )
    return found


@dataclass(frozen=True)
class Inherited:
    """What an adapter directory holds. digest: of its files."""

    directory: Path
    lora: LoraAdapter
    recovery: dict[str, Branch]
    digest: str


def read_inherited(directory: str | os.PathLike) -> Inherited:
    """A PEFT LoRA directory, or one of ours. Raises CaloraError if it is not whole."""
    directory = Path(directory)
    if not directory.is_dir():
        raise CaloraError(f"there is no adapter directory {directory} to inherit; give a PEFT LoRA directory, or one of ours")
    half = read_recovery(directory) if has_recovery(directory) else None
    alone = half is not None and not (directory / CONFIG_NAME).exists()
    lora = LoraAdapter({}, full=half.full) if alone else read_adapter(directory)
    digest = hashlib.blake2b(digest_size=16)
    for path in sorted(directory.iterdir()):
        if path.suffix in (".json", ".safetensors"):
            digest.update(path.name.encode() + path.read_bytes())
    return Inherited(directory, lora, half.factors if half else {}, digest.hexdigest())


def attach(
    model: nn.Module, name: str, plan: Plan, lora: Lora | None, recovery: Recovery | None, inherited: Inherited | None, task: str, seed: int
) -> None:  # fmt: skip
    """Make the planned branches resident under a name and active. Fresh rows: D, A uniform in +-1/sqrt(in_features), U, B zero."""
    generator = torch.Generator().manual_seed(seed)
    fresh_config = {"task_type": _PEFT_TASK[task], "lora_dropout": lora.dropout if lora else 0.0}
    base = inherited.lora if inherited else LoraAdapter(fresh_config)
    old_recovery = inherited.recovery if inherited else {}
    if wrong := [(p, f.rank) for p, f in old_recovery.items() if plan.recovery.get(p) != f.rank]:
        path, rank = wrong[0]
        raise CaloraError(
            f"the inherited adapter has recovery of rank {rank} at {path}; pass Recovery(rank={rank}) on the same sites to go on with it"
        )
    factors = {}
    for path, rank in plan.lora.items():
        layer = model.get_submodule(path)
        start = base.factors.get(path)
        scale = start.scale if start else (2.0 if lora.alpha is None else lora.alpha / lora.rank)
        if start and lora is not None and lora.alpha is not None:
            scale = lora.alpha / rank
            start = replace(start, up=start.up * (start.scale / scale), scale=scale)
        fresh = _fresh(layer, rank - (start.rank if start else 0), scale, generator)
        factors[path] = fresh if start is None else _side_by_side(start, fresh)
    recovered = {
        path: old_recovery.get(path) or _fresh(model.get_submodule(path), rank, recovery.scale, generator)
        for path, rank in plan.recovery.items()
    }
    full = dict(base.full)
    config = dict(base.config)
    if plan.head is not None and not any(key.startswith(f"{plan.head}.") for key in full):
        full |= {f"{plan.head}.{key}": p.detach() for key, p in model.get_submodule(plan.head).named_parameters()}
        config["modules_to_save"] = sorted({*(config.get("modules_to_save") or ()), plan.head})
    install(model, name, replace(base, config=config, factors=factors, full=full), recovered)
    set_adapter(model, name)


_PEFT_TASK = {"causal-lm": "CAUSAL_LM", "seq2seq-lm": "SEQ_2_SEQ_LM", "sequence-classification": "SEQ_CLS"}


def _fresh(layer: nn.Module, rank: int, scale: float, generator: torch.Generator) -> Factors:
    in_features, out_features = features(layer)
    bound = 1 / math.sqrt(in_features)  # kaiming_uniform_(a=sqrt(5)), as LoRA has it
    down = torch.empty(rank, in_features).uniform_(-bound, bound, generator=generator)
    return Factors(down, torch.zeros(out_features, rank), scale)


def _side_by_side(a: Factors, b: Factors) -> Factors:
    return a if b.rank == 0 else Factors(torch.cat((a.down, b.down)), torch.cat((a.up, b.up), 1), a.scale)


@contextmanager
def training(
    model: nn.Module, name: str, plan: Plan, lora: Lora | None, recovery: Recovery | None, distilled: bool
) -> Iterator[dict[str, nn.Parameter]]:
    """The trained parameters by name, fp32, everything else frozen and the model in train mode; afterwards as it was."""
    finish = start_training(model, name, plan, lora, recovery, distilled)
    try:
        yield trained_parameters(model, name, plan)
    finally:
        finish()


def start_training(
    model: nn.Module, name: str, plan: Plan, lora: Lora | None, recovery: Recovery | None, distilled: bool
) -> Callable[[], None]:
    """Turn an adapter into parameters, freeze the rest, and put the model in train mode (``enter_train_mode``). Returns what undoes all
    of it; where there is no way back (FSDP2) nothing happens when it is let go of, which the end of a generator would not do."""
    with ExitStack() as undo:
        for p in [p for p in model.parameters() if p.requires_grad]:
            undo.callback(p.requires_grad_(False).requires_grad_, True)
        undo.callback(enter_train_mode(model, distilled))
        for path, bank in adapter_banks(model, name).items():
            bank.train_adapter(name, (lora.dropout if lora else 0.0, recovery.dropout_at(path) if recovery else 0.0))
            undo.callback(bank.finish_training, name)
        if plan.head is not None:
            undo.callback(TrainedHead(model.get_submodule(plan.head)).finish)
        return undo.pop_all().close


def trained_parameters(model: nn.Module, name: str, plan: Plan) -> dict[str, nn.Parameter]:
    """The parameters of an adapter in training, as the model has them now."""
    banks = adapter_banks(model, name)
    parameters = {f"{path}.{key}": p for path, bank in banks.items() for key, p in bank.named_parameters(recurse=False)}
    if plan.head is not None:
        parameters |= {f"{plan.head}.{key}": p for key, p in model.get_submodule(plan.head).named_parameters()}
    return parameters


class TrainedHead:
    """A dense head in fp32 while it trains, whatever the model's dtype: its input is cast on the way in."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.dtypes = {key: p.dtype for key, p in module.named_parameters()}
        module.float().requires_grad_(True)
        self.hook = module.register_forward_pre_hook(
            lambda _, args: tuple(a.float() if isinstance(a, Tensor) and a.is_floating_point() else a for a in args)
        )

    def finish(self) -> None:
        self.hook.remove()
        for key, p in self.module.named_parameters():
            p.requires_grad_(False)
            p.grad = None  # of a step that failed
            p.data = p.data.to(self.dtypes[key])


def taught(teacher: nn.Module | None, inherited: Inherited | None) -> bool:
    """Whether the teacher has an adapter: the inherited one, or one that acts on it already (ours, or PEFT's)."""
    return _gives_lora(inherited) or (teacher is not None and _has_adapter(teacher))


@contextmanager
def teaching(teacher: nn.Module | None, inherited: Inherited | None) -> Iterator[None]:
    """The teacher with the inherited LoRA, unless an adapter acts on it already."""
    if teacher is None or not _gives_lora(inherited) or _has_adapter(teacher):
        yield
        return
    name = "calora teacher"
    install(teacher, name, inherited.lora, {})
    try:
        set_adapter(teacher, name)
        yield
    finally:
        delete_adapter(teacher, name)


def _gives_lora(inherited: Inherited | None) -> bool:
    return inherited is not None and bool(inherited.lora.factors or inherited.lora.full)


def _has_adapter(model: nn.Module) -> bool:
    return bool(active_adapters(model)) or any(hasattr(m, "base_layer") for m in model.modules())
