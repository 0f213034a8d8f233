"""``calora demo``: the whole story on the model that ships inside the package; no network."""

from __future__ import annotations

from typing import Annotated

import typer

from .common import Json, write_text


def register(app: typer.Typer) -> None:
    app.command()(demo)


def demo(
    full: Annotated[bool, typer.Option("--full", help="Every arm on both tasks and the harsh formats, three seeds; takes an hour or so.")] = False,
    json_file: Json = None,
) -> None:
    """Compress a small model, carry its LoRA over, recover what was lost, time the kernel; writes ./calora-demo-report."""
    from ..demo import FULL, QUICK, REPORT, report, tell
    from .info import machine_facts

    report.fresh_folder(REPORT)
    results = tell(FULL if full else QUICK, REPORT)
    report.write_report(REPORT, results, machine_facts())
    print("\n" + "\n\n".join(part for part in report.summary(results) if part))
    print(f"\nReport: {REPORT / 'report.md'}")
    if json_file is not None:
        write_text(json_file, (REPORT / "report.json").read_text(encoding="utf-8"))
