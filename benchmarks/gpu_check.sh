#!/usr/bin/env bash
# Everything there is to do on a GPU, in one call of less than ten minutes: build for the GPU that is there unless the library is
# built already, then benchmarks/gpu_check.py. Results: $OUT/gpu_check.json, or in the folder given; a short table comes last.
#     benchmarks/gpu_check.sh [FOLDER [OPTIONS]]   PYTHON=python3 by default; nothing is downloaded; options: gpu_check.py's
#     benchmarks/gpu_check.sh --dry-run            without a GPU: runs what needs none, writes nothing
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
dry=()
[ "${1:-}" = --dry-run ] && { dry=(--dry-run); shift; }
out=${1:-${OUT:-}}
[ $# -eq 0 ] || shift
if [ -z "$out" ] && [ ${#dry[@]} -eq 0 ]; then
  echo "Name a folder for the results: benchmarks/gpu_check.sh FOLDER, or set OUT." >&2
  exit 2
fi
"$python" -c 'import torch' 2>/dev/null || { echo "torch was not found beside $python; set PYTHON to an interpreter that has it." >&2; exit 2; }
if [ ${#dry[@]} -eq 0 ]; then
  "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' ||
    { echo "No GPU that torch can use was found; --dry-run runs what needs none." >&2; exit 2; }
fi
# The library: as it was carried along, or built here (about a minute for one architecture). It serves every Python; the small
# module beside it is for one, and is compiled for this one where it was carried along for another. torch brings pybind11.
if [ -f calora_ext/lib/libcalora.so ] && ! "$python" -c 'from calora_ext import _native' 2>/dev/null; then
  read -r headers torch suffix < <("$python" -c 'import sysconfig, torch, pathlib
print(sysconfig.get_paths()["include"], pathlib.Path(torch.__file__).parent, sysconfig.get_config_var("EXT_SUFFIX"))')
  "${CXX:-g++}" -O1 -std=c++20 -shared -fPIC -fvisibility=hidden -I"$headers" -I"$torch/include" csrc/module.cpp -Lcalora_ext/lib -lcalora \
    '-Wl,-rpath,$ORIGIN/lib' -Wl,--allow-shlib-undefined -o "calora_ext/_native$suffix" >&2 || true
fi
if ! "$python" -c 'import sys; from calora_ext import ops; sys.exit(not ops.native.cuda_architectures())' 2>/dev/null; then
  [ ${#dry[@]} -eq 0 ] || { echo "calora_ext is not built here with CUDA kernels: run python setup.py build_ext --inplace first." >&2; exit 2; }
  command -v nvcc >/dev/null || [ -x /usr/local/cuda/bin/nvcc ] ||
    { echo "calora_ext is not built with CUDA kernels and nvcc is not here: build it elsewhere and carry calora_ext/ along." >&2; exit 2; }
  "$python" -c 'import pybind11' 2>/dev/null || { echo "pybind11 is missing for the build; carry its wheel along." >&2; exit 2; }
  CALORA_CUDA_ARCHS=$("$python" -c 'import torch; print("%d%d" % torch.cuda.get_device_capability())') \
    "$python" setup.py build_ext --inplace >&2
fi
exec "$python" benchmarks/gpu_check.py "${dry[@]}" ${out:+--out "$out"} "$@"
