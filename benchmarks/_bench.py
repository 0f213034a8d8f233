"""How every CPU row is timed.

A group (shape, M, rung, threads) is measured in a process of its own, pinned and capped to the rung's instructions, because
torch reads those caps when it loads. Inside it all rows take turns, round by round, each on weights that rotate through more
than five times the last-level cache and each right after a probe of the read bandwidth: what the machine's neighbours do in
a minute then hits all of them alike. Reported are medians over the rounds; ratios are formed within a round.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cache

ROUNDS = 11
BLOCK_SECONDS = 0.02  # of calls of one row in one round
PROBE_BYTES = 256 << 20
PROBE = "twelve prefetched streams in 4 KB pages"  # of the op calora::read
CAPS = {"avx2": "avx2", "avx2-vnni": "avx2"}  # rung -> what torch and oneDNN are capped to


@dataclass(frozen=True)
class Group:
    """Rows that are compared with each other. y (m, out_features) = x (m, in_features) W^T."""

    in_features: int
    out_features: int
    m: int
    isa: str
    threads: int = 1

    def __str__(self) -> str:
        return f"{self.in_features}x{self.out_features}-m{self.m}-{self.isa}-t{self.threads}"


@dataclass
class Timing:
    """Of one row; one entry per round. seconds: of a call. bandwidth: bytes/s read by the probe right before."""

    nbytes: int  # weights a call reads, adapters included
    seconds: list[float]
    bandwidth: list[float]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def gbps(self) -> float:
        return self.nbytes / self.median / 1e9

    @property
    def fraction(self) -> float:
        """Of the read bandwidth."""
        return statistics.median(self.nbytes / s / b for s, b in zip(self.seconds, self.bandwidth, strict=True))

    def speedup(self, other: Timing) -> float:
        """How many times faster than ``other``."""
        return statistics.median(o / s for o, s in zip(other.seconds, self.seconds, strict=True))

    def extra_seconds(self, base: Timing) -> float:
        return statistics.median(s - b for s, b in zip(self.seconds, base.seconds, strict=True))


@dataclass
class Case:
    """A row to time: call(i) multiplies with the i-th copy of the weights."""

    nbytes: int
    copies: int
    call: Callable[[int], object]


@cache
def measure(group: Group) -> dict[str, Timing]:
    """All rows of a group, timed in a fresh process. Raises RuntimeError with its output if that fails."""
    cap = CAPS.get(group.isa)
    env = dict(os.environ, OMP_NUM_THREADS=str(group.threads), CALORA_ISA=group.isa, HF_HUB_OFFLINE="1")
    if cap:
        env |= {"ATEN_CPU_CAPABILITY": cap, "ONEDNN_MAX_CPU_ISA": cap.upper()}
    done = subprocess.run([sys.executable, __file__, json.dumps(asdict(group))], env=env, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"timing {group} failed:\n{done.stdout[-2000:]}{done.stderr[-4000:]}")
    sys.stderr.write("".join(line + "\n" for line in done.stderr.splitlines() if "is left out" in line))
    return {name: Timing(**row) for name, row in json.loads(done.stdout.splitlines()[-1]).items()}


def worker(group: Group) -> dict[str, Timing]:
    allowed = sorted(os.sched_getaffinity(0), reverse=True)
    if len(allowed) < group.threads:
        raise RuntimeError(f"{group.threads} threads asked for, {len(allowed)} processors available")
    os.sched_setaffinity(0, allowed[: group.threads])
    import torch

    torch.set_num_threads(group.threads)
    torch.set_grad_enabled(False)
    torch.manual_seed(0)
    from _rows import cases

    from calora_ext import ops

    if ops.native.isa() != group.isa:
        raise RuntimeError(f"this processor does not run the rung {group.isa}")
    probe_data = torch.zeros(PROBE_BYTES, dtype=torch.uint8)

    def bandwidth() -> float:  # of the machine: by the best rung there is, whatever the group is capped to
        ops.native.set_isa(ops.native.available()[-1])
        start = time.perf_counter()
        torch.ops.calora.read(probe_data)
        seconds = time.perf_counter() - start
        ops.native.set_isa(group.isa)
        return PROBE_BYTES / seconds

    rows = cases(group)
    timings, calls, at = {}, {}, {}
    for name, row in rows.items():
        for i in range(row.copies):  # what a copy makes at its first call
            row.call(i)
        start = time.perf_counter()
        row.call(1)
        once = time.perf_counter() - start
        calls[name], at[name] = max(1, min(4 * row.copies, round(BLOCK_SECONDS / once))), 0
        timings[name] = Timing(row.nbytes, [], [])
    for _ in range(ROUNDS):
        for name, row in rows.items():
            timings[name].bandwidth.append(bandwidth())
            first, last = at[name], at[name] + calls[name]
            start = time.perf_counter()
            for i in range(first, last):
                row.call(i % row.copies)
            timings[name].seconds.append((time.perf_counter() - start) / calls[name])
            at[name] = last % row.copies
    return timings


class ReplayClock:
    """A timer for pytest-benchmark that runs through seconds measured before: rows are timed interleaved, not one by one."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def replay(self, benchmark, seconds: list[float]) -> None:
        left = iter(seconds)

        def once() -> None:
            self.now += next(left)

        benchmark.pedantic(once, rounds=len(seconds), iterations=1)


if __name__ == "__main__":
    result = worker(Group(**json.loads(sys.argv[1])))
    print(json.dumps({name: asdict(timing) for name, timing in result.items()}))
