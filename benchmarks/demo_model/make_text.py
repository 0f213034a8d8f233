"""Make the text of the demo model from what every installation has: the standard library and torch.

    python make_text.py --text text --work work

Written to --text (shipped, gzipped JSON lines of {"text"}): train, valid and test of the two tasks, docs (docstrings of
torch's Python modules) and cpp (torch's C++ headers).
Written to --work (only needed to train the base): base-train, Python sources of both, and python-test, held-out files of the
standard library.

A file belongs to one split only, chosen by a hash of its name; the output depends on the installed versions alone.
"""

from __future__ import annotations

import argparse
import ast
import gzip
import hashlib
import inspect
import json
import random
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch

STDLIB = Path(sysconfig.get_paths()["stdlib"])
TORCH = Path(torch.__file__).parent
# Vendored, generated or tabular code teaches nothing, tests repeat themselves.
SKIPPED = {"site-packages", "dist-packages", "test", "tests", "testing", "_vendor", "generated", "pydoc_data", "encodings", "lib2to3", "idlelib"}  # fmt: skip
HEADERS = ("c10", "torch", "ATen/core", "ATen/cpu", "ATen/cuda", "ATen/native", "ATen/detail", "ATen/functorch")
LARGEST_FILE = 120_000  # characters; larger ones are mostly generated
SHORTEST_DOCSTRING = 80
SIZES = {"train": 2_500_000, "valid": 150_000, "test": 350_000}  # characters of each task's splits
PYTHON_TEST = 250_000


def bucket(path: Path, root: Path) -> int:
    """0 to 99, from the file's name below ``root``."""
    return hashlib.blake2b(path.relative_to(root).as_posix().encode(), digest_size=4).digest()[0] * 100 // 256


def sources(root: Path, suffix: str) -> Iterator[tuple[Path, str]]:
    """Readable ASCII sources below ``root``, in the order of their names."""
    for path in sorted(root.rglob(f"*{suffix}")):
        if SKIPPED.isdisjoint(path.relative_to(root).parts) and "generated" not in path.name:
            text = path.read_bytes().decode("utf-8", "replace").replace("\r\n", "\n")
            if text.isascii() and 200 <= len(text) <= LARGEST_FILE:
                yield path, text


def docstrings(text: str) -> Iterator[str]:
    """Docstrings of a module and of everything in it, unindented."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes in raw-looking docstrings
        tree = ast.parse(text)
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            found = ast.get_docstring(node, clean=False)
            if found and len(found := inspect.cleandoc(found)) >= SHORTEST_DOCSTRING:
                yield found


def split(number: int) -> str:
    """train (70 %), valid (10 %) or test (20 %) of a task, from a bucket."""
    return "train" if number < 70 else "valid" if number < 80 else "test"


def write(path: Path, texts: list[str], most: int | None = None) -> None:
    """Shuffle, drop repetitions, keep whole texts up to ``most`` characters."""
    texts = sorted(set(texts))
    random.Random(0).shuffle(texts)
    kept, size = [], 0
    for text in texts:
        if most is not None and size + len(text) > most:
            break
        kept.append(text)
        size += len(text)
    lines = "".join(json.dumps({"text": text}) + "\n" for text in kept)
    path.write_bytes(gzip.compress(lines.encode(), compresslevel=9, mtime=0))
    print(f"{path.name:24} {len(kept):5} of {len(texts):5} texts {size:11,} characters {path.stat().st_size:9,} bytes")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", type=Path, required=True, help="folder for the shipped text")
    parser.add_argument("--work", type=Path, required=True, help="folder for the base's training text")
    args = parser.parse_args()
    args.text.mkdir(parents=True, exist_ok=True)
    args.work.mkdir(parents=True, exist_ok=True)

    base, python_test = [], []
    tasks: dict[str, dict[str, list[str]]] = {task: {name: [] for name in SIZES} for task in ("docs", "cpp")}
    for path, text in sources(STDLIB, ".py"):
        (python_test if bucket(path, STDLIB) >= 94 else base).append(text)
    for path, text in sources(TORCH, ".py"):
        number = bucket(path, TORCH)
        if number < 35:  # a third of torch's modules for the base, the docstrings of the others for the task
            base.append(text)
        else:
            tasks["docs"][split((number - 35) * 100 // 65)].extend(docstrings(text))
    for folder in HEADERS:
        for path, text in sources(TORCH / "include" / folder, ".h"):
            tasks["cpp"][split(bucket(path, TORCH))].append(text)

    write(args.work / "base-train.jsonl.gz", base)
    write(args.work / "python-test.jsonl.gz", python_test, PYTHON_TEST)
    for task, splits in tasks.items():
        for name, texts in splits.items():
            write(args.text / f"{task}-{name}.jsonl.gz", texts, SIZES[name])


if __name__ == "__main__":
    main()
