"""``calora demo``: the whole story on the model that ships inside the package; no network."""

from __future__ import annotations

from typing import Annotated

import typer

from .common import Json, write_text


def register(app: typer.Typer) -> None:
    app.command()(demo)


def demo(
    full: Annotated[bool, typer.Option("--full", help="Every arm, several formats, three seeds, more steps; takes an hour or so.")] = False,
    json_file: Json = None,
) -> None:
    """Compress a small model, carry its LoRA over, recover what was lost, time the kernel; writes ./calora-demo-report."""
    from ..demo import FULL, QUICK, REPORT, report, tell
    from .info import machine_facts

    report.fresh_folder(REPORT)
    results = tell(FULL if full else QUICK, REPORT)
    report.write_report(REPORT, results, machine_facts())
    print(f"\n{report.arm_table(results)}\n\n{report.kernel_table(results)}\n")
    for verdict in results["verdicts"]:
        print(f"{verdict['format']}: {verdict['says']}.")
    print(f"\nReport: {REPORT / 'report.md'}")
    if json_file is not None:
        write_text(json_file, (REPORT / "report.json").read_text(encoding="utf-8"))
