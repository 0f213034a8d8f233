"""Writing files so that a crash, a full disk or a second reader never meets half of one."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

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


def save_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """A safetensors file with the permissions of any new file: safetensors makes its own readable by their owner alone."""
    path.touch()
    mode = path.stat().st_mode
    save_file(dict(tensors), path, metadata={"format": "pt"})
    path.chmod(mode)


def is_number(value: object) -> bool:
    """Whether a value of a JSON file is a number that float32 can hold."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 3e38


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises CaloraError if it is missing, unreadable or something else."""
    try:
        value = json.loads(path.read_bytes().decode())
    except OSError as error:
        hint = "name the directory that holds it" if path.parent.is_dir() else f"there is no directory {path.parent}"
        raise CaloraError(f"{path} cannot be read: {error.strerror or error}; {hint}") from None
    except (ValueError, RecursionError) as error:
        raise CaloraError(f"{path} is not valid JSON ({error}); copy it again") from None
    if not isinstance(value, dict):
        raise CaloraError(f"{path} is not a JSON object; copy it again")
    return value
