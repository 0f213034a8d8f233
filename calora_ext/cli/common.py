"""What the commands share: option types, the result table, ``--json``, output directories."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from ..errors import CaloraError
from ..tables import table

MODEL_FILES = ("config.json", "adapter_config.json", "recovery_config.json")


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


@contextmanager
def output_directory(path: Path, overwrite: bool, keep: Iterable[Path] = ()) -> Iterator[Path]:
    """A new directory, written beside ``path`` and renamed to it when the block ends without an error.

    keep: inputs of the command, which the output must not replace. Raises CaloraError when ``path`` is not empty and
    ``overwrite`` is not given, or when what would be replaced is not a model or adapter directory.
    """
    path = path.resolve()
    _check_output(path, overwrite, [k.resolve() for k in keep])
    path.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent))
    try:
        part.chmod(0o777 & ~_umask())
        yield part
        if path.exists():
            _replace(part, path)
        else:
            part.rename(path)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _check_output(path: Path, overwrite: bool, keep: list[Path]) -> None:
    if path.exists() and not path.is_dir():
        raise CaloraError(f"{path} is a file; name a directory with -o")
    for source in keep:
        if source == path or path in source.parents:
            raise CaloraError(f"{path} holds an input of this command and would be replaced; choose another directory with -o")
    if not path.is_dir() or not any(path.iterdir()):
        return
    if not overwrite:
        raise CaloraError(f"{path} is not empty; choose another directory with -o or add --overwrite")
    if not any((path / name).is_file() for name in MODEL_FILES):
        raise CaloraError(f"{path} is not a model or adapter directory and is not replaced; choose another directory with -o")


def _replace(new: Path, path: Path) -> None:
    """Rename ``new`` to ``path``; the old directory is put back if that fails."""
    old = new.with_suffix(".old")
    path.rename(old)
    try:
        new.rename(path)
    except OSError:
        old.rename(path)
        raise
    shutil.rmtree(old)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
