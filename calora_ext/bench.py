"""The fused op beside what else is installed, on one layer: what ``calora bench`` and the demo time.

Every peer computes y = x W^T, without a LoRA and with one. Peers take turns on copies of the weight that together exceed
the last-level cache (``measure``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from importlib.util import find_spec

import torch
from torch import Tensor
from torch.nn.functional import linear

from . import ops
from .errors import CaloraError
from .measure import copies_for, interleaved, last_level_cache
from .recipe import Recipe

DENSE = tuple(Recipe(weights=w, **g) for w, g in (("int4", {"group_size": 128}), ("int4", {"group_size": 64}), ("nf4", {}), ("int8", {}), ("bf16", {})))
SPARSE = tuple(Recipe(weights=w, sparsity=s) for w in ("int4", "nf4", "int8", "bf16") for s in ("2:4", 0.5, 0.6, 0.7))
Forward = Callable[..., Tensor]  # (x) or, where the LoRA is fused, (x, down, up) -> y


@dataclass(frozen=True)
class Row:
    """One timing. rows: of x. rank: of the LoRA, 0 without one. isa: the rung of our kernels. nbytes: of the weight. read: bytes a second
    that reading memory and nothing else gave, in turns with the rows."""

    peer: str
    in_features: int
    out_features: int
    rows: int
    rank: int
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


@dataclass(frozen=True)
class Peer:
    """A way to compute the layer. dtype: of x. nbytes: of one stored weight. copy(): a forward with a weight of its own."""

    dtype: torch.dtype
    nbytes: int
    copy: Callable[[], Forward]
    fused: bool = False


def compare(
    in_features: int,
    out_features: int,
    rows: int = 1,
    rank: int = 16,
    recipes: Sequence[Recipe] = DENSE + SPARSE,
    others: Sequence[str] | None = None,
    seconds: float = 0.5,
) -> list[Row]:
    """Time layers compressed by ``recipes`` on the current rung against ``others`` (names of :func:`installed`, default all).

    rows: of x, 1 for decoding. rank: of the LoRA; 0 times the layer without one only. seconds: per peer.
    """
    weight = torch.randn(out_features, in_features) / in_features**0.5
    peers = {f"calora {name_of(recipe)}": _calora(recipe, weight) for recipe in recipes}
    there = installed(in_features, out_features)
    peers |= {name: there[name](weight) for name in (there if others is None else others)}
    calls = {}
    for name, peer in peers.items():
        copies = [peer.copy() for _ in range(copies_for(peer.nbytes))]
        x = torch.randn(rows, in_features).to(peer.dtype)
        calls[name, 0] = [partial(forward, x) for forward in copies]
        if rank:
            down, up = torch.randn(rank, in_features).to(peer.dtype), torch.randn(out_features, rank).to(peer.dtype)
            up = ops.tile_up(up) if peer.fused else up
            calls[name, rank] = [partial(_with_lora, peer.fused, forward, x, down, up) for forward in copies]
    probe = torch.ones(2 * last_level_cache(), dtype=torch.uint8)
    with torch.inference_mode():
        times = interleaved({**calls, "read": [partial(_read, probe)]}, seconds)
    read = probe.nbytes / times.pop("read")
    return [
        Row(name, in_features, out_features, rows, r, ops.native.isa() if peers[name].fused else None,
            torch.get_num_threads(), value, peers[name].nbytes, read)
        for (name, r), value in times.items()
    ]  # fmt: skip


def fastest_product(seconds: float = 0.2) -> tuple[float, str]:
    """Operations a second in the fastest of some matrix products that the caches hold, 512 x 1024 by 1024 x 1024, and its name: torch's
    and ours on dense weights."""
    rows = compare(1024, 1024, 512, 0, [Recipe(weights="int8"), Recipe(weights="bf16")], ["torch fp32", "torch bf16"], seconds)
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


def installed(in_features: int, out_features: int) -> dict[str, Callable[[Tensor], Peer]]:
    """The other ways to compute a layer of that size that this environment has: name -> a function of the dense weight."""
    there = {
        "torch fp32": partial(_torch, torch.float32),
        "torch bf16": partial(_torch, torch.bfloat16),
        "torch int4 g128": _torch_int4,
        "torch dynamic int8": _torch_int8,
    }
    if not hasattr(torch.ops.aten, "_weight_int4pack_mm_for_cpu") or in_features % 128 or out_features % 32:
        del there["torch int4 g128"]
    if find_spec("bitsandbytes") is not None and in_features % 64 == 0:  # else its CPU kernel fails, or takes the wrong scales
        there["bitsandbytes nf4"] = _bitsandbytes
    return there


def _with_lora(fused: bool, forward: Forward, x: Tensor, down: Tensor, up: Tensor) -> Tensor:
    """One call of ours; for the others what PEFT adds to any layer: two more products and a sum."""
    return forward(x, down, up) if fused else forward(x) + linear(linear(x, down), up)


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

        def forward(x: Tensor, down: Tensor | None = None, up: Tensor | None = None) -> Tensor:
            rank = 0 if down is None else down.shape[0]
            return ops.linear(x, own, fmt, in_features, out_features, None, down, up, rank, "int8")

        return forward

    return Peer(torch.bfloat16, sum(t.nbytes for t in packed), copy, fused=True)


def _torch(dtype: torch.dtype, weight: Tensor) -> Peer:
    weight = weight.to(dtype)

    def copy() -> Forward:
        own = weight.clone()
        return lambda x: linear(x, own)

    return Peer(dtype, weight.nbytes, copy)


def _torch_int4(weight: Tensor, group_size: int = 128) -> Peer:
    """aten::_weight_int4pack_mm_for_cpu: what torch itself and torchao run for INT4 on a CPU."""
    out_features, in_features = weight.shape
    codes = torch.randint(0, 16, (out_features, in_features), dtype=torch.int32)  # the codes do not change the time
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
    scales = torch.rand(in_features // group_size, out_features, 2, dtype=torch.bfloat16)

    def copy() -> Forward:
        own, s = packed.clone(), scales.clone()
        return lambda x: torch.ops.aten._weight_int4pack_mm_for_cpu(x, own, group_size, s)

    return Peer(torch.bfloat16, packed.nbytes + scales.nbytes, copy)


def _torch_int8(weight: Tensor) -> Peer:
    """torch.ao's dynamically quantised nn.Linear: int8 weights, activations quantised per call."""
    out_features, in_features = weight.shape
    dense = torch.nn.Linear(in_features, out_features, bias=False)
    dense.weight.data = weight

    def copy() -> Forward:
        return torch.ao.quantization.quantize_dynamic(torch.nn.Sequential(dense), {torch.nn.Linear}, torch.qint8)

    return Peer(torch.float32, in_features * out_features, copy)


def _bitsandbytes(weight: Tensor) -> Peer:
    from bitsandbytes.nn import Linear4bit

    out_features, in_features = weight.shape

    def copy() -> Forward:
        layer = Linear4bit(in_features, out_features, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4")
        layer.weight.data = weight.clone()
        return layer.to("cpu").eval()

    return Peer(torch.bfloat16, in_features * out_features // 2 + in_features * out_features // 64 * 4, copy)
