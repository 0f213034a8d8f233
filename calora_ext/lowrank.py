"""The low-rank bank beside a layer: every adapter's LoRA and recovery branch, and which of them act.

    y = layer(x) + phi(x D^T) U^T

D (rank, in_features) and U (out_features, rank) hold the active branches side by side along the rank: LoRA rows first (phi is
the identity), then recovery rows (phi is GELU, erf). Recovery modules: CA-LoRA, arXiv 2307.07705.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout, gelu, linear

from . import ops
from .errors import CaloraError

BRANCHES = ("lora", "recovery")
Bank = tuple[Tensor | None, Tensor | None, int]  # down, up, identity_rank: what the operator takes
NO_BANK: Bank = (None, None, 0)


@dataclass(frozen=True)
class Factors:
    """One branch of one layer. down: (rank, in_features), up: (out_features, rank), both float32; scale: alpha / rank.

    The scale is not folded into up, so that a branch is saved as it was read. Raises CaloraError for tensors that do not
    fit together.
    """

    down: Tensor
    up: Tensor
    scale: float

    def __post_init__(self) -> None:
        if self.down.dim() != 2 or self.up.dim() != 2 or self.down.shape[0] != self.up.shape[1]:
            raise CaloraError(
                f"a low-rank branch needs (rank, in) and (out, rank), got {tuple(self.down.shape)} and {tuple(self.up.shape)}"
            )
        if self.down.dtype != torch.float32 or self.up.dtype != torch.float32:
            raise CaloraError(f"a low-rank branch is kept in float32, got {self.down.dtype} and {self.up.dtype}; convert with .float()")

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    def to(self, device: torch.device) -> Factors:
        return replace(self, down=self.down.to(device), up=self.up.to(device))


@dataclass(frozen=True)
class Int8Factors:
    """One branch of one layer in a byte a parameter, as it lies on disk and in memory until it acts.

    down_codes: (rank, in_features), up_codes: (out_features, rank), both int8; scales: (2, rank) float32, of each row of D and
    of each column of U; scale: as in ``Factors``, whose down and up are formed anew whenever they are read.
    """

    down_codes: Tensor
    up_codes: Tensor
    scales: Tensor
    scale: float

    def __post_init__(self) -> None:
        down, up = self.down_codes, self.up_codes
        if down.dim() != 2 or up.dim() != 2 or down.shape[0] != up.shape[1] or self.scales.shape != (2, len(down)):
            raise CaloraError(
                f"a low-rank branch in int8 needs (rank, in), (out, rank) and (2, rank), got {tuple(down.shape)}, {tuple(up.shape)} "
                f"and {tuple(self.scales.shape)}"
            )
        if (down.dtype, up.dtype, self.scales.dtype) != (torch.int8, torch.int8, torch.float32):
            raise CaloraError(
                f"a low-rank branch in int8 has int8 codes and float32 scales, got {down.dtype}, {up.dtype} and {self.scales.dtype}"
            )

    @classmethod
    def of(cls, f: Branch) -> Int8Factors:
        """A branch rounded to nearest; one that is in int8 already stays bit for bit."""
        if isinstance(f, cls):
            return f
        scales = torch.stack((f.down.abs().amax(1), f.up.abs().amax(0))) / 127
        safe = torch.where(scales == 0, torch.ones_like(scales), scales)
        down, up = (f.down / safe[0].unsqueeze(1)).round_(), (f.up / safe[1]).round_()
        return cls(down.to(torch.int8), up.to(torch.int8).contiguous(), scales, f.scale)

    @property
    def down(self) -> Tensor:
        return self.down_codes * self.scales[0].unsqueeze(1)

    @property
    def up(self) -> Tensor:
        return self.up_codes * self.scales[1]

    @property
    def rank(self) -> int:
        return self.down_codes.shape[0]

    def to(self, device: torch.device) -> Int8Factors:
        return replace(
            self, down_codes=self.down_codes.to(device), up_codes=self.up_codes.to(device), scales=self.scales.to(device)
        )


Branch = Factors | Int8Factors


@dataclass
class _Resident:
    """One adapter of one layer. ready: its operands for inference, made when it is first needed."""

    lora: Branch | None
    recovery: Branch | None
    ready: Bank | None = None

    @property
    def small(self) -> bool:
        """Whether it is kept in int8: then its operands, which are larger, are kept only while it acts."""
        return isinstance(self.lora, Int8Factors) or isinstance(self.recovery, Int8Factors)

    def branches(self) -> list[tuple[str, Branch]]:
        return [(kind, f) for kind in BRANCHES if (f := getattr(self, kind)) is not None]

    def ranks(self) -> tuple[int, int]:
        return self.lora.rank if self.lora else 0, self.recovery.rank if self.recovery else 0


class LowRankBank(nn.Module):
    """The adapters of one layer: any number resident, some of them active, at most one in training.

    in_features, out_features: of the layer. dtype: what the operands of inference are cast to, once (float16 layers use
    float32). tiled: keep U in the operator's decode order; False for banks that torch evaluates beside a dense layer.
    Nothing here is ever in the model's state dict, not even the parameters of an adapter in training: adapters have files of
    their own.
    """

    def __init__(self, in_features: int, out_features: int, dtype: torch.dtype = torch.float32, tiled: bool = True) -> None:
        super().__init__()
        self.in_features, self.out_features, self.tiled = in_features, out_features, tiled
        self.dtype = torch.float32 if dtype == torch.float16 else dtype
        self.active: tuple[str, ...] = ()
        self._resident: dict[str, _Resident] = {}
        self._bank: Bank = NO_BANK
        self._slots: _Slots | None = None
        self._trained: str | None = None
        self._dropout = (0.0, 0.0)

    # -- resident adapters ------------------------------------------------------------------------------------------------

    def add(self, name: str, lora: Branch | None, recovery: Branch | None) -> None:
        """Make an adapter resident, replacing one of the same name; it does not act before :meth:`activate`."""
        for kind, branch in (("LoRA", lora), ("recovery", recovery)):
            if branch is not None and (branch.down.shape[1] != self.in_features or branch.up.shape[0] != self.out_features):
                raise CaloraError(
                    f"the {kind} branch of adapter {name!r} is for a {branch.up.shape[0]} x {branch.down.shape[1]} layer; "
                    f"this one is {self.out_features} x {self.in_features}: the adapter belongs to another model"
                )
        if lora is None and recovery is None:
            raise CaloraError(f"adapter {name!r} has neither a LoRA nor a recovery branch for this layer")
        if name == self._trained:
            raise CaloraError(f"adapter {name!r} is being trained; finish training before replacing it")
        entry = _Resident(lora, recovery)
        if self._slots is not None:
            self._slots.check(f"adapter {name!r}", *entry.ranks())
        self._resident[name] = entry
        if name in self.active:
            self.activate(self.active)

    def remove(self, name: str) -> None:
        if name == self._trained:
            self.finish_training(name)
        if self._resident.pop(name, None) is not None and name in self.active:
            self.activate([n for n in self.active if n != name])

    def names(self) -> list[str]:
        return list(self._resident)

    def branches(self, name: str) -> tuple[Branch | None, Branch | None]:
        """The LoRA and recovery branch of an adapter as they are now, detached; (None, None) if it has none here."""
        entry = self._resident.get(name)
        if entry is None:
            return None, None
        if name != self._trained:
            return entry.lora, entry.recovery
        lora, recovery = (
            replace(f, down=getattr(self, f"{kind}_A").detach().clone(), up=getattr(self, f"{kind}_B").detach().clone()) if f else None
            for kind, f in (("lora", entry.lora), ("recovery", entry.recovery))
        )
        return lora, recovery

    # -- what acts --------------------------------------------------------------------------------------------------------

    def activate(self, names: Sequence[str], dtype: torch.dtype | None = None) -> None:
        """Let these adapters act together; names without a branch in this layer are skipped.

        One name: its operands are taken by reference. Several: concatenated along the rank. After :meth:`reserve` they are
        copied into the slots instead. dtype: of the layer, if it changed.
        """
        if dtype is not None and dtype != self.dtype:
            self._cast(dtype)
        names = tuple([n for n in names if n in self._resident])
        if self._trained is not None and names not in ((), (self._trained,)):
            raise CaloraError(f"adapter {self._trained!r} is being trained; finish that before activating {', '.join(names)}")
        if not names:
            bank = NO_BANK
        elif len(names) == 1:
            bank = NO_BANK if names[0] == self._trained else self._prepare(names[0])
        else:
            bank = self._operands([self._resident[n] for n in names])
        for name in self.active:
            if names != (name,) and (left := self._resident.get(name)) is not None and left.small:
                left.ready = None
        if self._slots is not None:
            self._slots.fill(bank)
        # Past nn.Module.__setattr__, which would be most of the time that switching a model's adapters takes.
        self.__dict__.update(active=names, _bank=bank)

    def prepare(self, name: str) -> None:
        """Cast and tile an adapter's operands now, so that activating it later costs nothing; not those of one kept in int8."""
        if not self._resident[name].small:
            self._prepare(name)

    def factors(self) -> Bank:
        """(down, up, identity_rank) for ``ops.linear``: fp32 and differentiable while an adapter trains."""
        if self._trained is not None:
            return self._live() if self.active and not self._drops else NO_BANK
        return self._bank if self._slots is None else self._slots.bank

    def forward(self, x: Tensor) -> Tensor | None:
        """The active branches in torch, fp32: what a dense layer's output lacks. x: (..., in_features). None if inactive."""
        term = self.forward_train(x)
        if term is not None:
            return term
        down, up, identity_rank = self.factors()
        if down is None:
            return None
        return linear(ops.gelu_rows(linear(x.to(down.dtype), down), identity_rank), up).float()

    # -- training ---------------------------------------------------------------------------------------------------------

    def train_adapter(self, name: str, dropout: tuple[float, float] = (0.0, 0.0)) -> list[nn.Parameter]:
        """Turn an adapter into fp32 parameters lora_A, lora_B, recovery_A, recovery_B (those it has) and activate it.

        dropout: probability on the input of the LoRA and of the recovery branch (independent masks, in train mode only).
        """
        entry = self._resident.get(name)
        if entry is None:
            raise CaloraError(f"there is no adapter {name!r} in this layer; add it before training")
        if self._trained is not None:
            raise CaloraError(f"adapter {self._trained!r} is being trained already; finish that first")
        if not all(0.0 <= p < 1.0 for p in dropout):
            raise CaloraError(f"dropout must lie in [0, 1), got {dropout}")
        parameters = []
        for kind, branch in entry.branches():
            for suffix, value in (("A", branch.down), ("B", branch.up)):
                parameter = nn.Parameter(value.detach().clone(memory_format=torch.contiguous_format))
                self.register_parameter(f"{kind}_{suffix}", parameter)
                parameters.append(parameter)
            # Until training is finished only the shapes of what it started from are needed.
            setattr(entry, kind, Factors(_shape_of(branch.down), _shape_of(branch.up), branch.scale))
        entry.ready = None
        self._trained, self._dropout = name, dropout
        self.activate([name])
        return parameters

    def finish_training(self, name: str) -> None:
        """Turn the parameters back into a resident adapter."""
        if name != self._trained:
            raise CaloraError(f"adapter {name!r} is not being trained")
        lora, recovery = self.branches(name)
        for kind, _ in self._resident[name].branches():
            delattr(self, f"{kind}_A")
            delattr(self, f"{kind}_B")
        self._trained = None
        self._resident[name] = _Resident(lora, recovery)
        self.activate(self.active)

    def forward_train(self, x: Tensor) -> Tensor | None:
        """The trained branches with dropout, in torch and fp32; None where the fused operator does the work instead."""
        if self._trained is None or not self.active or not self._drops:
            return None
        x = x.float()
        term = None
        for (kind, branch), p in zip(self._resident[self._trained].branches(), self._rates(), strict=True):
            t = linear(dropout(x, p), getattr(self, f"{kind}_A"))
            y = linear(gelu(t) if kind == "recovery" else t, getattr(self, f"{kind}_B") * branch.scale)
            term = y if term is None else term + y
        return term

    @property
    def trained(self) -> str | None:
        """The adapter in training, if any."""
        return self._trained

    @property
    def _drops(self) -> bool:
        return self.training and any(self._rates())

    def _rates(self) -> list[float]:
        """Dropout of the branches that the trained adapter has here."""
        return [self._dropout[BRANCHES.index(kind)] for kind, _ in self._resident[self._trained].branches()]

    def _live(self) -> Bank:
        entry = self._resident[self._trained]
        downs = [getattr(self, f"{kind}_A") for kind, _ in entry.branches()]
        ups = [getattr(self, f"{kind}_B") * f.scale for kind, f in entry.branches()]
        identity_rank = entry.lora.rank if entry.lora else 0
        return (downs[0], ups[0], identity_rank) if len(downs) == 1 else (torch.cat(downs), torch.cat(ups, 1), identity_rank)

    # -- slots for compiled models ----------------------------------------------------------------------------------------

    def reserve(self, lora_rank: int, recovery_rank: int) -> None:
        """Fixed slots, zero-padded: from now on activating copies into them and no shape ever changes, so that a compiled
        model switches adapters without being compiled again."""
        slots = _Slots(self, lora_rank, recovery_rank, self._device())
        for name, entry in self._resident.items():
            slots.check(f"adapter {name!r}", *entry.ranks())
        self._slots = slots
        self.activate(self.active)

    # -- operands of inference --------------------------------------------------------------------------------------------

    def _prepare(self, name: str) -> Bank:
        entry = self._resident[name]
        if entry.ready is None:
            entry.ready = self._operands([entry])
        return entry.ready

    def _operands(self, entries: Sequence[_Resident]) -> Bank:
        lora = [e.lora for e in entries if e.lora is not None]
        branches = lora + [e.recovery for e in entries if e.recovery is not None]
        downs, ups = [f.down for f in branches], [f.up * f.scale for f in branches]  # the scale is folded before the cast
        down, up = (downs[0], ups[0]) if len(branches) == 1 else (torch.cat(downs), torch.cat(ups, 1))
        down, up = down.to(self.dtype).contiguous(), up.to(self.dtype)
        return down, ops.tile_up(up) if self.tiled else up, sum(f.rank for f in lora)

    def _cast(self, dtype: torch.dtype) -> None:
        self.dtype = torch.float32 if dtype == torch.float16 else dtype
        for entry in self._resident.values():
            entry.ready = None
        if self._slots is not None:
            self._slots = _Slots(self, self._slots.lora_rank, self._slots.recovery_rank, self._device())

    def _device(self) -> torch.device | None:
        return next((f.down.device for e in self._resident.values() for _, f in e.branches()), None)

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        """Nothing."""

    def _load_from_state_dict(self, *args):
        """Nothing, and nothing is missing."""

    def _apply(self, fn, recurse=True):
        # Devices follow the module; what is fp32 stays fp32, and the operands of inference are cast anew from it.
        def move(t: Tensor) -> Tensor:
            return t.to(fn(t.new_empty(0)).device)

        super()._apply(move, recurse)
        for entry in self._resident.values():
            for kind, branch in entry.branches():
                setattr(entry, kind, branch.to(move(branch.down.new_empty(0)).device))
        self._cast(fn(torch.empty(0, dtype=self.dtype)).dtype)
        self.activate(self.active)
        return self

    def extra_repr(self) -> str:
        return f"resident={self.names()}, active={list(self.active)}"


def _shape_of(tensor: Tensor) -> Tensor:
    """One of the same shape, dtype and device that takes no memory."""
    return tensor.new_zeros(()).expand(tensor.shape)


class _Slots:
    """Zero-padded operands of a fixed shape: rows [0, lora_rank) for LoRA, [lora_rank, lora_rank + recovery_rank) for recovery."""

    def __init__(self, owner: LowRankBank, lora_rank: int, recovery_rank: int, device: torch.device | None) -> None:
        self.lora_rank, self.recovery_rank = lora_rank, recovery_rank
        down = torch.zeros(lora_rank + recovery_rank, owner.in_features, dtype=owner.dtype, device=device)
        up = torch.zeros(owner.out_features, lora_rank + recovery_rank, dtype=owner.dtype, device=device)
        self.bank: Bank = (down, ops.tile_up(up) if owner.tiled else up, lora_rank)
        self._used = (0, 0)

    def check(self, what: str, lora_rank: int, recovery_rank: int) -> None:
        if lora_rank > self.lora_rank or recovery_rank > self.recovery_rank:
            raise CaloraError(
                f"{what} needs rank {lora_rank} for LoRA and {recovery_rank} for recovery, {self.lora_rank} and {self.recovery_rank} "
                "are reserved for hot-swapping; load it before enable_hotswap, or give that a larger target_rank"
            )

    @torch.no_grad()
    def fill(self, bank: Bank) -> None:
        """Copy operands in, and zero what the previous ones leave behind in U (which silences their rows of D too)."""
        down, up, identity_rank = bank
        used = (identity_rank, 0 if down is None else down.shape[0] - identity_rank)
        self.check("the selected adapters together", *used)
        slot_down, slot_up, _ = self.bank
        for at, source, count, before in ((0, 0, used[0], self._used[0]), (self.lora_rank, used[0], used[1], self._used[1])):
            if count:
                slot_down[at : at + count].copy_(down[source : source + count])
                slot_up.narrow(1, at, count).copy_(up.narrow(1, source, count))  # the rank is dimension 1, tiled or not
            if before > count:
                slot_up.narrow(1, at + count, before - count).zero_()
        self._used = used
