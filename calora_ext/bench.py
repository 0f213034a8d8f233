"""The fused op beside what else is installed (``peers``), on one layer: what ``calora bench`` and the demo time.

Every peer computes y = x W^T, without a LoRA and with one. Peers take turns on copies of the weight that together exceed
the last-level cache (``measure``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial

import torch
from torch import Tensor

from . import ops
from .errors import CaloraError
from .measure import copies_for, interleaved, last_level_cache
from .peers import Forward, Peer, aten, installed
from .recipe import Recipe

DENSE = tuple(Recipe(weights=w, **g) for w, g in (("int4", {"group_size": 128}), ("int4", {"group_size": 64}), ("nf4", {}), ("int8", {}), ("bf16", {})))
SPARSE = tuple(Recipe(weights=w, sparsity=s) for w in ("int4", "nf4", "int8", "bf16") for s in ("2:4", 0.5, 0.6, 0.7))


@dataclass(frozen=True)
class Row:
    """One timing. rows: of x. rank, recovery_rank: of the LoRA and of the recovery modules, 0 without. isa: the rung of our kernels. nbytes: of
    the weight. read: bytes a second that reading memory and nothing else gave, in turns with the rows."""

    peer: str
    in_features: int
    out_features: int
    rows: int
    rank: int
    recovery_rank: int
    isa: str | None
    threads: int
    seconds: float
    nbytes: int
    read: float

    @property
    def bandwidth(self) -> float:
        """Bytes of the weight a second."""
        return self.nbytes / self.seconds

    @property
    def operations(self) -> int:
        """Multiplications and additions with every weight, kept or not; the LoRA's apart."""
        return 2 * self.rows * self.in_features * self.out_features

    def to_dict(self) -> dict:
        return {**asdict(self), "gigabytes_per_second": self.bandwidth / 1e9}


def compare(
    in_features: int,
    out_features: int,
    rows: int = 1,
    rank: int = 16,
    recipes: Sequence[Recipe] = DENSE + SPARSE,
    others: Mapping[str, Callable[[Tensor], Peer]] | None = None,
    seconds: float = 0.5,
    recovery_rank: int = 0,
) -> list[Row]:
    """Time layers compressed by ``recipes`` on the current rung against ``others``, by default :func:`peers.installed`.

    rows: of x, 1 for decoding. rank: of the LoRA; 0 times the layer without one only. recovery_rank: of recovery modules, which ours are
    timed with once more, beside that LoRA. seconds: per peer. Threads: torch's number.
    """
    weight = torch.randn(out_features, in_features) / in_features**0.5
    timed: dict[tuple[str, int, int], tuple[Peer, str | None]] = {}
    calls = {}

    def add(name: str, peer: Peer, isa: str | None, banks: Sequence[tuple[int, int]]) -> None:
        copies = [peer.copy() for _ in range(copies_for(peer.nbytes))]
        x = torch.randn(rows, in_features).to(peer.dtype)
        for r, recovery in banks:
            with_bank = partial(peer.with_lora, identity_rank=r) if recovery else peer.with_lora
            timed[name, r, recovery] = peer, isa
            calls[name, r, recovery] = [
                partial(with_bank(forward, *_factors(r + recovery, in_features, out_features, peer.dtype)) if r + recovery else forward, x)
                for forward in copies
            ]

    lora = [(rank, 0)] if rank else []
    for recipe in recipes:
        add(f"calora {name_of(recipe)}", _calora(recipe, weight), ops.native.isa(), [(0, 0), *lora] + [(rank, recovery_rank)] * bool(recovery_rank))
    for name, build in (installed(in_features, out_features) if others is None else others).items():
        add(name, build(weight), None, [(0, 0), *lora])
    probe = torch.ones(2 * last_level_cache(), dtype=torch.uint8)
    with torch.inference_mode():
        times = interleaved({**calls, "read": [partial(_read, probe)]}, seconds)
    read = probe.nbytes / times.pop("read")
    return [
        Row(name, in_features, out_features, rows, r, recovery, isa, torch.get_num_threads(), times[name, r, recovery], peer.nbytes, read)
        for (name, r, recovery), (peer, isa) in timed.items()
    ]


def _factors(rank: int, in_features: int, out_features: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Of each copy its own, as cold as the weight: (rank, in) and (out, rank)."""
    return torch.randn(rank, in_features).to(dtype), torch.randn(out_features, rank).to(dtype)


def fastest_product(seconds: float = 0.2) -> tuple[float, str]:
    """Operations a second in the fastest of some matrix products that the caches hold, 512 x 1024 by 1024 x 1024, and its name: torch's
    and ours on dense weights."""
    torchs = {name: build for name, build in aten.peers(1024, 1024).items() if name in ("torch fp32", "torch bf16")}
    rows = compare(1024, 1024, 512, 0, [Recipe(weights="int8"), Recipe(weights="bf16")], torchs, seconds)
    fastest = min(rows, key=lambda row: row.seconds)
    return fastest.operations / fastest.seconds, fastest.peer


def _read(data: Tensor) -> None:
    with rung(ops.native.available()[-1]):  # the machine's bandwidth, whatever rung is timed
        torch.ops.calora.read(data)


@contextmanager
def rung(isa: str | None) -> Iterator[None]:
    """Our kernels on another rung for the time being; None changes nothing. Raises CaloraError if it does not run here."""
    before = ops.native.isa()
    if isa is not None and isa not in ops.native.available():
        raise CaloraError(f"isa {isa!r} does not run here; choose one of {', '.join(ops.native.available())}")
    ops.native.set_isa(isa or before)
    try:
        yield
    finally:
        ops.native.set_isa(before)


@contextmanager
def threads(number: int | None) -> Iterator[None]:
    """Another number of threads for the time being; None changes nothing."""
    before = torch.get_num_threads()
    torch.set_num_threads(number or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def name_of(recipe: Recipe) -> str:
    share = f" {100 * recipe.sparsity:.0f} %" if isinstance(recipe.sparsity, float) else ""
    return f"{recipe.format()}{share}"


def _calora(recipe: Recipe, weight: Tensor) -> Peer:
    out_features, in_features = weight.shape
    recipe = recipe.resolve(calibrated=False)
    stored = recipe.format()
    tensors = list(stored.pack(weight, recipe.mask(weight)).values())
    packed, fmt = ops.as_it_runs(tensors, stored, in_features, out_features)

    def copy() -> Forward:  # what runs in another format is made again: it lies in larger pages than a clone would
        own = [t.clone() for t in packed] if fmt is stored else ops.as_it_runs(tensors, stored, in_features, out_features)[0]

        def forward(x: Tensor, down: Tensor | None = None, up: Tensor | None = None, identity_rank: int = 0) -> Tensor:
            return ops.linear(x, own, fmt, in_features, out_features, None, down, up, identity_rank, "int8")

        return forward

    return Peer(torch.bfloat16, sum(t.nbytes for t in packed), copy, _fused)


def _fused(forward: Forward, down: Tensor, up: Tensor, identity_rank: int | None = None) -> Forward:
    """In the same call: identity_rank ranks of a LoRA, by default all, then those of recovery modules."""
    return partial(forward, down=down, up=ops.tile_up(up), identity_rank=len(down) if identity_rank is None else identity_rank)
