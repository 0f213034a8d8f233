"""Writing files so that a crash, a full disk or a second reader never meets half of one."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from safetensors import SafetensorError

from ..errors import CaloraError

Writers = Mapping[str, Callable[[Path], object]]  # file name -> writes that file at the path it is given


def write_together(directory: str | os.PathLike, writers: Writers, remove: Iterable[str] = ()) -> None:
    """Write several files beside their final names and rename them once all are whole; then delete files named in `remove`.

    The directory is created if needed, and removed again on failure. Raises CaloraError where the disk refuses.
    """
    directory = Path(directory)
    created = not directory.exists()
    parts = {name: directory / f".{name}.{os.getpid()}.part" for name in writers}
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for name, write in writers.items():
            write(parts[name])
        for name, part in parts.items():
            os.replace(part, directory / name)
        for name in remove:
            (directory / name).unlink(missing_ok=True)
    except (OSError, SafetensorError) as error:
        raise CaloraError(f"cannot write {', '.join(writers)} to {directory}: {error}") from error
    finally:
        if directory.is_dir():
            for part in parts.values():
                part.unlink(missing_ok=True)
            if created and not any(directory.iterdir()):
                directory.rmdir()


def json_writer(value: dict) -> Callable[[Path], object]:
    return lambda path: path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def read_json(path: Path) -> dict:
    """A JSON object from a file. Raises CaloraError if it is missing, unreadable or something else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CaloraError(f"cannot read {path}: {error}") from error
    if not isinstance(value, dict):
        raise CaloraError(f"{path} does not hold a JSON object; the file is damaged")
    return value
