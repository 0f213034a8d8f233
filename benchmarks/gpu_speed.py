"""The speeds that gpu_check.py measures: ceilings of the GPU, our formats, the peers. On a CPU the same calls run once, untimed."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from types import SimpleNamespace

import torch
from gpu_stages import said
from torch import Tensor

from calora_ext import WeightFormat, ops

SPEED_FORMATS = [WeightFormat("int4", 128), WeightFormat("int4", 64), WeightFormat("nf4", 64), WeightFormat("int8"), WeightFormat("bf16"),
                 *(WeightFormat(*values, pattern=pattern) for pattern in ("2:4", "unstructured") for values in (("int4", 128), ("bf16",)))]  # fmt: skip
INT4, BANK, BY_ROW = "int4 g128", "int4 g128 + LoRA 16 + recovery 64", "int4 g128, 8 banks for 8 rows"
CUBLAS, PEFT = "cuBLAS bf16", "cuBLAS bf16 + LoRA as PEFT computes it"
EAGER = ", eager"
INT4PACK, BITSANDBYTES, SEMI_STRUCTURED = "torch _weight_int4pack_mm g128", "bitsandbytes nf4", "torch 2:4 bf16 (cuSPARSELt)"
SPEED_SHAPES = ((8192, 8192), (8192, 28672), (4096, 14336))  # (in, out)
COPIES_BYTES = 256 << 20  # rotate weights through this much: several times any L2
GRAPH_CALLS = 32  # in a graph that is timed, so that its own start counts for little


def random_weight(fmt: WeightFormat, in_: int, out: int, device: str) -> list[Tensor]:
    """Packed tensors of a layer as the device has them, made there of random bytes: what they decode to does not matter for
    speed, but zeros would take less power than weights do. The bits and offsets of an unstructured weight are true, half of them set."""
    shapes = fmt.tensors(in_, out)
    tensors = {name: torch.empty(torch.Size(shape).numel(), dtype=torch.uint8, device=device).random_().view(shape) for name, shape in shapes.items()}
    if fmt.pattern == "2:4":  # only some numbers of four bits stand for places, see api.h
        numbers = torch.tensor((0, 1, 4, 5, 7, 13, 0, 1, 4, 5, 7, 13, 0, 1, 4, 5), dtype=torch.uint8, device=device)
        packed = tensors["packed"].int()
        tensors["packed"] = numbers[packed & 15] | numbers[packed >> 4] << 4
    if fmt.pattern == "unstructured":
        g = fmt.geometry(in_, out)
        words = tensors["packed"].view(g.tiles, g.blocks, g.block_bytes)[..., : g.code_bytes].reshape(-1, 128)
        counts = torch.stack([words >> i & 1 for i in range(8)]).sum((0, 2))  # of each chunk
        bits = {"int4": 4, "nf4": 4, "int8": 8, "bf16": 16}[fmt.values]
        ends = ((counts * bits + 63) // 64).cumsum(0)  # in units of 8 bytes
        starts = torch.cat((ends.new_zeros(1), ends[:-1])).int().view(torch.uint8)
        tensors["offsets"].view(-1)[: starts.numel()] = starts
        extent = -(-(int(ends[-1]) * 8 + 128 * bits + 64) // 64) * 64
        tensors["kept"] = torch.empty(extent, dtype=torch.uint8, device=device).random_()
    return list((in_words(tensors, out) if device == "cuda" else tensors).values())


def in_words(tensors: dict[str, Tensor], out: int) -> dict[str, Tensor]:
    """The shapes by which the kernels tell that the bytes are in CUDA order."""
    shapes = {"packed": (-(-out // 32), -1, 16), "offsets": (-1,)}
    return {name: t.view(shapes.get(name, (-1, 16))) for name, t in tensors.items()}


def beside(call: Callable[[], object], device: str = "cuda") -> object:
    """The call on a stream of its own, which waits for what came before and is waited for; on a CPU the call."""
    if device == "cpu":
        return call()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        result = call()
    torch.cuda.current_stream().wait_stream(stream)
    return result


def capture(call: Callable[[], object], device: str = "cuda") -> tuple[object, object]:
    """(a graph of the call, with replay(); what the call returned, which every replay overwrites)."""
    if device == "cpu":
        result = call()
        return SimpleNamespace(replay=lambda: result.copy_(call())), result
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call()
    return graph, result


def timed(calls: list[Callable[[], object]], rounds: int = 30, device: str = "cuda") -> float:
    """Seconds of one call: the median replay of a graph of all of them, as often as it takes, divided by their number."""
    if device == "cpu":
        return timed_eager(calls, rounds, device)
    seconds = timed_eager(calls, 1)  # long calls need no company to hide the graph's start
    calls = calls * -(-GRAPH_CALLS // len(calls)) if seconds < 1e-4 else calls
    rounds = rounds if seconds < 1e-4 else 10

    def all_of_them() -> None:
        for call in calls:
            call()

    beside(all_of_them)
    graph, _ = capture(all_of_them)
    return timed_eager([graph.replay], rounds) / len(calls)


def timed_eager(calls: list[Callable[[], object]], rounds: int = 30, device: str = "cuda") -> float:
    """Seconds of one call, launches included; on a CPU, where only the code is tried, NaN."""
    if device == "cpu":
        for call in calls:
            call()
        return float("nan")
    samples = []
    for i in range(rounds + 3):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        for call in calls:
            call()
        end.record()
        end.synchronize()
        if i >= 3:
            samples.append(begin.elapsed_time(end) / 1000)
    return statistics.median(samples) / len(calls)


def ceilings(size: int | None = None, n: int = 8192, device: str = "cuda") -> dict:
    """Bytes per second of a copy (read + written) and of a read-only stream; FLOP/s of a bf16 matrix product."""
    size = size or min(4 << 30, torch.cuda.get_device_properties(0).total_memory // 8) // 4096 * 4096
    source, target = torch.empty(size, dtype=torch.uint8, device=device).random_(), torch.empty(size, dtype=torch.uint8, device=device)
    copy = 2 * size / timed_eager([lambda: target.copy_(source)], 10, device)
    read = size / timed_eager([lambda: torch.ops.calora.read(source)], 10, device)
    a, b = (torch.randn(n, n, device=device, dtype=torch.bfloat16) for _ in range(2))
    product = 2 * n**3 / timed_eager([lambda: a @ b], 10, device)
    return {"copy_bytes_per_s": copy, "read_bytes_per_s": read, "bf16_flop_per_s": product}


@torch.no_grad()
def speed_rows(in_: int, out: int, m: int, rows: list[dict], read: float, device: str = "cuda") -> None:
    """One shape and M: our formats with and without the bank, and the peers. Every weight has adapters of its own."""
    dtype, lora, recovery = torch.bfloat16, 16, 64
    x = torch.randn(m, in_, device=device, dtype=dtype)
    bank_bytes = 2 * (lora + recovery) * (in_ + out)

    def add(name: str, seconds: float, nbytes: int) -> None:
        row = {"in": in_, "out": out, "m": m, "what": name, "seconds": seconds, "bytes": nbytes, "of_read_ceiling": nbytes / seconds / read}
        rows.append(row)
        print(f"  {out} x {in_}  m={m:<4} {name:40} {seconds * 1e6:9.1f} us  {row['of_read_ceiling']:.2f} of the read ceiling")

    def ours(w: list[Tensor], fmt: WeightFormat, *bank) -> Tensor:
        return ops.linear(x, w, fmt, in_, out, *bank)

    def copies(nbytes: int) -> int:
        return max(4, -(-COPIES_BYTES // nbytes)) if device == "cuda" else 1

    def random_bank() -> tuple[Tensor, Tensor]:
        down = torch.randn(lora + recovery, in_, device=device, dtype=dtype) / in_**0.5
        return down, ops.tile_up(torch.randn(out, lora + recovery, device=device, dtype=dtype))

    for fmt in SPEED_FORMATS:
        weights = [random_weight(fmt, in_, out, device)]
        nbytes = sum(t.numel() for t in weights[0])
        weights += [random_weight(fmt, in_, out, device) for _ in range(copies(nbytes) - 1)]
        banks = [(None, *random_bank(), lora) for _ in weights]
        add(f"{fmt}", timed([lambda w=w, fmt=fmt: ours(w, fmt) for w in weights], device=device), nbytes)
        with_bank = [lambda w=w, fmt=fmt, bank=bank: ours(w, fmt, *bank) for w, bank in zip(weights, banks, strict=True)]
        add(f"{fmt} + LoRA 16 + recovery 64", timed(with_bank, device=device), nbytes + bank_bytes)
        if str(fmt) == INT4:
            add(BANK + EAGER, timed_eager(with_bank, device=device), nbytes + bank_bytes)
        if str(fmt) == INT4 and m == 8 and device == "cuda":
            stacks = [(None, *(torch.stack(many) for many in zip(*(random_bank() for _ in range(8)), strict=True)), lora, "exact", torch.arange(8, device=device)) for _ in weights]
            add(BY_ROW, timed([lambda w=w, fmt=fmt, stack=stack: ours(w, fmt, *stack) for w, stack in zip(weights, stacks, strict=True)], device=device), nbytes + 8 * bank_bytes)
    dense = [torch.randn(out, in_, device=device, dtype=dtype) for _ in range(copies(2 * in_ * out))]
    nbytes = 2 * in_ * out
    add(CUBLAS, timed([lambda w=w: torch.nn.functional.linear(x, w) for w in dense], device=device), nbytes)
    adapters = [(torch.randn(lora, in_, device=device) / in_**0.5, torch.randn(out, lora, device=device)) for _ in dense]

    def with_lora(w: Tensor, a: Tensor, b: Tensor) -> Tensor:  # what peft.tuners.lora.Linear does in eval mode with its fp32 adapters
        y = torch.nn.functional.linear(x, w)
        return (y + (x.float() @ a.t() @ b.t()) * 2.0).to(dtype)

    calls = [lambda w=w, a=a, b=b: with_lora(w, a, b) for w, (a, b) in zip(dense, adapters, strict=True)]
    add(PEFT, timed(calls, device=device), nbytes + 4 * lora * (in_ + out))
    add(PEFT + EAGER, timed_eager(calls, device=device), nbytes + 4 * lora * (in_ + out))
    del dense, adapters, calls

    def peer(name: str, nbytes: int, build: Callable[[int], list[Callable[[], object]]], clock: Callable[..., float] = timed) -> None:
        try:
            add(name, clock(build(copies(nbytes)), device=device), nbytes)
        except Exception as error:
            print(f"  {name}: left out ({said(error)})")

    def int4pack(n: int) -> list[Callable[[], object]]:
        codes = torch.randint(0, 256, (out, in_ // 2), dtype=torch.uint8, device=device)
        scales = torch.ones(in_ // 128, out, 2, device=device, dtype=dtype)
        weights = [torch.ops.aten._convert_weight_to_int4pack(codes, 8) for _ in range(n)]
        return [lambda w=w: torch.ops.aten._weight_int4pack_mm(x, w, 128, scales) for w in weights]

    def bitsandbytes(n: int) -> list[Callable[[], object]]:
        from bitsandbytes.nn import Linear4bit

        layers = [Linear4bit(in_, out, bias=False, compute_dtype=dtype, quant_type="nf4", device=device).to(device) for _ in range(n)]
        return [lambda layer=layer: layer(x) for layer in layers]

    def two_four(n: int) -> list[Tensor]:
        kept = torch.tensor([1, 1, 0, 0], device=device, dtype=dtype).repeat(in_ // 4)
        return [torch.randn(out, in_, device=device, dtype=dtype) * kept for _ in range(n)]

    def semi_structured(n: int) -> list[Callable[[], object]]:
        return [lambda w=w: torch.nn.functional.linear(x, w) for w in map(torch.sparse.to_sparse_semi_structured, two_four(n))]

    def compressed_each_time(n: int) -> list[Callable[[], object]]:
        return [lambda w=w: torch.nn.functional.linear(x, torch.sparse.to_sparse_semi_structured(w)) for w in two_four(n)]

    if m <= 64:  # with 2048 rows it takes 22 times as long as cuBLAS, which is known by now
        peer(INT4PACK, in_ * out // 2, int4pack)
    peer(BITSANDBYTES, in_ * out // 2, bitsandbytes)
    if m >= 64:  # whether prefill of 2:4 should go that way, which needs the dense weight compressed; at a small M it pads x
        peer(SEMI_STRUCTURED, in_ * out * 9 // 8, semi_structured)
        peer(SEMI_STRUCTURED + ", compressed each time" + EAGER, nbytes, compressed_each_time, timed_eager)
