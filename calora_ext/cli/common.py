"""What the commands share: option types, the result table, ``--json``."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated

import typer

from ..tables import table


def _json_target(path: Path | None) -> Path | None:
    """Refused before the work, not after it."""
    if path is not None and (path.is_dir() or not path.resolve().parent.is_dir()):
        raise typer.BadParameter(f"{path} cannot be written: it is a directory, or its directory does not exist")
    return path


Model = Annotated[Path, typer.Argument(metavar="MODEL", help="A model directory.")]
Adapter = Annotated[Path | None, typer.Option(metavar="DIR", help="An adapter directory: a PEFT LoRA, or one from `calora adapt`.")]
Data = Annotated[Path, typer.Option(metavar="FILE", help="Text to use: .txt, .jsonl or .tsv, each also .gz.")]
Task = Annotated[str | None, typer.Option(help="causal-lm, seq2seq-lm or sequence-classification.  [default: causal-lm]")]
MaxLength = Annotated[int | None, typer.Option(help="Tokens per text or window.  [default: the model's context, capped]")]
TextColumn = Annotated[str | None, typer.Option(help="Column of the text in .jsonl and .tsv.")]
PairColumn = Annotated[str | None, typer.Option(help="Column of the second text.")]
LabelColumn = Annotated[str | None, typer.Option(help="Column of the label.")]
Json = Annotated[Path | None, typer.Option("--json", metavar="FILE", callback=_json_target, help="Also write the result as JSON.")]
Output = Annotated[Path, typer.Option("-o", "--output", metavar="DIR", help="Directory to write.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the output directory if it is not empty.")]


def emit(columns: Sequence[str], rows: Iterable[Sequence[object]], result: object, json_file: Path | None) -> None:
    """Print the table that ends a command and write its result to ``--json``."""
    print(table(columns, rows))
    if json_file is not None:
        write_text(json_file, json.dumps(result, indent=2, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write beside, then rename: the file is whole or absent."""
    from ..io.files import write_together

    write_together(path.parent, {path.name: lambda part: part.write_text(text, encoding="utf-8")})
