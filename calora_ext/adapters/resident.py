"""The adapters of a model: loaded, selected, saved. A PEFT LoRA, or one of ours (LoRA and recovery side by side).

Works on compressed models and on dense ones (a dense layer's bank is added by a forward hook). What a model has resident is
kept on the model itself, so that a copy of the model has copies of its adapters.
"""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from ..embedding import CompressedEmbedding
from ..errors import CaloraError
from ..io import peft_adapter, recovery
from ..io.files import write_together
from ..io.peft_adapter import LoraAdapter, is_target
from ..io.recovery import RecoveryAdapter, compare_bases, fingerprint
from ..linear import CompressedLinear
from ..lowrank import Branch, Factors, Int8Factors, LowRankBank

_STATE = "_calora_adapters"


@dataclass
class _Resident:
    """One adapter of a model. banks, modules and the biases are keyed by module path."""

    config: dict  # of the LoRA half, as PEFT writes it
    base: dict | None = None  # fingerprint of what its recovery was trained on; None: this model
    banks: dict[str, LowRankBank] = field(default_factory=dict)
    lora_bias: dict[str, Tensor] = field(default_factory=dict)  # scaled: what the bank adds beside B A x
    biases: dict[str, Tensor] = field(default_factory=dict)  # in place of the base's
    modules: dict[str, nn.Module] = field(default_factory=dict)  # in place of the base's

    @property
    def replaces(self) -> bool:
        return bool(self.biases or self.modules)


@dataclass
class _State:
    """Everything resident on a model, and what of it acts."""

    resident: dict[str, _Resident] = field(default_factory=dict)
    chosen: tuple[str, ...] = ()
    enabled: bool = True
    now: tuple[str, ...] = ()  # the selection that acts: chosen, unless disabled
    acting: dict[str, LowRankBank] = field(default_factory=dict)  # its banks
    replaced_modules: dict[str, nn.Module] = field(default_factory=dict)  # the base's own, while replaced
    replaced_biases: dict[str, nn.Parameter | None] = field(default_factory=dict)
    slot_rank: int | None = None

    def get(self, name: str) -> _Resident:
        if name not in self.resident:
            raise CaloraError(f"there is no adapter {name!r}; loaded are: {', '.join(self.resident) or 'none'}")
        return self.resident[name]


def state_of(model: nn.Module) -> _State:
    state = model.__dict__.get(_STATE)
    if state is None:
        state = _State()
        setattr(model, _STATE, state)
    return state


def load_adapter(model: nn.Module, directory: str | os.PathLike, adapter_name: str = "default") -> None:
    """Make an adapter directory resident: a PEFT LoRA, or one of ours (LoRA and/or recovery). Loading does not activate.

    Raises CaloraError, and leaves the model as it was, if the directory is damaged or does not fit the model. Warns if its
    recovery half was trained on another compression of this model.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise CaloraError(f"{directory} is not a directory; give the directory of a PEFT LoRA adapter")
    half = recovery.read_recovery(directory) if recovery.has_recovery(directory) else None
    alone = half is not None and not (directory / peft_adapter.CONFIG_NAME).exists()
    lora = LoraAdapter({}, full=half.full) if alone else peft_adapter.read_adapter(directory)
    with base_only(model):
        _refuse_incomplete(model, adapter_name, lora)
    if half is None:
        return install(model, adapter_name, lora, {})
    difference = compare_bases(half.base, fingerprint(model))
    install(model, adapter_name, lora, half.factors, half.base)
    if difference:
        warnings.warn(f"the recovery modules of {directory} may not fit: {difference}", stacklevel=2)


def add_adapter(
    model: nn.Module,
    adapter_name: str,
    lora: dict[str, Factors] | None = None,
    recovery: dict[str, Factors] | None = None,
    config: dict | None = None,
    modules_to_save: Sequence[str] = (),
) -> None:
    """Make an adapter resident that does not come from a file. Does not activate it.

    lora, recovery: branches by module path (lowrank.Factors). config: PEFT settings to keep when it is saved (task_type, lora_dropout, ...).
    modules_to_save: paths of modules of which the adapter gets a dense copy of its own (a classification head).
    """
    full = {}
    with base_only(model):
        for path in modules_to_save:
            module = _module(model, path, adapter_name)
            full |= {f"{path}.{key}": p.detach() for key, p in dense_copy(module).named_parameters()}
    config = dict(config or {})
    if modules_to_save:
        config["modules_to_save"] = list(modules_to_save)
    install(model, adapter_name, LoraAdapter(config, dict(lora or {}), full=full), dict(recovery or {}))


def set_adapter(model: nn.Module, adapter_name: str | Sequence[str]) -> None:
    """Let one adapter act, or several at once (their contributions add up); all others stop acting."""
    names = (adapter_name,) if isinstance(adapter_name, str) else tuple(dict.fromkeys(adapter_name))
    state = state_of(model)
    select(model, state, names)
    state.chosen, state.enabled = names, True


def disable_adapters(model: nn.Module) -> None:
    """The bare base model, until :func:`enable_adapters` or :func:`set_adapter`."""
    state = state_of(model)
    select(model, state, ())
    state.enabled = False


def enable_adapters(model: nn.Module) -> None:
    """What acted before :func:`disable_adapters` acts again."""
    state = state_of(model)
    select(model, state, state.chosen)
    state.enabled = True


def active_adapters(model: nn.Module) -> list[str]:
    """Names of the adapters that act now."""
    state = state_of(model)
    return list(state.chosen) if state.enabled else []


def list_adapters(model: nn.Module) -> list[str]:
    """Names of all resident adapters."""
    return list(state_of(model).resident)


def adapter_banks(model: nn.Module, adapter_name: str) -> dict[str, LowRankBank]:
    """The banks that hold an adapter, by module path: where it is trained."""
    return dict(state_of(model).get(adapter_name).banks)


def delete_adapter(model: nn.Module, adapter_name: str) -> None:
    """Forget an adapter; if it acts, the others of its selection go on without it."""
    state = state_of(model)
    entry = state.get(adapter_name)
    if adapter_name in state.chosen:
        rest = tuple(n for n in state.chosen if n != adapter_name)
        if state.enabled:
            select(model, state, rest)
        state.chosen = rest
    for bank in entry.banks.values():
        bank.remove(adapter_name)
    del state.resident[adapter_name]


def save_adapter(
    model: nn.Module, adapter_name: str, directory: str | os.PathLike, dtype: torch.dtype = torch.float32,
    recovery_dtype: torch.dtype | None = None,
) -> None:  # fmt: skip
    """Write an adapter, never the base: a PEFT directory for the *dense* model, and the recovery half beside it.

    dtype: what LoRA and recovery are stored in. recovery_dtype: of the recovery alone, where it differs: ``torch.int8`` takes a byte
    a parameter, on disk and, once loaded from there, in memory while the adapter does not act. An adapter that is in int8 stays so, bit
    for bit, unless recovery_dtype says otherwise. An adapter in training is saved as it is at this moment.
    """
    for which in (dtype, dtype if recovery_dtype in (None, torch.int8) else recovery_dtype):
        if which not in peft_adapter.FLOATS:
            raise CaloraError(f"an adapter cannot be stored in {which}; choose a floating-point dtype, or recovery_dtype=torch.int8")
    entry = state_of(model).get(adapter_name)
    lora, recovered = branches_of(entry, adapter_name)
    full = {f"{path}.{key}": p for path, module in entry.modules.items() for key, p in module.named_parameters(recurse=False)}
    writers, stale = {}, []
    if lora:
        if muted := next((path for path in entry.lora_bias if lora[path].scale == 0), None):
            raise CaloraError(f"adapter {adapter_name!r} has lora_alpha 0 at {muted}, which left nothing of its lora_B.bias to save; keep the directory it came from")
        unscaled = {path: bias / lora[path].scale for path, bias in entry.lora_bias.items()}
        adapter = LoraAdapter(_exact_targets(model, entry.config, lora), lora, unscaled, entry.biases, full)
        writers |= peft_adapter.adapter_writers(adapter, dtype)
    else:
        stale += [peft_adapter.CONFIG_NAME, peft_adapter.WEIGHTS_NAME]
    if recovered:
        base = fingerprint(model) if entry.base is None else entry.base
        if recovery_dtype is None:
            recovery_dtype = torch.int8 if all(isinstance(f, Int8Factors) for f in recovered.values()) else dtype
        writers |= recovery.recovery_writers(RecoveryAdapter(recovered, base, {} if lora else full), recovery_dtype)
    else:
        stale += [recovery.CONFIG_NAME, recovery.WEIGHTS_NAME]
    write_together(directory, writers, stale)


def enable_hotswap(model: nn.Module, target_rank: int = 64) -> None:
    """Reserve fixed slots of rank target_rank for LoRA (and for recovery where a resident adapter has it), zero-padded, in
    every layer that a resident adapter targets.

    From then on :func:`set_adapter` copies into the slots: call it before ``torch.compile`` and no switch compiles anew.
    Adapters loaded later must fit: a larger rank, another layer or replaced modules raise CaloraError.
    """
    state = state_of(model)
    if not state.resident:
        raise CaloraError("load the adapters (or the largest of them) before enable_hotswap: it reserves slots where they act")
    for name, entry in state.resident.items():
        _check_swappable(name, entry)
    wanted: dict[str, tuple[LowRankBank, int, int]] = {}
    for name, entry in state.resident.items():
        for path, bank in entry.banks.items():
            lora, recovery = bank.branches(name)
            _, had_lora, had_recovery = wanted.get(path, (bank, 0, 0))
            wanted[path] = (bank, target_rank if lora else had_lora, target_rank if recovery else had_recovery)
    for bank, lora_rank, recovery_rank in wanted.values():
        bank.reserve(lora_rank, recovery_rank)
    state.slot_rank = target_rank


@contextmanager
def base_only(model: nn.Module) -> Iterator[None]:
    """The model without any adapter, replaced modules and biases included: what ``save_pretrained`` must see."""
    state = state_of(model)
    names = state.now
    if names:
        select(model, state, ())
    try:
        yield
    finally:
        if names:
            select(model, state, names)


# -- selecting ------------------------------------------------------------------------------------------------------------


def select(model: nn.Module, state: _State, names: tuple[str, ...]) -> None:
    """Let exactly these act; on an error what acted before goes on."""
    entries = [state.get(name) for name in names]
    if len(entries) > 1 and any(e.replaces for e in entries):
        raise CaloraError("adapters that replace modules or biases (modules_to_save, bias) cannot act together with others")
    before = state.now
    try:
        _activate(model, state, names, entries)
    except CaloraError:
        _activate(model, state, before, [state.get(name) for name in before])
        raise


def _activate(model: nn.Module, state: _State, names: tuple[str, ...], entries: Sequence[_Resident]) -> None:
    """Walks only the banks of the adapters that leave and enter, so that switching costs microseconds a layer."""
    _restore(model, state)
    entering = entries[0].banks if len(entries) == 1 else {path: bank for e in entries for path, bank in e.banks.items()}
    for path, bank in state.acting.items():
        if path not in entering:
            bank.activate(())
    state.acting, state.now = entering, names
    for bank in entering.values():
        bank.activate(names)
    for entry in entries:
        _replace(model, state, entry)


def _replace(model: nn.Module, state: _State, entry: _Resident) -> None:
    for path, module in entry.modules.items():
        state.replaced_modules[path] = model.get_submodule(path)
        set_module(model, path, module)
    for path, bias in entry.biases.items():
        layer = model.get_submodule(path)
        state.replaced_biases.setdefault(path, layer.bias)
        layer.bias = nn.Parameter(bias.to(layer.bias), requires_grad=False)
    for path, bias in entry.lora_bias.items():
        layer = model.get_submodule(path)
        state.replaced_biases.setdefault(path, layer.bias)
        dtype = layer.weight.dtype
        total = bias.to(layer.weight.device) if layer.bias is None else layer.bias.float() + bias.to(layer.bias.device)
        layer.bias = nn.Parameter(total.to(dtype), requires_grad=False)


def _restore(model: nn.Module, state: _State) -> None:
    for path, module in state.replaced_modules.items():
        set_module(model, path, module)
    for path, bias in state.replaced_biases.items():
        model.get_submodule(path).bias = bias
    state.replaced_modules, state.replaced_biases = {}, {}


# -- loading --------------------------------------------------------------------------------------------------------------


def install(model: nn.Module, name: str, adapter: LoraAdapter, recovered: dict[str, Branch], base: dict | None = None) -> None:
    """Make an adapter resident: everything of it, or, where something does not fit, nothing."""
    state = state_of(model)
    if not isinstance(name, str) or not name:
        raise CaloraError(f"adapter_name must be a non-empty string, got {name!r}")
    if name in state.resident:
        raise CaloraError(f"adapter {name!r} is loaded already; delete_adapter it first, or choose another adapter_name")
    entry = _Resident(adapter.config, base)
    with base_only(model):
        try:
            for path in dict.fromkeys((*adapter.factors, *recovered)):
                bank, device = _bank(model, path, name, state), _device(_module(model, path, name))
                bank.add(name, *(b if b is None or device is None else b.to(device) for b in (adapter.factors.get(path), recovered.get(path))))
                entry.banks[path] = bank
                bank.prepare(name)
            for path, bias in adapter.lora_bias.items():
                entry.lora_bias[path] = _fitting(bias, (entry.banks[path].out_features,), f"{path}.lora_B.bias", name) * adapter.factors[path].scale
            for path, bias in adapter.biases.items():
                old = getattr(_module(model, path, name), "bias", None)
                if old is None:
                    raise CaloraError(f"adapter {name!r} replaces the bias of {path}, which has none: it belongs to another model")
                entry.biases[path] = _fitting(bias, old.shape, f"{path}.bias", name)
            entry.modules = _replacements(model, name, adapter.full)
            if state.slot_rank is not None:
                _check_swappable(name, entry)
        except BaseException:
            for bank in entry.banks.values():
                bank.remove(name)
            raise
    state.resident[name] = entry


def check_fits(model: nn.Module, adapter: str, lora: LoraAdapter, recovered: dict[str, Branch]) -> None:
    """Raises CaloraError where an adapter's branches belong to another model. Works on any device, meta included."""
    with base_only(model):
        _refuse_incomplete(model, adapter, lora)
        for path in dict.fromkeys((*lora.factors, *recovered)):
            bank = LowRankBank(*_features(_linear(model, path, adapter)), tiled=False)
            bank.add(adapter, lora.factors.get(path), recovered.get(path))


def _linear(model: nn.Module, path: str, adapter: str) -> nn.Module:
    """The layer that an adapter targets. Raises CaloraError for what is not a linear layer or carries PEFT's LoRA."""
    layer = _module(model, path, adapter)
    if hasattr(layer, "base_layer"):
        raise CaloraError(f"{path} already carries an adapter of PEFT; unload that before loading {adapter!r} natively")
    if isinstance(layer, nn.modules.linear.NonDynamicallyQuantizableLinear):
        raise CaloraError(f"adapter {adapter!r} targets {path}, whose weight nn.MultiheadAttention reads past the layer; it cannot act there")
    if not _is_linear(layer):
        raise CaloraError(f"adapter {adapter!r} targets {path}, a {type(layer).__name__}; only linear layers carry adapters")
    return layer


def _bank(model: nn.Module, path: str, adapter: str, state: _State) -> LowRankBank:
    """The bank of a linear layer, made on first use."""
    layer = _linear(model, path, adapter)
    if isinstance(getattr(layer, "bank", None), LowRankBank):
        return layer.bank
    if state.slot_rank is not None:
        raise CaloraError(f"adapter {adapter!r} targets {path}, where enable_hotswap reserved nothing; load it before enable_hotswap")
    if isinstance(layer, CompressedLinear):
        layer.bank = LowRankBank(*_features(layer), layer.compute_dtype)
    else:
        layer.bank = LowRankBank(*_features(layer), tiled=False)
        layer.register_forward_hook(_add_low_rank, with_kwargs=True)
    layer.bank.train(layer.training)
    return layer.bank


def _device(layer: nn.Module) -> torch.device | str | int | None:
    """Where a layer computes: where its weight is, or, where that is offloaded, where accelerate's hook brings it. None: nowhere."""
    device = layer.weight.device
    return device if device.type != "meta" else getattr(getattr(layer, "_hf_hook", None), "execution_device", None)


def _add_low_rank(layer: nn.Module, args: tuple, kwargs: dict, output: Tensor) -> Tensor:
    """Forward hook of a dense layer. It finds the bank on the module, so that a copied module uses its own."""
    term = layer.bank(args[0] if args else next(iter(kwargs.values())))
    return output if term is None else (output.float() + term).to(output.dtype)


def _replacements(model: nn.Module, adapter: str, full: dict[str, Tensor]) -> dict[str, nn.Module]:
    """Modules with the parameters of modules_to_save, dense copies of those of the model."""
    modules: dict[str, nn.Module] = {}
    for name, value in full.items():
        path, _, parameter = name.rpartition(".")
        if path not in modules:
            modules[path] = dense_copy(_module(model, path, adapter))
        old = modules[path]._parameters.get(parameter)
        if old is None:
            raise CaloraError(f"adapter {adapter!r} replaces {name}, which this model does not have: it belongs to another model")
        old.data = _fitting(value, old.shape, name, adapter).to(old.dtype, copy=True).to(old.device)
    return modules


def branches_of(entry: _Resident, name: str) -> tuple[dict[str, Factors], dict[str, Branch]]:
    """LoRA and recovery of an adapter, by module path."""
    both = {path: bank.branches(name) for path, bank in entry.banks.items()}
    return {p: b[0] for p, b in both.items() if b[0] is not None}, {p: b[1] for p, b in both.items() if b[1] is not None}


def dense_copy(module: nn.Module) -> nn.Module:
    """A frozen copy of a module (a head, an embedding) with packed weights decoded and without adapters."""
    if isinstance(module, CompressedLinear):
        dense = nn.Linear(module.in_features, module.out_features, module.bias is not None, device="meta")
        dense.weight = nn.Parameter(module.decode().to(module.compute_dtype))
        if module.bias is not None:
            dense.bias = nn.Parameter(module.bias.detach().clone())
    elif isinstance(module, CompressedEmbedding):
        dense = nn.Embedding(module.num_embeddings, module.embedding_dim, module.padding_idx, device="meta")
        dense.weight = nn.Parameter(module.decode().to(module.compute_dtype))
    else:
        dense = copy.deepcopy(module)
        for name, child in list(dense.named_children()):
            empty = isinstance(child, LowRankBank)
            setattr(dense, name, LowRankBank(child.in_features, child.out_features, tiled=False) if empty else dense_copy(child))
    return dense.train(module.training).requires_grad_(False)


def _refuse_incomplete(model: nn.Module, adapter: str, lora: LoraAdapter) -> None:
    """Every layer that the config targets must have come with tensors: a missing one would be ignored silently."""
    for path, layer in model.named_modules():
        if path not in lora.factors and _is_linear(layer) and is_target(lora.config, path):
            raise CaloraError(f"adapter {adapter!r} targets {path} but holds no tensors for it; the file is damaged or of another model")


def _check_swappable(name: str, entry: _Resident) -> None:
    if entry.replaces or entry.lora_bias:
        raise CaloraError(f"adapter {name!r} replaces modules or biases, which hot-swapping slots cannot hold; use set_adapter without enable_hotswap")


def _exact_targets(model: nn.Module, config: dict, lora: dict[str, Factors]) -> dict:
    """The config, with explicit targets where it would select layers that have no tensors."""
    linear = [path for path, layer in model.named_modules() if _is_linear(layer)]
    if all(path in lora for path in linear if is_target(config, path)):
        return config
    return {k: v for k, v in config.items() if k != "target_modules"}


def _fitting(value: Tensor, shape: Sequence[int], what: str, adapter: str) -> Tensor:
    if tuple(value.shape) != tuple(shape):
        raise CaloraError(f"adapter {adapter!r}: {what} is {tuple(value.shape)}, this model has {tuple(shape)}: it belongs to another model")
    return value


def _module(model: nn.Module, path: str, adapter: str) -> nn.Module:
    try:
        return model.get_submodule(path)
    except AttributeError:
        raise CaloraError(f"adapter {adapter!r} targets {path}, which this model does not have: it belongs to another model") from None


def set_module(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, child = path.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def _is_linear(layer: nn.Module) -> bool:
    return isinstance(layer, nn.Linear) or (type(layer).__name__ == "Conv1D" and hasattr(layer, "nf"))


def _features(layer: nn.Module) -> tuple[int, int]:
    """(in_features, out_features) of nn.Linear, CompressedLinear or transformers' Conv1D, which stores its weight transposed."""
    return (layer.in_features, layer.out_features) if isinstance(layer, nn.Linear) else tuple(layer.weight.shape)
