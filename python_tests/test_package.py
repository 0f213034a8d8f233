"""What a user gets: the README's example, the source distribution, cards and tables."""

import io
import os
import re
import shutil
import subprocess
import sys
import tarfile
from contextlib import redirect_stdout
from pathlib import Path

import pytest
from adapt_helpers import make_llama, make_lora, make_tokenizer, text_of

import calora_ext
from calora_ext.card import adapter_card, model_card
from calora_ext.tables import format_bytes, table

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_readme_example(tmp_path, monkeypatch):
    """The README's Python block, run as it stands on a tiny model."""
    (code,) = re.findall(r"```python\n(.*?)```", README, flags=re.S)
    make_llama().save_pretrained(tmp_path / "dense-dir")
    make_tokenizer().save_pretrained(tmp_path / "dense-dir")
    make_lora(tmp_path / "lora-dir", make_llama())
    (tmp_path / "train.txt").write_text(text_of(600))
    (tmp_path / "test.txt").write_text(text_of(200, seed=1))
    monkeypatch.chdir(tmp_path)
    with redirect_stdout(io.StringIO()) as printed:
        exec(compile(code, "README.md", "exec"), {})
    assert (tmp_path / "chat-dir" / "adapter_config.json").exists() and (tmp_path / "chat-dir" / "recovery_config.json").exists()
    assert "int4 g64" in printed.getvalue() and "i-rc-d" in printed.getvalue()


def test_a_package_that_was_not_built_says_so(tmp_path):
    """A source folder without its native half: one sentence from the command line, no traceback."""
    package = Path(calora_ext.__file__).parent
    shutil.copytree(package, tmp_path / "calora_ext", ignore=shutil.ignore_patterns("lib", "_native*", "assets", "__pycache__"))
    (tmp_path / "model").mkdir()
    command = [sys.executable, "-m", "calora_ext", "compress", "model", "-o", "out"]
    done = subprocess.run(command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(tmp_path)}, capture_output=True, text=True)
    assert done.returncode == 2 and "was not built" in done.stderr and "pip install" in done.stderr and "Traceback" not in done.stderr


def test_readme_commands_exist():
    """Every `calora` line of the README names a command and options that the command has."""
    import typer

    from calora_ext.cli import app

    group = typer.main.get_command(app)
    lines = [line.split("#")[0].split() for line in README.splitlines() if re.match(r"calora [a-z]+( |$)", line)]
    assert len(lines) >= 9
    for _, name, *words in lines:
        known = {option for parameter in group.commands[name].params for option in parameter.opts}
        assert {word for word in words if word.startswith("-")} <= known, name


def test_readme_length_and_blocks():
    assert len(README.splitlines()) <= 200
    for name in ("speed", "recovery"):
        assert README.count(f"<!-- {name}:") == README.count(f"<!-- /{name} -->") == 1


def test_version():
    assert f'version = "{calora_ext.__version__}"' in (ROOT / "pyproject.toml").read_text()


@pytest.mark.processes
def test_source_distribution(tmp_path):
    """It holds what a build and a demo need, and no binary of ours."""
    pytest.importorskip("build")
    code = f"from setuptools import build_meta; print(build_meta.build_sdist({str(tmp_path)!r}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with tarfile.open(next(tmp_path.glob("*.tar.gz"))) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    tracked = [p.relative_to(ROOT).as_posix() for d in ("csrc", "calora_ext") for p in (ROOT / d).rglob("*") if p.is_file()]
    wanted = {n for n in tracked if not n.endswith((".so", ".pyc"))} | {"CMakeLists.txt", "setup.py", "pyproject.toml", "README.md", "LICENSE"}
    assert wanted <= names, sorted(wanted - names)[:5]
    assert not [n for n in names if n.endswith((".so", ".pyc"))]


def test_save_pretrained_writes_a_card_and_keeps_mine(tmp_path):
    model = make_llama()
    calora_ext.compress(model, calora_ext.Recipe(weights="int8"))
    model.save_pretrained(tmp_path / "small")
    card = tmp_path / "small" / "README.md"
    size = (tmp_path / "small" / "model.safetensors").stat().st_size
    assert "int8 weights" in card.read_text() and format_bytes(size) in card.read_text() and str(tmp_path) not in card.read_text()
    card.write_text("mine")
    model.save_pretrained(tmp_path / "small")
    assert card.read_text() == "mine"


def test_cards():
    card = model_card("small", {"weights": "int4", "group_size": 64, "sparsity": None}, [("weight files", "2 MB")], "RESULTS")
    head, body = card.split("---\n", 2)[1:]
    assert "library_name: calora_ext" in head and "- int4" in head
    assert "int4 weights, groups of 64" in body and "weight files" in body and "RESULTS" in body
    (snippet,) = re.findall(r"```python\n(.*?)```", body, flags=re.S)
    compile(snippet, "card", "exec")
    assert 'cx.load("small")' in snippet and 'cx.load_adapter(model, "mine"' in adapter_card("mine", {}, [])


def test_table():
    text = table(("name", "n"), [("a|b", 1.5), ("c", None), ("d", "-2 ×")])
    lines = text.splitlines()
    assert len({len(line) for line in lines}) == 1 and "a\\|b" in lines[2] and lines[1].endswith("-:|")
    assert table(("name",), [("1",), ("x",)]).splitlines()[1].endswith("--|")  # not all numbers: left


@pytest.mark.parametrize(("n", "text"), [(0, "0 B"), (999, "999 B"), (1000, "1.00 kB"), (12345, "12.3 kB"), (5.22e6, "5.22 MB"), (3e13, "30000 GB")])
def test_format_bytes(n, text):
    assert format_bytes(n) == text


def test_saved_files_are_as_readable_as_any_other(tmp_path):
    """safetensors makes its files private (0600); what we save follows the umask."""
    before = os.umask(0o022)
    try:
        model = make_llama()
        calora_ext.compress(model)
        model.save_pretrained(tmp_path / "small")
        make_lora(tmp_path / "lora", make_llama())
        calora_ext.load_adapter(model, tmp_path / "lora", "a")
        calora_ext.save_adapter(model, "a", tmp_path / "adapter")
    finally:
        os.umask(before)
    modes = {p.name: p.stat().st_mode & 0o777 for name in ("small", "adapter") for p in (tmp_path / name).iterdir()}
    assert {"model.safetensors", "adapter_model.safetensors"} < set(modes) and set(modes.values()) == {0o644}, modes
