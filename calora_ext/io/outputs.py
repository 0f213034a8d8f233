"""Output directories that are whole or absent."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import CaloraError

MODEL_FILES = ("config.json", "adapter_config.json", "recovery_config.json")


@contextmanager
def output_directory(path: Path, overwrite: bool, keep: Iterable[Path] = ()) -> Iterator[Path]:
    """A new directory, written beside ``path`` and renamed to it when the block ends without an error.

    keep: inputs of the command, which the output must not replace. Raises CaloraError when ``path`` is not empty and
    ``overwrite`` is not given, or when what would be replaced is not a model or adapter directory.
    """
    path = path.resolve()
    check_output(path, overwrite, keep)
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


def check_output(path: Path, overwrite: bool, keep: Iterable[Path]) -> None:
    """Raises CaloraError where :func:`output_directory` would."""
    path = path.resolve()
    if path.exists() and not path.is_dir():
        raise CaloraError(f"{path} is a file; name a directory with -o")
    for source in (k.resolve() for k in keep):
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
