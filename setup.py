"""Builds the native half with CMake + ninja. torch is found in the target environment and never imported here, so that
pip's build isolation works and no second torch is downloaded."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from importlib.machinery import PathFinder
from pathlib import Path

import pybind11
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()


def sites() -> list[str]:
    """site-packages of the environments this build may be for, the likeliest first.

    Under pip the interpreter is the target's, whatever sys.path was made to hide. `python -m build` runs in a virtual
    environment of its own, whose pyvenv.cfg names the interpreter that made it.
    """
    found = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    config = Path(sys.prefix) / "pyvenv.cfg"
    maker = re.search(r"^command = (.+) -m venv ", config.read_text(), re.MULTILINE) if config.exists() else None
    if maker:
        ask = [maker[1], "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
        found.append(subprocess.run(ask, capture_output=True, text=True).stdout.strip())
    return [site for site in found if site]


def torch_root() -> Path:
    """The torch this package will run against: importable now, or hidden by the isolation of a build."""
    spec = PathFinder.find_spec("torch") or PathFinder.find_spec("torch", sites())
    if spec is None or spec.origin is None:
        sys.exit("calora_ext compiles against torch's headers. Install torch first:\n    pip install torch && pip install .")
    return Path(spec.origin).parent


def cuda_options() -> list[str]:
    """CMake's options for the CUDA half. CALORA_CUDA=0 leaves it out, CALORA_CUDA_ARCHS="80;90" chooses what it is built for.

    nvcc is looked for in CUDACXX, CUDA_HOME, the PATH and /usr/local/cuda; where there is none the CPU half is built alone.
    """
    if os.environ.get("CALORA_CUDA", "1").lower() in ("0", "off", "false", "no"):
        return ["-DCALORA_CUDA=OFF"]
    homes = [home for home in (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda") if home]
    nvcc = os.environ.get("CUDACXX") or next(filter(None, (shutil.which("nvcc", path=f"{home}/bin") for home in homes[:-1])), None)
    nvcc = nvcc or shutil.which("nvcc") or shutil.which("nvcc", path=f"{homes[-1]}/bin")
    archs = os.environ.get("CALORA_CUDA_ARCHS")
    return [
        "-DCALORA_CUDA=ON",
        f"-DCMAKE_CUDA_COMPILER={nvcc}" if nvcc else "-UCMAKE_CUDA_COMPILER",
        f"-DCMAKE_CUDA_ARCHITECTURES={archs.replace(',', ';')}" if archs else "-UCMAKE_CUDA_ARCHITECTURES",
    ]


class CMakeBuild(build_ext):
    """One CMake project gives both native files; setuptools sees it as the extension calora_ext._native."""

    def build_extension(self, ext: Extension) -> None:
        package = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        # Not build_temp, which is a new folder at every editable installation: what was compiled would be compiled
        # again, and tests could not look at it.
        build = ROOT / "build" / "cmake" / sys.implementation.cache_tag
        build.mkdir(parents=True, exist_ok=True)
        configure = [
            "cmake", "-GNinja", "-S", str(ROOT), "-B", str(build),
            # Given every time: a cached path may point into an isolated environment that is gone.
            f"-DCMAKE_MAKE_PROGRAM={shutil.which('ninja')}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DTORCH_ROOT={torch_root()}",
            f"-DPACKAGE_DIR={package}",
            *cuda_options(),
        ]  # fmt: skip
        subprocess.run(configure, check=True)
        subprocess.run(["cmake", "--build", str(build)], check=True)

    def copy_extensions_to_source(self) -> None:
        """In-place and editable builds: libcalora.so travels beside _native."""
        super().copy_extensions_to_source()
        library = Path("calora_ext") / "lib" / "libcalora.so"
        (ROOT / library).parent.mkdir(exist_ok=True)
        shutil.copy2(Path(self.build_lib) / library, ROOT / library)


setup(ext_modules=[Extension("calora_ext._native", [])], cmdclass={"build_ext": CMakeBuild})
