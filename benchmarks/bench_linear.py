"""One linear layer against what else a user could run: `pytest benchmarks` (a table per shape, JSON by --benchmark-json).

Every row is a test; the rows of a group were timed together (``_bench.py``). Targets print OK or MISS at the end and never fail
a test. `-k 4096x4096-m1-` picks groups; a group is timed whole.
"""

from __future__ import annotations

import os

import pytest
from _bench import PROBE, Group, ReplayClock, measure

from calora_ext import ops

CLOCK = ReplayClock()
LARGE = [(4096, 4096), (4096, 11008)]
SMALL = [(896, 896), (896, 4864), (2048, 2048)]
LORA = " + LoRA r16"
OURS = [name + lora for name in ("calora int4 g128", "calora int4 g64") for lora in ("", LORA)]
BANKS = [f"calora int4 g{g} + {bank}" for g in (128, 64) for bank in ("LoRA r16 + recovery r16", "LoRA r64")]
EXACT = ["calora int4 g128 exact bf16", "calora int4 g128 exact fp32"]
TORCH = [name + lora for name in ("torch fp32", "torch bf16", "torch int4 g128", "torch dynamic int8") for lora in ("", LORA)]
OTHERS = [name + lora for name in ("bitsandbytes nf4", "onnxruntime int4", "llama.cpp Q4_0", "llama.cpp Q4_K", "llama.cpp Q8_0") for lora in ("", LORA)]


def groups() -> list[Group]:
    best = ops.native.available()[-1]
    capped = [isa for isa in ("avx2", "avx2-vnni") if isa in ops.native.available()]
    result = [Group(*shape, m, best) for shape in LARGE for m in (1, 4, 16, 512)]
    result += [Group(*shape, m, best) for shape in SMALL for m in (1, 16, 512)]
    result += [Group(*shape, m, isa) for isa in capped for shape in LARGE for m in (1, 16)]
    result += [Group(896, 896, m, isa) for isa in capped for m in (1, 4, 16, 512)]
    if len(os.sched_getaffinity(0)) >= 2:
        result += [Group(*shape, 1, best, threads=2) for shape in LARGE + SMALL[:1]]
    return result


def rows(group: Group) -> list[str]:
    names = OURS + EXACT + ["calora nf4 g64", "calora nf4 g64 + LoRA r16", "calora int8", "calora bf16"] + TORCH
    names += BANKS if group.m <= 8 else []
    return names + (OTHERS if group.isa.startswith("avx512") else [])


def targets(group: Group, name: str, timings: dict) -> list[tuple[str, float, float]]:
    """(what, measured, at least) of a row."""
    t, result = timings[name], []
    at_least = lambda what, value, goal: result.append((what, value, goal))  # noqa: E731
    large = (group.in_features, group.out_features) in LARGE
    if name in OURS:
        for peer in ("torch fp32", "torch bf16"):
            at_least(f"x {peer}{LORA * name.endswith(LORA)}", t.speedup(timings[peer + LORA * name.endswith(LORA)]), 1.0)
    if group.m == 1 and large and name in OURS and group.threads == 1:
        if name.endswith(LORA):
            at_least("of the read bandwidth", t.fraction, 0.85 if group.isa.startswith("avx512") else 0.80)
            at_least("x torch int4 + LoRA", t.speedup(timings["torch int4 g128" + LORA]), 1.8)
            at_least("x torch bf16", t.speedup(timings["torch bf16"]), 6.0)
            for peer, goal in (("onnxruntime int4", 1.3), ("llama.cpp Q4_0", 1.1), ("llama.cpp Q4_K", 1.1)):
                if peer + LORA in timings:
                    at_least(f"x {peer} + LoRA", t.speedup(timings[peer + LORA]), goal)
        elif "bitsandbytes nf4" in timings:
            at_least("x bitsandbytes", t.speedup(timings["bitsandbytes nf4"]), 1.3)
    if group.m == 1 and name == "calora bf16" and large:
        at_least("of the read bandwidth", t.fraction, 0.9)
    if group.m == 1 and name in BANKS and large and group.threads == 1:
        base = timings[name.split(" + ")[0]]
        share = (t.nbytes - base.nbytes) / base.nbytes
        allowed = 1.25 * share * base.median + 2e-6
        at_least(f"allowed / actual cost of the bank (share of the bytes {share:.3f}, cost {t.extra_seconds(base) / base.median:.3f})",
                 allowed / max(t.extra_seconds(base), 1e-9), 1.0)  # fmt: skip
    if name == "calora int4 g128" and group.isa.startswith("avx512") and large and group.m in (16, 512):
        at_least("x torch bf16", t.speedup(timings["torch bf16"]), 1.8 if group.m == 16 else 1.5)
    return result


@pytest.mark.benchmark(timer=CLOCK)
@pytest.mark.parametrize(("group", "name"), [(g, name) for g in groups() for name in rows(g)], ids=str)
def test_linear(benchmark, group: Group, name: str, record_target):
    timings = measure(group)
    if name not in timings:
        pytest.skip(f"{name.split(' + ')[0]} is not installed")
    t = timings[name]
    benchmark.group = str(group)
    benchmark.extra_info.update(
        row=name, in_features=group.in_features, out_features=group.out_features, m=group.m, isa=group.isa, threads=group.threads,
        weight_bytes=t.nbytes, gbps=t.gbps, bandwidth_fraction=t.fraction, gflops=2e-9 * group.m * group.in_features * group.out_features / t.median,
        speedup_over_torch_bf16=t.speedup(timings["torch bf16"]), probe=PROBE,
    )  # fmt: skip
    CLOCK.replay(benchmark, t.seconds)
    for what, value, goal in targets(group, name, timings):
        record_target(str(group), name, what, value, goal)
