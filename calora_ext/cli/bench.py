"""``calora bench``: our layer beside what else is installed, timed now and on this machine."""

from __future__ import annotations

import os
import re
from itertools import product
from pathlib import Path
from statistics import median
from typing import Annotated

import typer

from ..errors import CaloraError
from ..progress import progress
from .common import Json, emit

LARGEST = 131072  # what the operators take


def register(app: typer.Typer) -> None:
    app.command()(bench)


def bench(
    model: Annotated[Path | None, typer.Argument(metavar="[MODEL]", help="Take the layer shapes of this model directory.")] = None,
    shapes: Annotated[str | None, typer.Option(help="OUTxIN, several separated by commas.  [default: 2048x2048,5632x2048]")] = None,
    rows: Annotated[int, typer.Option(min=1, help="Rows of x: 1 is decoding, hundreds a prompt.")] = 1,
    rank: Annotated[int, typer.Option(min=0, help="Rank of the LoRA that is timed beside the bare layer.")] = 16,
    recovery_rank: Annotated[int, typer.Option(min=0, help="Rank of recovery modules; our formats are then timed with them, too.")] = 0,
    threads: Annotated[str | None, typer.Option(help="Numbers of threads to time with, separated by commas.  [default: torch's]")] = None,
    isa: Annotated[str | None, typer.Option(help="Rungs to time, separated by commas, or all.  [default: the one in use]")] = None,
    seconds: Annotated[float, typer.Option(min=0.01, help="Per peer and shape.")] = 0.5,
    plot: Annotated[Path | None, typer.Option(metavar="FILE", help="Draw the timings without a LoRA under this machine's roofline, a PNG.")] = None,
    json_file: Json = None,
) -> None:
    """Time one layer in every format beside torch and what else is installed, without and with a LoRA."""
    from .. import bench as timing
    from .. import ops, plots
    from ..io.files import write_together

    if plot is not None and plot.suffix != ".png":
        raise CaloraError(f"--plot writes a PNG; name a file that ends in .png, not {plot.name!r}")
    if plot is not None and not plots.available():
        raise CaloraError("--plot needs matplotlib: pip install 'calora_ext[plots]'")
    chosen = [None] if isa is None else ops.native.available() if isa == "all" else isa.split(",")
    for name in chosen:
        with timing.rung(name):  # all of them can be chosen, before the first is timed
            pass
    counts = _threads(threads)
    if plot is not None and len(counts) > 1:
        raise CaloraError(f"--plot draws the roofline of one number of threads; give --threads one, not {threads!r}")
    timings, sizes = [], _shapes(model, shapes)
    with progress(None, "Timing", "layer", len(sizes) * len(counts) * len(chosen)) as bar:
        for (out_features, in_features), count in product(sizes, counts):
            others = None  # the peers do not depend on the rung: timed once, beside the first
            for name in chosen:
                with timing.rung(name), timing.threads(count):
                    timings += timing.compare(in_features, out_features, rows, rank, others=others, seconds=seconds, recovery_rank=recovery_rank)
                others = {}
                bar.update()
    table = [
        (f"{t.out_features}x{t.in_features}", t.peer + (f" ({t.isa})" if t.isa else ""), t.threads, t.rows,
         f"{t.rank} + {t.recovery_rank}" if t.recovery_rank else t.rank or "", f"{t.seconds * 1e6:,.1f}", f"{t.bandwidth / 1e9:.1f}",
         f"{100 * t.bandwidth / t.read:.0f} %")
        for t in timings
    ]  # fmt: skip
    emit(("shape", "peer", "threads", "rows", "LoRA rank", "µs", "GB/s of weights", "of the read bandwidth"), table, [t.to_dict() for t in timings], json_file)
    if plot is not None:
        with timing.threads(counts[0]):
            speed, fastest = timing.fastest_product()
        read = median(t.read for t in timings)
        points: dict[str, list[tuple[float, float]]] = {}
        for t in timings:
            if not t.rank and not t.recovery_rank:
                name = t.peer + (f" ({t.isa})" if t.isa and len(chosen) > 1 else "")
                points.setdefault(name, []).append((t.operations / t.nbytes, t.operations / t.seconds))
        used, isas = timings[0].threads, dict.fromkeys(t.isa for t in timings if t.isa)
        title = f"One linear layer, {rows} row{'s' if rows > 1 else ''} of x, {', '.join(isas)}, {used} thread{'s' if used > 1 else ''}: percent of the roof"
        write_together(plot.parent, {plot.name: lambda path: plots.roofline(path, title, points, read, speed, fastest)})
        print(f"\n{plot}")


def _threads(given: str | None) -> list[int | None]:
    if given is None:
        return [None]
    counts = given.split(",")
    if not all(re.fullmatch(r"\s*[1-9]\d{0,3}\s*", count) for count in counts):
        raise CaloraError(f"--threads is a number of threads, several separated by commas, got {given!r}")
    most = os.cpu_count() or 1
    if max(map(int, counts)) > most:
        raise CaloraError(f"--threads goes up to {most}, the processors of this machine, got {given!r}")
    return [int(count) for count in counts]


def _shapes(model: Path | None, shapes: str | None) -> list[tuple[int, int]]:
    """(out_features, in_features) pairs, from the option, from a model's layers, or the default."""
    if model is not None and shapes is not None:
        raise CaloraError("--shapes and MODEL both name shapes; give one of them")
    if model is not None:
        return _shapes_of(model)
    pairs = (shapes or "2048x2048,5632x2048").split(",")
    found = [re.fullmatch(r"\s*(\d+)x(\d+)\s*", pair) for pair in pairs]
    if not all(found) or any(int(n) < 1 for match in found for n in match.groups()):
        raise CaloraError(f"--shapes is OUTxIN, several separated by commas, got {shapes!r}")
    sizes = [(int(match[1]), int(match[2])) for match in found]
    if any(max(size) > LARGEST for size in sizes):
        raise CaloraError(f"--shapes goes up to {LARGEST}x{LARGEST}, got {shapes!r}")
    return sizes


def _shapes_of(model: Path) -> list[tuple[int, int]]:
    """The different linear layers of a model, each once."""
    from torch import nn

    from .. import load
    from ..policy import features, is_conv1d

    layers = [m for m in load(model).modules() if isinstance(m, nn.Linear) or is_conv1d(m)]
    return list(dict.fromkeys(features(layer)[::-1] for layer in layers))
