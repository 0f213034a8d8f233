"""Timing that compares fairly: peers take turns, on copies of their weights that together exceed the last-level cache."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import TypeVar

Name = TypeVar("Name", bound=Hashable)
Call = Callable[[], object]
LEAST_COPIES, MOST_COPIES = 2, 512


def last_level_cache() -> int:
    """Bytes of the largest cache of processor 0; 32 MB where the system does not say."""
    sizes = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    return max((int(size.read_text().strip().removesuffix("K")) << 10 for size in sizes), default=32 << 20)


def copies_for(nbytes: int) -> int:
    """How many copies of a weight of ``nbytes`` bytes to rotate through, so that none is still cached when its turn comes:
    five times the last-level cache."""
    return min(MOST_COPIES, max(LEAST_COPIES, -(-5 * last_level_cache() // max(1, nbytes))))


def interleaved(peers: Mapping[Name, Sequence[Call]], seconds: float = 1.0) -> dict[Name, float]:
    """Median seconds per call of each peer.

    peers: name -> equal calls, one per copy of its weights. A round lets every peer pass over a few of its copies; rounds
    go on for ``seconds`` per peer, so that a slow moment of the machine hits all peers alike.
    """
    passes = {name: _calls_in(calls, 2e-3) for name, calls in peers.items()}
    position = dict.fromkeys(peers, 0)
    samples: dict[Name, list[float]] = {name: [] for name in peers}
    stop = time.perf_counter() + seconds * len(peers)
    while time.perf_counter() < stop or min(map(len, samples.values())) < 3:
        for name, calls in peers.items():
            first = position[name]
            begin = time.perf_counter()
            for i in range(first, first + passes[name]):
                calls[i % len(calls)]()
            samples[name].append((time.perf_counter() - begin) / passes[name])
            position[name] = first + passes[name]
    return {name: median(values) for name, values in samples.items()}


def _calls_in(calls: Sequence[Call], seconds: float) -> int:
    """Calls that take about ``seconds``; also the warm-up of every copy."""
    begin = time.perf_counter()
    for call in calls:
        call()
    each = (time.perf_counter() - begin) / len(calls)
    return max(1, round(seconds / each))
