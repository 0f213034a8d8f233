"""The pictures of a report, drawn with matplotlib (the extra ``plots``) from the numbers of its JSON."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

from .tables import format_bytes

# Okabe and Ito's palette, which colour-blind readers can tell apart.
GREY, ORANGE, BLUE, GREEN, RED = "#8c8c8c", "#e69f00", "#0072b2", "#009e73", "#d55e00"
_HUES = (BLUE, GREEN, ORANGE, RED, "#cc79a7")  # of value types


def available() -> bool:
    return find_spec("matplotlib") is not None


@contextmanager
def _figure(path: Path, title: str, width: float = 7.5, height: float = 3.6, legend: float = 9):
    """Axes of one picture, saved when the block ends."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title, x=0.01, ha="left", fontsize=11, fontweight="bold")
    yield axes
    if labels := axes.get_legend_handles_labels()[1]:
        figure.legend(loc="outside lower center", ncols=3 if max(map(len, labels)) < 45 else 2, frameon=False, fontsize=legend)
    figure.savefig(path, dpi=144, format="png")


def size_bars(path: Path, title: str, sizes: Mapping[str, Mapping[str, int]]) -> None:
    """Stacked bars of bytes: name -> {part: bytes}. The first bar is what the others are compared with."""
    parts = list(dict.fromkeys(part for bar in sizes.values() for part in bar))
    colours = dict(zip(parts, (BLUE, GREY, GREEN), strict=False))
    names = list(sizes)
    first = sum(sizes[names[0]].values())
    with _figure(path, title, height=1.1 + 0.5 * len(names)) as axes:
        left = [0.0] * len(names)
        for part in parts:
            widths = [sizes[name].get(part, 0) / 1e6 for name in names]
            axes.barh(names, widths, left=left, color=colours[part], label=part)
            left = [a + b for a, b in zip(left, widths, strict=True)]
        for i, name in enumerate(names):
            total = sum(sizes[name].values())
            share = "" if i == 0 else f"  ({first / total:.1f} × smaller)"
            axes.text(left[i], i, f" {format_bytes(total)}{share}", va="center", fontsize=9)
        axes.invert_yaxis()
        axes.set_xlabel("MB on disk")
        axes.set_xlim(0, 1.35 * max(left))


def loss_dots(
    path: Path, title: str, arms: Sequence[tuple[str, float, float, bool]], lines: Mapping[str, float], unit: str = "nats per token"
) -> None:
    """A dot per arm (name, loss, sd over seeds, highlighted) on a zoomed axis; ``lines`` are levels to compare with."""
    with _figure(path, title, height=1.3 + 0.42 * len(arms)) as axes:
        low = min([loss - sd for _, loss, sd, _ in arms] + list(lines.values()))
        high = max([loss + sd for _, loss, sd, _ in arms] + list(lines.values()))
        room = max(high - low, 1e-3)
        for (name, value), colour in zip(lines.items(), (GREEN, RED), strict=False):
            axes.axvline(value, color=colour, linewidth=1, linestyle="--", label=f"{name}: {value:.4f}")
        for i, (_, loss, sd, highlighted) in enumerate(arms):
            colour = ORANGE if highlighted else BLUE
            axes.errorbar(loss, i, xerr=sd or None, fmt="o", color=colour, markersize=8, capsize=3)
            axes.annotate(f"{loss:.4f}", (loss, i), xytext=(0, 7), textcoords="offset points", ha="center", fontsize=9)
        axes.set_yticks(range(len(arms)), [name for name, *_ in arms])
        axes.invert_yaxis()
        axes.set_xlim(low - 0.08 * room, high + 0.08 * room)
        axes.set_ylim(len(arms) - 0.5, -0.8)
        axes.set_xlabel(f"held-out loss, {unit} (lower is better; axis not from 0)")
        axes.grid(axis="y", color="#e5e5e5")
        axes.set_axisbelow(True)


def training_curves(path: Path, title: str, curves: Mapping[str, Sequence[float]], window: int = 10, unit: str = "nats per token") -> None:
    """Loss per step of each run, faint, and its mean over the last ``window`` steps."""
    with _figure(path, title) as axes:
        for (name, losses), colour in zip(curves.items(), (ORANGE, BLUE, GREEN, RED, GREY), strict=False):
            steps = range(1, len(losses) + 1)
            means = [sum(losses[max(0, i - window) : i]) / min(i, window) for i in steps]
            axes.plot(steps, losses, color=colour, alpha=0.25, linewidth=1)
            axes.plot(steps, means, color=colour, linewidth=2, label=name)
        axes.set_xlabel(f"step (bold: mean of the last {window})")
        axes.set_ylabel(f"training loss, {unit}")


def error_map(path: Path, title: str, errors: Mapping[str, float]) -> None:
    """Relative error of each layer's weight, blocks across and kinds of layer down. errors: dotted name -> ||W - What|| / ||W||."""
    cells = {}
    for name, error in errors.items():
        parts = name.split(".")
        block = next((int(p) for p in parts if p.isdecimal()), None)
        if block is not None:
            cells[parts[-1], block] = error
    kinds = list(dict.fromkeys(kind for kind, _ in cells))
    blocks = sorted({block for _, block in cells})
    with _figure(path, title, height=0.9 + 0.34 * len(kinds)) as axes:
        grid = [[cells.get((kind, block), float("nan")) for block in blocks] for kind in kinds]
        axes.imshow(grid, cmap="viridis", aspect="auto")
        middle = (max(cells.values()) + min(cells.values())) / 2
        for (kind, block), error in cells.items():
            colour = "white" if error < middle else "black"
            axes.text(blocks.index(block), kinds.index(kind), f"{100 * error:.1f} %", ha="center", va="center", color=colour, fontsize=8)
        axes.set_xticks(range(len(blocks)), [f"block {b}" for b in blocks])
        axes.set_yticks(range(len(kinds)), kinds)
        axes.spines[:].set_visible(False)


def roofline(path: Path, title: str, points: Mapping[str, Sequence[tuple[float, float]]], bandwidth: float, speed: float, product: str) -> None:
    """name -> (operations per byte of the weight, operations a second) of each shape, under what the memory (bandwidth, bytes a second)
    and the fastest product (speed, operations a second; product: its name) allow. Ours, named "calora int4 g128 2:4 (rung)", are filled: the
    colour is the value type's, the shape the rest's, the edge the rung's. The legend says how much of its roof each reaches: the
    median over its shapes."""
    with _figure(path, title, width=9, height=5.6 + 0.16 * (len(points) // (3 if max(map(len, points)) < 40 else 2)), legend=8) as axes:
        every = [point for shapes in points.values() for point in shapes]
        edges = [min(x for x, _ in every) / 1.6, max(x for x, _ in every) * 1.6]
        corner = speed / bandwidth
        line = sorted({*edges, *([corner] if edges[0] < corner < edges[1] else [])})
        roof = [min(x * bandwidth, speed) / 1e9 for x in line]
        axes.plot(line, roof, color="black", linewidth=1.5, zorder=1)
        text = f"roof: {bandwidth / 1e9:.1f} GB/s read from memory, {speed / 1e9:,.0f} GFLOP/s in the fastest product measured ({product})"
        axes.set_title(text, loc="left", fontsize=9)
        values, kinds, rungs, others = {}, {}, {}, 0
        for name, shapes in points.items():
            reached = sorted(y / min(x * bandwidth, speed) for x, y in shapes)[len(shapes) // 2]
            ours = re.fullmatch(r"calora (\w+)(?: g128)?(.*?)( \([^)]*\))?", name)
            if ours:
                hue, kind, rung = (seen.setdefault(part, len(seen)) for seen, part in zip((values, kinds, rungs), ours.groups(), strict=True))
                marker, look = "oh^DsPX*v<>"[kind % 11], {"color": _HUES[hue % 5], "edgecolors": ("black", "white", GREY)[rung % 3], "linewidths": 0.5}
            else:
                marker, look, others = "s^vDP*X<>"[others % 9], {"facecolors": "none", "edgecolors": "#444444"}, others + 1
            axes.scatter([x for x, _ in shapes], [y / 1e9 for _, y in shapes], marker=marker, s=55, zorder=2, label=f"{name}: {100 * reached:.0f} %", **look)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log", base=2)
        axes.set_xlim(edges)
        axes.xaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_major_formatter("{x:g}")
        lowest, highest = min(y for _, y in every) / 1e9, max(*roof, *(y / 1e9 for _, y in every))
        axes.set_ylim(2 ** math.floor(math.log2(lowest) - 0.1), 2 ** math.ceil(math.log2(highest) + 0.1))
        axes.set_xlabel("operations per byte of the weight (every weight counts, kept or not)")
        axes.set_ylabel("GFLOP/s")
        axes.grid(color="#e5e5e5")
        axes.set_axisbelow(True)


def time_bars(path: Path, title: str, times: Mapping[str, tuple[float, float]]) -> None:
    """Microseconds per call: name -> (without a LoRA, with one)."""
    names = list(times)
    with _figure(path, title, height=1.2 + 0.55 * len(names)) as axes:
        for offset, which, colour, label in ((-0.2, 0, BLUE, "layer"), (0.2, 1, ORANGE, "layer + LoRA")):
            places = [i + offset for i in range(len(names))]
            values = [times[name][which] for name in names]
            axes.barh(places, values, height=0.38, color=colour, label=label)
            for place, value in zip(places, values, strict=True):
                axes.text(value, place, f" {value:,.0f}", va="center", fontsize=8)
        axes.set_yticks(range(len(names)), names)
        axes.invert_yaxis()
        axes.set_xlabel("µs per call (median, lower is better)")
        axes.set_xlim(0, 1.12 * max(max(pair) for pair in times.values()))
