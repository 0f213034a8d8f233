"""The report folder: report.json, report.md, and pictures where matplotlib is installed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from .. import plots
from ..errors import CaloraError
from ..tables import format_bytes, table

REPORT = Path("calora-demo-report")
MADE_BY = "calora demo"


def fresh_folder(path: Path) -> None:
    """Make an empty report folder, replacing an earlier report. Raises CaloraError for a folder that is not one."""
    if path.exists() and (not path.is_dir() or any(path.iterdir())) and not _is_report(path):
        raise CaloraError(f"{path.resolve()} exists and is not a report of `calora demo`; move it away or run in another directory")
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)
    (path / "report.json").write_text(json.dumps({"made_by": MADE_BY}) + "\n", encoding="utf-8")


def _is_report(path: Path) -> bool:
    try:
        return json.loads((path / "report.json").read_text(encoding="utf-8"))["made_by"] == MADE_BY
    except (OSError, ValueError, KeyError, TypeError):
        return False


def write_report(path: Path, results: dict, machine: dict) -> None:
    """Write the results of ``story.tell`` into the folder."""
    results = {"made_by": MADE_BY, "machine": machine, **results}
    (path / "report.json").write_text(json.dumps(results, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    pictures = _pictures(path, results) if plots.available() else {}
    (path / "report.md").write_text(_markdown(results, pictures), encoding="utf-8")


def arm_table(results: dict) -> str:
    """The table of the story: an arm per row."""
    rows = [
        (
            row["arm"], row["steps"] or None, f"{row['loss']:.4f}" + (f" ± {row['sd']:.4f}" if row["sd"] else ""),
            f"{row['perplexity']:.2f}", format_bytes(row["bytes"]),
            None if row["tokens_per_second"] is None else f"{row['tokens_per_second']:.0f}",
        )
        for row in results["arms"]
    ]  # fmt: skip
    return table(("arm", "steps trained", "loss", "perplexity", "on disk", "tokens/s"), rows)


def kernel_table(results: dict) -> str:
    """One layer's times: peers down, without and with the LoRA across."""
    rows = [
        (peer, f"{bare * 1e6:,.0f}", f"{adapted * 1e6:,.0f}", f"{100 * (adapted / bare - 1):+.0f} %")
        for peer, (bare, adapted) in _times(results).items()
    ]
    return table(("one layer, one token", "µs", "µs with LoRA", "LoRA costs"), rows)


def _times(results: dict) -> dict[str, tuple[float, float]]:
    """peer -> seconds without and with the LoRA."""
    times: dict[str, dict[bool, float]] = {}
    for row in results["kernels"]:
        times.setdefault(row["peer"], {})[row["rank"] > 0] = row["seconds"]
    return {peer: (both[False], both[True]) for peer, both in times.items()}


def _pictures(path: Path, results: dict) -> dict[str, str]:
    """Draw the pictures; heading -> file name."""
    form = results["plan"]["trained"][-1]
    plots.size_bars(path / "sizes.png", "Weight files of the demo model", results["sizes"])
    plots.error_map(path / "errors.png", f"{form}: relative error of each weight", results["errors"][form])
    pictures = {"Size": "sizes.png", "Error of each layer": "errors.png"}
    shown = [row for row in results["arms"] if row["format"] in (None, form) and "exact" not in row["arm"] and row["arm"] != "dense"]
    shown = [row for row in shown if row["arm"] != form]
    lines = {"ceiling": results["verdicts"][0]["ceiling"], "inherited": results["verdicts"][-1]["inherited"]} if results["verdicts"] else {}
    dots = [(row["arm"], row["loss"], row["sd"] or 0.0, "CA-LoRA" in row["arm"]) for row in shown]
    plots.loss_dots(path / "losses.png", f"{form}: what compression costs the adapter, and what comes back", dots, lines)
    pictures["Loss"] = "losses.png"
    if results["curves"]:
        plots.training_curves(path / "training.png", "Training", results["curves"])
        pictures["Training"] = "training.png"
    first = results["kernels"][0]
    title = f"One {first['out_features']} x {first['in_features']} layer, one token, {first['threads']} threads, {first['isa']}"
    micro = {peer: (bare * 1e6, adapted * 1e6) for peer, (bare, adapted) in _times(results).items()}
    plots.time_bars(path / "kernels.png", title, micro)
    return {**pictures, "Kernel": "kernels.png"}


def _markdown(results: dict, pictures: dict[str, str]) -> str:
    plan, machine, first = results["plan"], results["machine"], results["kernels"][0]
    dense = sum(results["sizes"]["dense bf16"].values())
    sizes = [(name, f"{sum(parts.values()):,}", f"{dense / sum(parts.values()):.2f} ×") for name, parts in results["sizes"].items()]
    parts = [
        "# calora demo",
        f"Measured on this machine by this run: {machine['processor']}, {machine['threads']} threads, rung {machine['rung chosen']}, "
        f"torch {machine['torch']}, {results['seconds']:.0f} s in all.",
        "## What came out",
        "\n".join(f"* {v['format']}: {v['says']}." for v in results["verdicts"]),
        f"* A saved model loads with {'bit-identical' if results['round_trip_bit_exact'] else 'DIFFERENT'} logits.",
        "## Arms",
        arm_table(results),
        f"Loss in nats per token on {results['tokens']['austen-test']:,} tokens of *Sense and Sensibility*, in windows of {plan['window']}; "
        "fp32 arithmetic around int8 activations. *On disk*: weight files of the model and of the adapter. *tokens/s*: greedy "
        "decoding, median of three. The model is so small that its tokens per second are mostly Python's; the table of one "
        "real layer below says what the kernels do.",
        _picture(pictures, "Loss"),
        _picture(pictures, "Training"),
        "## Size",
        table(("weights", "bytes on disk", "smaller by"), sizes),
        "*g64*: groups of 64 columns share a scale; *row*: a scale per row; *everywhere*: a scale per row, for the embeddings and the "
        "output head tied to them as well.",
        _picture(pictures, "Size"),
        _picture(pictures, "Error of each layer"),
        "## Text, with the adapter on and off",
        "\n\n".join(f"* {s['model']}, adapter **{s['adapter']}**: {s['prompt']}*{' '.join(s['text'].split())}*" for s in results["samples"]),
        "## One layer of a real size",
        kernel_table(results),
        f"{first['out_features']} x {first['in_features']}, one row of x, LoRA of rank 16 (fused in ours, two more products in the others), "
        f"{first['threads']} threads, weights rotated through more memory than the last-level cache, medians.",
        _picture(pictures, "Kernel"),
        "" if pictures else "Pictures need matplotlib: `pip install 'calora_ext[plots]'`.",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _picture(pictures: dict[str, str], name: str) -> str:
    return f"![{name}]({pictures[name]})" if name in pictures else ""
