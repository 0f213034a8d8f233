// The read-only stream: how fast memory can be read at all, the ceiling that every kernel is measured against.
#include <cuda_runtime.h>

#include <vector>

#include "api.h"

namespace {
constexpr int kThreads = 512;

__global__ void __launch_bounds__(kThreads) read(const uint4* data, int64_t words, uint64_t* partial) {
  uint4 all{};
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
#pragma unroll 8
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < words; i += step) {
    const uint4 v = __ldcs(data + i);
    all.x ^= v.x, all.y ^= v.y, all.z ^= v.z, all.w ^= v.w;
  }
  uint64_t sum = (static_cast<uint64_t>(all.y ^ all.w) << 32) | (all.x ^ all.z);
  for (int offset = 16; offset; offset /= 2) sum ^= __shfl_xor_sync(0xffffffffu, sum, offset);
  __shared__ uint64_t sums[kThreads / 32];
  if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = sum;
  __syncthreads();
  if (threadIdx.x) return;
  for (int w = 1; w < kThreads / 32; ++w) sum ^= sums[w];
  partial[blockIdx.x] = sum;
}
}  // namespace

extern "C" int calora_cuda_read(const void* data, int64_t bytes, void* partial, uint64_t* result, void* stream) {
  const auto s = static_cast<cudaStream_t>(stream);
  read<<<static_cast<unsigned>(calora::cuda::kReadBlocks), kThreads, 0, s>>>(static_cast<const uint4*>(data), bytes / 16, static_cast<uint64_t*>(partial));
  std::vector<uint64_t> sums(calora::cuda::kReadBlocks);
  uint8_t tail[16] = {};
  cudaError_t e = cudaGetLastError();
  if (e == cudaSuccess) e = cudaMemcpyAsync(sums.data(), partial, 8 * sums.size(), cudaMemcpyDeviceToHost, s);
  if (e == cudaSuccess && bytes % 16) e = cudaMemcpyAsync(tail, static_cast<const uint8_t*>(data) + bytes / 16 * 16, bytes % 16, cudaMemcpyDeviceToHost, s);
  if (e == cudaSuccess) e = cudaStreamSynchronize(s);
  *result = 0;
  for (const uint64_t sum : sums) *result ^= sum;
  for (int i = 0; i < 16; ++i) *result ^= static_cast<uint64_t>(tail[i]) << (i % 8 * 8);
  return e;
}

extern "C" int calora_cuda_set_device(int device) { return cudaSetDevice(device); }

extern "C" int calora_cuda_architecture(int device, int* architecture) {
  int major = 0, minor = 0;
  cudaError_t e = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  if (e == cudaSuccess) e = cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
  *architecture = 10 * major + minor;
  return e;
}

extern "C" const char* calora_cuda_error(int code) { return cudaGetErrorString(static_cast<cudaError_t>(code)); }
