"""No AVX outside the rungs: dispatch must work on a processor without it, so its objects and all others that are compiled without
flags of an instruction set hold none, and a rung hands the linker no function that those could be given instead of their own."""

import platform
import re
import shutil
import subprocess
from pathlib import Path

import pytest

BUILDS = Path(__file__).parents[1] / "build" / "cmake"
# VEX and EVEX mnemonics begin with v; verr, verw and those of virtual machines do too.
VECTOR = re.compile(r"^\s*[0-9a-f]+:\s+v(?!err|erw|mcall|mlaunch|mresume|mxo|mread|mwrite)\w+.*$|%[yz]mm\d|%k[0-7]", re.MULTILINE)


@pytest.fixture(scope="module")
def objects() -> Path:
    """The folder of the newest build's objects."""
    if platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip("AVX is x86-64's")
    if shutil.which("objdump") is None:
        pytest.skip("objdump was not found (Debian: apt install binutils)")
    found = sorted(BUILDS.glob("*/CMakeFiles/calora.dir/csrc/ops.cpp.o"), key=lambda path: path.stat().st_mtime)
    if not found:
        pytest.skip("the objects are gone; `python setup.py build_ext --inplace` keeps them in build/")
    return found[-1].parents[2]


def objdump(option: str, path: Path) -> str:
    return subprocess.run(["objdump", option, "--no-show-raw-insn", str(path)], capture_output=True, text=True, check=True).stdout


def test_objects_without_flags_hold_no_avx(objects):
    baseline = [*objects.glob("calora.dir/**/*.o"), *objects.glob("_native.dir/**/*.o")]
    names = {path.name.removesuffix(".cpp.o") for path in baseline}
    assert {"ops", "introspection", "linear", "dispatch", "reference", "scratch", "module"} <= names
    for path in baseline:
        found = VECTOR.search(objdump("--disassemble", path))
        assert found is None, f"{path.name}: {found[0].strip()}"


def test_the_pattern_finds_avx(objects):
    rungs = [*objects.glob("rung_*/**/*.o")]
    assert len(rungs) >= 6
    for path in rungs:
        assert VECTOR.search(objdump("--disassemble", path)), path


def test_rungs_define_no_function_that_others_could_be_linked_to(objects):
    for path in objects.glob("rung_*/**/*.o"):
        shared = [line for line in objdump("--syms", path).splitlines() if re.match(r"[0-9a-f]+ .{0,6}[wu].* F \.", line)]
        assert not shared, f"{path.name}: {shared[0]}"
