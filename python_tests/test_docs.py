"""docs/methods.md names tests as its proof: they exist."""

import re
from pathlib import Path

import pytest

HERE = Path(__file__).parent
TEXT = (HERE.parent / "docs" / "methods.md").read_text(encoding="utf-8")
NAMED = sorted(set(re.findall(r"test_\w+", TEXT)))
THERE = {path.stem for path in HERE.glob("test_*.py")} | {
    name for path in HERE.glob("test_*.py") for name in re.findall(r"^def (test_\w+)", path.read_text(encoding="utf-8"), re.MULTILINE)
}


@pytest.mark.parametrize("name", NAMED)
def test_every_test_that_is_named_exists(name):
    assert name in THERE


def test_the_lists_are_whole():
    for kind, count in (("F", 15), ("B", 9)):
        assert {int(n) for n in re.findall(rf"\b{kind}(\d+)", TEXT)} >= set(range(1, count + 1))
    rows = re.findall(r"^\| ([\d, ]+) \|", TEXT, re.MULTILINE)
    assert {int(n) for row in rows for n in row.split(",")} == set(range(1, 32))
