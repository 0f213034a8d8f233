"""Reading data sets: .txt, .jsonl, .tsv (each also .gz), or rows already in memory, into ``Record``s.

    .txt     the whole file is one text
    .jsonl   one object per line: {"text"} | {"prompt", "completion"} | {"text", "label"} | {"text", "text_pair", "label"}
    .tsv     a header line, then one row per line; tabs separate, nothing is quoted (GLUE's convention)

All are UTF-8, with or without a byte-order mark. Column names default to those above and those of GLUE's tasks.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from ..errors import CaloraError

SUFFIXES = (".txt", ".jsonl", ".tsv")

# (text, pair) columns, the most specific first: QNLI has `question` and `sentence`, SST-2 and CoLA `sentence` alone.
TEXT_COLUMNS = (
    ("text", "text_pair"), ("sentence1", "sentence2"), ("question1", "question2"), ("premise", "hypothesis"),
    ("question", "sentence"), ("#1 String", "#2 String"), ("text", None), ("sentence", None),
)  # fmt: skip
LABEL_COLUMNS = ("label", "Quality", "gold_label", "is_duplicate")


@dataclass(frozen=True)
class Record:
    """One row: a text, a prompt with its completion, or a text (and its pair) with a label."""

    text: str
    completion: str | None = None
    pair: str | None = None
    label: int | str | None = None


@dataclass(frozen=True)
class Columns:
    """Names of the columns to read; None chooses by the names that are there."""

    text: str | None = None
    pair: str | None = None
    label: str | None = None

    def resolve(self, names: Iterable[str], where: str) -> Columns:
        """The columns of a data set whose columns are ``names``. A text column given by hand has no pair unless that is given too."""
        names = list(names)
        for wanted in (self.text, self.pair, self.label):
            if wanted is not None and wanted not in names:
                raise CaloraError(f"{where} has no column {wanted!r}; it has {_quoted(names)}")
        if self.text is not None:
            text, pair = self.text, self.pair
        else:
            found = next(((t, p) for t, p in TEXT_COLUMNS if t in names and (p is None or p in names)), None)
            if found is None:
                raise CaloraError(f"{where} has no text column that is known; it has {_quoted(names)}: name one with text_column")
            text, pair = found[0], self.pair or found[1]
        return Columns(text, pair, self.label or next((c for c in LABEL_COLUMNS if c in names and c not in (text, pair)), None))


def read_records(
    data, text_column: str | None = None, pair_column: str | None = None, label_column: str | None = None
) -> list[Record]:
    """Records of a file (a path ending in .txt, .jsonl or .tsv, also with .gz), or of a list of texts, rows (dicts) or Records.

    Raises CaloraError, in one sentence, where the data cannot be read, decoded or understood, or holds nothing.
    """
    columns = Columns(text_column, pair_column, label_column)
    if isinstance(data, (str, Path)):
        path = Path(data)
        kind = next((s for s in SUFFIXES if path.name.removesuffix(".gz").endswith(s)), None)
        if kind is None:
            raise CaloraError(
                f"{path} is not a data file; expected a name ending in .txt, .jsonl or .tsv, or one of these with .gz"
            )
        where, read = str(path), {".txt": _read_txt, ".jsonl": _read_jsonl, ".tsv": _read_tsv}[kind]
        records = list(read(path, columns))
    elif isinstance(data, Iterable) and not isinstance(data, Mapping):
        where, records = "the data", list(_from_rows(data, columns))
    else:
        raise CaloraError(f"data must be a file or a list of texts or rows, got {type(data).__name__}")
    if not any(r.text.strip() for r in records):
        raise CaloraError(f"{where} holds no text")
    return records


def labelled(records: list[Record], label_names: Mapping[str, int] | None, classes: int) -> tuple[list[Record], int]:
    """Records with integer labels in 0..classes-1, and how many were dropped for a negative one (GLUE's mark of "no label").

    label_names maps names to numbers (a model's ``config.label2id``). Raises CaloraError for a missing or unknown label.
    """
    kept, dropped = [], 0
    for i, record in enumerate(records):
        label = record.label
        if label is None:
            raise CaloraError(f"row {i + 1} has no label; sequence-classification needs a label column, named with label_column")
        if isinstance(label, str):
            if label_names is not None and label in label_names:
                label = label_names[label]
            elif label.strip().lstrip("-").isdecimal():
                label = int(label)
            else:
                known = f"; the model's config.label2id knows {_quoted(label_names)}" if label_names else ""
                raise CaloraError(
                    f"row {i + 1} has the label {label!r}, which is neither a number nor a name that is known{known}"
                )
        if label < 0:
            dropped += 1
            continue
        if label >= classes:
            raise CaloraError(f"row {i + 1} has the label {label}, but the model has {classes} classes (0..{classes - 1})")
        kept.append(Record(record.text, pair=record.pair, label=label))
    if not kept:
        raise CaloraError(f"no row has a label: all {dropped} are negative")
    return kept, dropped


def _quoted(names: Iterable[str]) -> str:
    return ", ".join(repr(n) for n in names) or "none"


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """(line number, line without its end). Only \\n and \\r\\n end a line: a text may hold the other separators of Unicode."""
    try:
        with gzip.open(path, "rb") if path.name.endswith(".gz") else open(path, "rb") as file:
            for number, raw in enumerate(file, 1):
                line = raw.decode("utf-8-sig" if number == 1 else "utf-8")
                yield number, line.removesuffix("\n").removesuffix("\r")
    except UnicodeDecodeError as error:
        raise CaloraError(
            f"{path}, line {number} is not UTF-8 text (byte {error.object[error.start]:#04x}); convert the file to UTF-8"
        ) from None
    except FileNotFoundError:
        raise CaloraError(f"there is no file {path}") from None
    except (EOFError, zlib.error, gzip.BadGzipFile):
        raise CaloraError(f"{path} is not a whole gzip file; fetch or compress it again") from None
    except OSError as error:
        raise CaloraError(f"cannot read {path}: {error.strerror or error}") from None


def _read_txt(path: Path, columns: Columns) -> Iterator[Record]:
    if columns != Columns():
        raise CaloraError(
            f"{path} is plain text and has no columns; text_column, pair_column and label_column are for .jsonl and .tsv"
        )
    yield Record("\n".join(line for _, line in _lines(path)))


def _read_jsonl(path: Path, columns: Columns) -> Iterator[Record]:
    yield from _records(((f"{path}, line {n}", _json_row(path, n, line)) for n, line in _lines(path) if line.strip()), columns)


def _json_row(path: Path, number: int, line: str) -> dict:
    try:
        row = json.loads(line)
    except (json.JSONDecodeError, RecursionError):
        raise CaloraError(f"{path}, line {number} is not JSON; .jsonl holds one object per line") from None
    if not isinstance(row, dict):
        raise CaloraError(f'{path}, line {number} is not a JSON object; expected for example {{"text": "..."}}')
    return row


def _read_tsv(path: Path, columns: Columns) -> Iterator[Record]:
    lines = _lines(path)
    header = next(lines, (0, ""))[1].split("\t")

    def rows():
        for n, line in lines:
            if not line:
                continue
            fields = line.split("\t")
            if len(fields) != len(header):
                raise CaloraError(f"{path}, line {n} has {len(fields)} fields, the header has {len(header)}")
            yield f"{path}, line {n}", dict(zip(header, fields, strict=True))

    if header == [""]:
        raise CaloraError(f"{path} is empty; a .tsv file starts with a header line")
    yield from _records(rows(), columns)


def _from_rows(rows: Iterable, columns: Columns) -> Iterator[Record]:
    def as_dicts():
        for i, row in enumerate(rows, 1):
            if not isinstance(row, Mapping):
                raise CaloraError(f"row {i} of the data is a {type(row).__name__}; expected a text or a dict throughout")
            yield f"row {i} of the data", row

    rows = list(rows)
    if all(isinstance(r, Record) for r in rows):
        yield from rows
    elif all(isinstance(r, str) for r in rows):
        yield from (Record(r) for r in rows)
    else:
        yield from _records(as_dicts(), columns)


def _records(rows: Iterable[tuple[str, Mapping]], columns: Columns) -> Iterator[Record]:
    """(where, row) -> Records. The first row decides which columns are read."""
    chosen = None
    for where, row in rows:
        if chosen is None:
            prompts = columns == Columns() and {"prompt", "completion"} <= row.keys()
            chosen = Columns("prompt") if prompts else columns.resolve(row.keys(), where)
        text = _text(row, chosen.text, where)
        if prompts:
            yield Record(text, completion=_text(row, "completion", where))
        else:
            pair = None if chosen.pair is None else _text(row, chosen.pair, where)
            yield Record(text, pair=pair, label=_label(row, chosen.label, where))


def _text(row: Mapping, column: str, where: str) -> str:
    value = row.get(column)
    if not isinstance(value, str):
        raise CaloraError(
            f"{where} has no text in {column!r}" if value is None else f"{where}: {column!r} is not a text but {value!r:.40}"
        )
    return value


def _label(row: Mapping, column: str | None, where: str) -> int | str | None:
    value = None if column is None else row.get(column)
    if isinstance(value, bool):
        return int(value)
    if value is None or isinstance(value, (int, str)):
        return value
    if isinstance(value, float) and value.is_integer():
        return int(value)
    raise CaloraError(f"{where}: the label {value!r:.40} is neither a whole number nor a name")
