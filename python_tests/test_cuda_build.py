"""What nvcc makes of the kernels: no spills, the tensor core and wide asynchronous copies in the machine code. Needs no GPU."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import calora_ext
from calora_ext import WeightFormat, ops

ROOT = Path(__file__).parents[1]
NVCC = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
needs_nvcc = pytest.mark.skipif(NVCC is None, reason="nvcc was not found: the CUDA kernels were not compiled")
# More registers than this and a multiprocessor holds fewer blocks than the kernel was laid out for (__launch_bounds__).
REGISTERS = {"linear": 255, "decode": 64, "bank_down": 128}
# source: kernels in it
SOURCES = {"dense": {"linear": 40, "decode": 4}, "two_four": {"linear": 30, "decode": 4}, "bitmask": {"linear": 24, "decode": 4}, "bank": {"bank_down": 10}}
TENSOR_CORE = {"dense": r"\bHMMA\.16816\.F32", "two_four": r"\bHMMA\.SP\.16832\.F32", "bitmask": r"\bHMMA\.16816\.F32"}


def tool(name: str) -> str | None:
    """A tool of the CUDA toolkit: beside nvcc, on the PATH, or from NVIDIA's wheels in this environment."""
    places = [None, str(Path(NVCC).resolve().parent) if NVCC else "", *(str(p) for p in Path(sys.prefix).glob("lib/python*/site-packages/nvidia/cu*/bin"))]
    return next((found for place in places if (found := shutil.which(name, path=place))), None)


@pytest.fixture(scope="session")
def compiled(tmp_path_factory):
    """(folder with a cubin of each source for sm_90, what ptxas said about each)."""
    folder = tmp_path_factory.mktemp("sm_90")
    said, builds = {}, {}
    for name in SOURCES:  # side by side
        command = [NVCC, "-cubin", "-O3", "-std=c++17", "-arch=sm_90", "-Xptxas", "-v", str(ROOT / "csrc" / "cuda" / f"{name}.cu"), "-o", str(folder / f"{name}.cubin")]
        builds[name] = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    for name, build in builds.items():
        said[name] = build.communicate()[0]
        assert build.returncode == 0, said[name][-3000:]
    return folder, said


def kind(mangled: str) -> str | None:
    """Which of REGISTERS a kernel is, by its name with the length before it."""
    return next((name for name in REGISTERS if f"{len(name)}{name}" in mangled), None)


@needs_nvcc
def test_no_spills_and_few_registers(compiled):
    pattern = re.compile(
        r"Compiling entry function '(\S+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) registers", re.S
    )
    for source, expected in SOURCES.items():
        kernels = pattern.findall(compiled[1][source])
        names = [kind(mangled) for mangled, *_ in kernels]
        assert {name: names.count(name) for name in expected} == expected, source
        for name, (mangled, stack, stores, loads, registers) in zip(names, kernels, strict=True):
            assert (stack, stores, loads) == ("0", "0", "0"), f"{mangled} keeps {stack} bytes in local memory"
            assert name is None or int(registers) <= REGISTERS[name], mangled


def machine_code(compiled, source: str, wanted: str) -> dict[str, str]:
    """The disassembled kernels of one kind by their mangled names."""
    if tool("nvdisasm") is None:
        pytest.skip("nvdisasm was not found (pip install nvidia-cuda-nvdisasm)")
    code = subprocess.run([tool("nvdisasm"), "-c", str(compiled[0] / f"{source}.cubin")], capture_output=True, text=True, check=True).stdout
    kernels = re.findall(r"\.section\s+\.text\.(\S+?),(.*?)(?=\.section|\Z)", code, re.S)
    return {name: text for name, text in kernels if kind(name) == wanted}


@needs_nvcc
@pytest.mark.parametrize("source", TENSOR_CORE)
def test_machine_code(compiled, source):
    kernels = machine_code(compiled, source, "linear")
    assert len(kernels) == SOURCES[source]["linear"]
    for name, text in kernels.items():
        assert re.search(TENSOR_CORE[source], text), f"no tensor core in {name}"
        assert re.search(r"\bLDGSTS\.E\.\S*128", text), f"no 16-byte asynchronous copies in {name}"
        assert re.search(r"\bLDS\.128", text), f"no 16-byte loads from shared memory in {name}"
        assert not re.search(r"\b(LDL|STL)\b", text), f"local memory in {name}"
        assert len(re.findall(r"\bACQBULK\b", text)) >= 2, f"{name} waits for the kernel before it in the beginning, or behind a bank in the end"
        assert "LDGSTS" in text[: text.rindex("ACQBULK")], f"{name}: behind a bank the first copies do not start before t is there"


@needs_nvcc
def test_bank_down_releases_the_next_kernel(compiled):
    """At its begin, and only after it has waited itself."""
    kernels = machine_code(compiled, "bank", "bank_down")
    assert len(kernels) == SOURCES["bank"]["bank_down"]
    for name, text in kernels.items():
        assert 0 <= text.find("ACQBULK") < text.find("PREEXIT") < text.find("LDG"), name


@needs_nvcc
@pytest.mark.parametrize("source", TENSOR_CORE)
def test_decoding_waits_for_the_kernel_before_it(compiled, source):
    """It is launched early, too."""
    for name, text in machine_code(compiled, source, "decode").items():
        assert 0 <= text.find("ACQBULK") < text.find("LDG"), name


def test_a_build_without_cuda_says_so(tmp_path):
    """What stands in for the CUDA operators, compiled alone and called by its dispatch key."""
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler found")
    root = Path(torch.__file__).parent
    library = tmp_path / "absent.so"
    flags = ["-std=c++20", "-shared", "-fPIC", "-O0", "-DTORCH_TARGET_VERSION=0x020a000000000000", f"-I{root / 'include'}"]
    link = ["-Wl,--no-as-needed", str(root / "lib" / "libtorch_cpu.so")]
    subprocess.run([compiler, *flags, str(ROOT / "csrc" / "cuda" / "absent.cpp"), *link, "-o", str(library)], check=True)
    code = """
import sys, torch
torch.library.define("calora::read", "(Tensor data) -> int")
torch.ops.load_library(sys.argv[1])
try:
    torch.ops.calora.read.default.redispatch(torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA), torch.zeros(8, dtype=torch.uint8))
except RuntimeError as error:
    print(error)
"""
    result = subprocess.run([sys.executable, "-c", code, str(library)], capture_output=True, text=True)
    assert "no CUDA kernels; install the CUDA toolkit" in result.stdout, result.stderr


def test_the_library_needs_no_cuda_at_load():
    """A static runtime, and torch's CUDA looked up late: nothing of CUDA among what the loader must find."""
    library = Path(calora_ext.__file__).parent / "lib" / "libcalora.so"
    needed = subprocess.run(["readelf", "-d", str(library)], capture_output=True, text=True, check=True).stdout
    assert not re.search(r"NEEDED.*(cuda|cudart|nvrtc)", needed)
    symbols = subprocess.run(["nm", "-D", "--undefined-only", str(library)], capture_output=True, text=True, check=True).stdout
    assert "aoti_torch_get_current_cuda_stream" not in symbols


def test_rows_that_are_fused_by_architecture():
    """The table of csrc/cuda/thresholds.h: 64 where nothing was measured, and never fewer than the operator takes without asking."""
    fused = ops.native.fused_rows
    formats = [WeightFormat(values, pattern=pattern) for values in ("int4", "int8", "nf4", "bf16") for pattern in ("dense", "2:4", "unstructured")]
    assert {fused(80, fmt.id) for fmt in formats} == {64}
    rows = {str(fmt): fused(90, fmt.id) for fmt in formats}
    assert rows["bf16 unstructured"] == 16 and rows["int8"] == 128 and min(rows.values()) == 16
