"""Tables and quantities as text: the same for terminals, model cards, reports and the README."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """An aligned GitHub-Markdown table. Columns whose cells are all numbers (or empty) are aligned right; None is empty."""
    cells = [["" if value is None else str(value).replace("|", "\\|") for value in row] for row in rows]
    numeric = [any(row[i] for row in cells) and all(_is_quantity(row[i]) for row in cells) for i in range(len(columns))]
    widths = [max(3, len(name), *(len(row[i]) for row in cells)) for i, name in enumerate(columns)]

    def line(values: Sequence[str]) -> str:
        padded = (v.rjust(w) if right else v.ljust(w) for v, w, right in zip(values, widths, numeric, strict=True))
        return "| " + " | ".join(padded) + " |"

    rule = "|" + "|".join("-" * (w + 1) + (":" if right else "-") for w, right in zip(widths, numeric, strict=True)) + "|"
    return "\n".join([line(columns), rule, *map(line, cells)])


def _is_quantity(text: str) -> bool:
    """A number, perhaps with a sign and a unit behind it, or nothing."""
    return not text or text.lstrip("+-−").partition(" ")[0].rstrip("%×").replace(",", "").replace(".", "", 1).isdigit()


def format_bytes(n: float) -> str:
    """Decimal units, three digits: 5.22 MB."""
    units = ["B", "kB", "MB", "GB"]
    while n >= 1000 and len(units) > 1:
        n /= 1000
        del units[0]
    digits = 0 if n >= 100 or units[0] == "B" else 1 if n >= 10 else 2
    return f"{n:.{digits}f} {units[0]}"
