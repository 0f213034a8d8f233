// Stands in for ops.cpp in a build without CUDA: every operator on CUDA tensors says so.
#include <torch/csrc/stable/library.h>
#include <torch/headeronly/util/Exception.h>

namespace {
void absent(StableIValue*, uint64_t, uint64_t) {
  STD_TORCH_CHECK(false, "calora: this build has no CUDA kernels; install the CUDA toolkit (nvcc) and build calora_ext again, or keep "
                         "the model on the CPU");
}
}  // namespace

STABLE_TORCH_LIBRARY_IMPL(calora, CUDA, m) {
  for (const char* op : {"linear", "linear_inference", "linear_dx", "decode", "read"}) m.impl(op, &absent);
}
