"""Who may import whom, read from the source: the layers of the package, and where the optional libraries are allowed."""

import ast
import importlib.util
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import calora_ext
from calora_ext import integrations

PACKAGE = Path(calora_ext.__file__).parent

# A unit is a top-level module or sub-package. It may import units of a lower level, and itself.
LEVELS = {
    0: ("errors", "tables", "measure", "progress", "loss", "heap"),
    1: ("arguments", "formats", "card", "plots", "peers"),
    2: ("ops", "pruning"),
    3: ("recipe", "packed"),
    4: ("linear",),
    5: ("lowrank", "policy", "embedding", "bench"),
    6: ("io",),
    7: ("adapters", "evaluate"),
    8: ("compression",),
    9: ("adaptation",),
    10: ("integrations",),
    11: ("demo", "losa"),
    12: ("cli",),
    13: ("__main__",),
}
LEVEL = {unit: level for level, units in LEVELS.items() for unit in units}
MODEL_LIBRARIES = {"transformers", "peft", "accelerate"}
MAY_USE_THEM = {"integrations", "adaptation", "compression"}

SOURCES = sorted(p for p in PACKAGE.rglob("*.py") if p != PACKAGE / "__init__.py")


def unit_of(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imports(path: Path):
    """(line, absolute dotted name) of every import in a file, function-level ones included."""
    here = ("calora_ext", *path.relative_to(PACKAGE).with_suffix("").parts)
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            # one level is the package a module lies in; an __init__.py *is* that package, and here[-1] is its "__init__"
            base = here[: -node.level] if node.level else ()
            module = (*base, *(node.module.split(".") if node.module else ()))
            yield from ((node.lineno, ".".join((*module, alias.name))) for alias in node.names)


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_direction(path):
    unit = unit_of(path)
    assert unit in LEVEL, f"give {unit} a level in LEVELS: what may import it, and what may it import?"
    for line, name in imports(path):
        parts = name.split(".")
        if parts[0] != "calora_ext" or len(parts) < 2 or parts[1] not in LEVEL or parts[1] == unit:
            continue
        assert LEVEL[parts[1]] < LEVEL[unit], f"{path.name}:{line}: {unit} must not import {parts[1]}"


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_model_libraries_stay_in_their_corner(path):
    if unit_of(path) in MAY_USE_THEM:
        return
    for line, name in imports(path):
        assert name.split(".")[0] not in MODEL_LIBRARIES, f"{path.name}:{line}: import {name} through integrations/"


def test_checker_sees_relative_and_nested_imports(tmp_path, monkeypatch):
    source = tmp_path / "cli" / "x.py"
    source.parent.mkdir()
    source.write_text("from ..errors import CaloraError\ndef f():\n    import peft.utils\n    from . import info\n")
    monkeypatch.setattr(sys.modules[__name__], "PACKAGE", tmp_path)
    assert [name for _, name in imports(source)] == ["calora_ext.errors.CaloraError", "peft.utils", "calora_ext.cli.info"]


def fresh(code: str) -> str:
    """What a new interpreter prints for it."""
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def test_import_is_light():
    loaded = fresh("import sys, calora_ext; print(*sorted(m.partition('.')[0] for m in sys.modules))").split()
    heavy = MODEL_LIBRARIES | {"torch", "numpy", "safetensors", "typer", "tqdm", "matplotlib", "huggingface_hub"}
    assert not heavy & set(loaded)


def test_help_needs_no_torch():
    code = "import sys\ntry:\n    from calora_ext.cli import main; main(['--help'])\nfinally:\n    print('torch' in sys.modules)"
    assert fresh(code).endswith("False")


def test_a_bridge_waits_for_the_import_not_for_a_look_up(tmp_path, monkeypatch):
    (tmp_path / "some_library.py").write_text("broken\n")
    (tmp_path / "some_bridge.py").write_text("import some_library\nsome_library.bridged = True\n")
    monkeypatch.syspath_prepend(tmp_path)
    integrations.when_imported("some_library", "some_bridge")
    assert importlib.util.find_spec("some_library") is not None and "some_bridge" not in sys.modules
    with pytest.raises(NameError):  # an import that fails is not one either
        import_module("some_library")
    (tmp_path / "some_library.py").write_text("whole = 'and of another length'\n")
    importlib.invalidate_caches()
    assert import_module("some_library").bridged


@pytest.mark.parametrize("name", calora_ext.__all__)
def test_public_names_exist(name):
    assert getattr(calora_ext, name) is not None and name in dir(calora_ext)


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no_such_name"):
        calora_ext.no_such_name  # noqa: B018
