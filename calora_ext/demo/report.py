"""The report folder: report.json, report.md, and pictures where matplotlib is installed."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

from .. import plots
from ..errors import CaloraError
from ..tables import format_bytes, table
from .plan import ARMS, DENSE, TASKS, file_name

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


def loss_table(results: dict, task: str) -> str:
    """Losses of one task: what is beside the base down, the format of the base across. A star marks packaged results."""
    formats = [form for form in results["sizes"] if any(row["format"] == form for row in results["rows"])]
    cells = {(row["arm"], row["format"]): row for row in results["rows"] if row["task"] == task}
    rows = [(title, *(_loss(cells.get((arm, form))) for form in formats)) for arm, title in ARMS.items()]
    return table((task, *formats), [row for row in rows if any(row[1:])])


def _loss(row: dict | None) -> str | None:
    if row is None:
        return None
    return f"{row['loss']:.4f}" + (f" ± {row['sd']:.4f}" if row["sd"] else "") + ("*" if row["packaged"] else "")


def packaged_note(results: dict) -> str:
    """What the star means, if there is one."""
    starred = [row for row in results["rows"] if row["packaged"]]
    if not starred:
        return ""
    steps, seeds = starred[0]["steps"], len(starred[0]["losses"])
    return f"\\* from the packaged results of `calora demo --full`: {steps} steps, mean ± sd of {seeds} seeds; everything else was measured here."


def verdict_lines(results: dict) -> str:
    lines = [f"* {v['task']}, {v['format']}{' (packaged)' if v['packaged'] else ''}: {v['says']}." for v in results["verdicts"]]
    return "\n".join(lines)


def speed_table(results: dict) -> str:
    """What each kind of model takes and how fast it decodes."""
    task = results["plan"]["trained"][-1][0]
    rows = [
        (row["format"], ARMS[row["arm"]], format_bytes(row["bytes"]), f"{row['parameters']:,}" if row["parameters"] else None,
         None if row["tokens_per_second"] is None else f"{row['tokens_per_second']:.0f}")
        for row in results["rows"] if row["task"] == task and not row["packaged"]
    ]  # fmt: skip
    return table(("base", "beside it", "on disk", "trained parameters", "tokens/s"), rows)


def summary(results: dict) -> list[str]:
    """What the terminal shows at the end."""
    return [*(loss_table(results, task) for task in TASKS), packaged_note(results), kernel_table(results), verdict_lines(results)]


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
    task, form = results["plan"]["trained"][-1]
    plots.size_bars(path / "sizes.png", "Weight files of the demo model", results["sizes"])
    plots.error_map(path / "errors.png", f"{form}: relative error of each weight", results["errors"][form])
    pictures = {"Size": "sizes.png", "Error of each layer": "errors.png"}
    for verdict in results["verdicts"]:
        shown = [row for row in results["rows"] if (row["task"], row["format"]) == (verdict["task"], verdict["format"]) and row["arm"] != "none"]
        dots = [(ARMS[row["arm"]], row["loss"], row["sd"], row["arm"] == "i-rc-d") for row in shown]
        name = file_name("losses", verdict["task"], verdict["format"]) + ".png"
        title = f"{verdict['task']}, {verdict['format']}: what compression costs the adapter, and what comes back"
        plots.loss_dots(path / name, title, dots, {"ceiling": verdict["ceiling"], "inherited": verdict["inherited"]})
        pictures[f"Recovery: {verdict['task']}, {verdict['format']}"] = name
    titles = {f"{task}: {f} + {title}": title if f == form else f"{f}, {title}" for title in ARMS.values() for f in (form, DENSE)}
    curves = {titles[title]: losses for title, losses in results["curves"].items() if title in titles}
    if curves:
        plots.training_curves(path / "training.png", f"Training on {task}, {form}", curves)
        pictures["Training"] = "training.png"
    first = results["kernels"][0]
    title = f"One {first['out_features']} x {first['in_features']} layer, one token, {first['threads']} threads, {first['isa']}"
    micro = {peer: (bare * 1e6, adapted * 1e6) for peer, (bare, adapted) in _times(results).items()}
    plots.time_bars(path / "kernels.png", title, micro)
    return {**pictures, "Kernel": "kernels.png"}


def _markdown(results: dict, pictures: dict[str, str]) -> str:
    plan, machine, first, activations = results["plan"], results["machine"], results["kernels"][0], results["activations"]
    dense = sum(results["sizes"][DENSE].values())
    sizes = [(name, f"{sum(parts.values()):,}", f"{dense / sum(parts.values()):.2f} ×") for name, parts in results["sizes"].items()]
    quantised = "; ".join(
        f"{task} {math.exp(activations['exact'][task]):.3f} -> {math.exp(loss):.3f}" for task, loss in activations["int8"].items()
    )
    parts = [
        "# calora demo",
        f"Measured on this machine by this run: {machine['processor']}, {machine['threads']} threads, rung {machine['rung chosen']}, "
        f"torch {machine['torch']}, {results['seconds']:.0f} s in all.",
        "## What came out",
        verdict_lines(results),
        f"* A saved model loads with {'bit-identical' if results['round_trip_bit_exact'] else 'DIFFERENT'} logits.\n"
        f"* INT8 activations change the perplexity of {activations['format']}: {quantised}.",
        "## Losses",
        *(loss_table(results, task) for task in TASKS),
        packaged_note(results),
        f"Nats per token on {plan['windows']} windows of {plan['window']} held-out tokens; fp32 arithmetic around int8 activations. Trained "
        f"arms: {plan['steps']} steps of {plan['batch_size']} x {plan['window']} tokens, all on the same tokens. *LoRA trained on*, on the dense "
        "model, is the ceiling. *Larger LoRA*: as many parameters as CA-LoRA trains. *g64*: groups of 64 columns share a scale; "
        "*everywhere*: one scale per row, for the embeddings and the output head tied to them as well; *2:4*, *70 %*: pruned by SparseGPT.",
        *(f"![{heading}]({name})" for heading, name in pictures.items() if heading.startswith("Recovery")),
        _picture(pictures, "Training"),
        "## Size and speed",
        table(("weights", "bytes on disk", "smaller by"), sizes),
        _picture(pictures, "Size"),
        _picture(pictures, "Error of each layer"),
        speed_table(results),
        "*On disk*: weight files of the model and of the adapter. *tokens/s*: greedy decoding, median of three. The model is so small that its "
        "tokens per second are mostly Python's; the table of one real layer below says what the kernels do.",
        "## Text, without an adapter and with each",
        "\n\n".join(
            f"{s['model']}, {'adapter **' + s['adapter'] + '**' if s['adapter'] else '**no** adapter'}:\n```\n{s['prompt']}{s['text']}\n```"
            for s in results["samples"]
        ),
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
