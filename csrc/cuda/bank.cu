// The down half of the low-rank bank, t = phi(x D^T) in fp32, and small helpers of the operators.
#include "device.cuh"

namespace calora::cuda {
namespace {

constexpr int kThreads = 256;

// Columns [column, column + 8) of a row; beyond `columns` 0. `words`: rows start at 16-byte words, whole words may be read.
__device__ __forceinline__ void load8(const void* row, int64_t column, int64_t columns, bool words, Dtype dtype, float (&v)[8]) {
  if (words && column + 8 <= columns) {
    if (dtype == Dtype::f32) {
      const auto* const p = reinterpret_cast<const float4*>(static_cast<const float*>(row) + column);
      const float4 a = p[0], b = p[1];
      v[0] = a.x, v[1] = a.y, v[2] = a.z, v[3] = a.w, v[4] = b.x, v[5] = b.y, v[6] = b.z, v[7] = b.w;
      return;
    }
    const uint4 w = *reinterpret_cast<const uint4*>(static_cast<const uint16_t*>(row) + column);
    const uint32_t q[4] = {w.x, w.y, w.z, w.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint16_t low = static_cast<uint16_t>(q[i]), high = static_cast<uint16_t>(q[i] >> 16);
      v[2 * i] = dtype == Dtype::bf16 ? bf16_to_float(low) : f16_to_float(low);
      v[2 * i + 1] = dtype == Dtype::bf16 ? bf16_to_float(high) : f16_to_float(high);
    }
    return;
  }
#pragma unroll
  for (int i = 0; i < 8; ++i) v[i] = column + i < columns ? load(row, column + i, dtype) : 0;
}

// One block: Ranks rows of D against 8 rows of x, its threads split the columns. ByRow: each row of x has a D of its own, or none.
template <int Ranks, bool ByRow>
__global__ void __launch_bounds__(kThreads) bank_down(const LinearArgs a) {
  wait_for_previous();
  release_next();  // the linear kernel copies its first weights meanwhile
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int64_t r0 = static_cast<int64_t>(blockIdx.x) * Ranks, m0 = static_cast<int64_t>(blockIdx.y) * 8, columns = a.w.in_features;
  const auto x_dtype = static_cast<Dtype>(a.x_dtype), dtype = static_cast<Dtype>(a.bank.dtype);
  const int64_t down_bytes = dtype == Dtype::f32 ? 4 : 2;
  const bool down_words = columns % 8 == 0 && reinterpret_cast<uintptr_t>(a.bank.down) % 16 == 0;
  float sum[Ranks][8] = {};
  for (int64_t column = 8 * threadIdx.x; column < columns; column += 8 * kThreads) {
    float d[Ranks][8];
    const auto load_down = [&](int64_t adapter) {
#pragma unroll
      for (int r = 0; r < Ranks; ++r) {
        const int64_t row = adapter * a.bank.rank + (r0 + r < a.bank.rank ? r0 + r : r0);
        load8(static_cast<const uint8_t*>(a.bank.down) + row * columns * down_bytes, column, columns, down_words, dtype, d[r]);
      }
    };
    if (!ByRow) load_down(0);
#pragma unroll
    for (int m = 0; m < 8; ++m) {
      if (m0 + m >= a.m) break;
      if (ByRow) {
        const int64_t adapter = a.bank.row_adapter[m0 + m];
        if (adapter < 0 || adapter >= a.bank.adapters) continue;
        load_down(adapter);
      }
      float x[8];
      load8(static_cast<const uint16_t*>(a.x) + (m0 + m) * a.x_stride, column, columns, true, x_dtype, x);
#pragma unroll
      for (int r = 0; r < Ranks; ++r)
#pragma unroll
        for (int i = 0; i < 8; ++i) sum[r][m] += d[r][i] * x[i];
    }
  }
  __shared__ float sums[kThreads / 32][Ranks][8];
#pragma unroll
  for (int r = 0; r < Ranks; ++r)
#pragma unroll
    for (int m = 0; m < 8; ++m) {
#pragma unroll
      for (int offset = 16; offset; offset /= 2) sum[r][m] += __shfl_xor_sync(0xffffffffu, sum[r][m], offset);
      if (lane == 0) sums[warp][r][m] = sum[r][m];
    }
  __syncthreads();
  const int r = threadIdx.x / 8, m = threadIdx.x % 8;
  if (r >= Ranks || r0 + r >= a.bank.rank) return;
  float t = 0;
#pragma unroll
  for (int w = 0; w < kThreads / 32; ++w) t += sums[w][r][m];
  if (r0 + r >= a.bank.identity_rank) t = 0.5f * t * (1.f + erff(t * 0.70710678118654752f));
  if (ByRow && m0 + m < a.m) {
    const int64_t adapter = a.bank.row_adapter[m0 + m];
    if (adapter < -1 || adapter >= a.bank.adapters) t = bits_to_float(0x7fc00000);
  }
  a.bank.t[(r0 + r) * padded_rows(a.m) + m0 + m] = t;
}

template <int Ranks>
int launch_down(const LinearArgs& a, void* stream) {
  const dim3 grid(static_cast<unsigned>(round_up(a.bank.rank, Ranks) / Ranks), static_cast<unsigned>(round_up(a.m, kBatchAlign) / kBatchAlign));
  return launch(a.bank.row_adapter ? bank_down<Ranks, true> : bank_down<Ranks, false>, false, grid, kThreads, 0, stream, a);
}

__global__ void __launch_bounds__(kThreads) copy_rows(uint8_t* target, int64_t target_stride, const uint8_t* source, int64_t row_bytes) {
  for (int64_t i = threadIdx.x; i < target_stride / 2; i += kThreads)
    reinterpret_cast<uint16_t*>(target + blockIdx.x * target_stride)[i] =
        i < row_bytes / 2 ? reinterpret_cast<const uint16_t*>(source + blockIdx.x * row_bytes)[i] : 0;
}

}  // namespace
}  // namespace calora::cuda

extern "C" int calora_cuda_bank_down(const calora::cuda::LinearArgs* args, void* stream) {
  // Few rows of x: one row of D a block, for as many blocks as there can be; more of them: x is what is read often.
  return args->m <= 8 ? calora::cuda::launch_down<1>(*args, stream) : calora::cuda::launch_down<4>(*args, stream);
}

extern "C" int calora_cuda_copy_rows(void* target, int64_t target_stride, const void* source, int64_t row_bytes, int64_t rows, void* stream) {
  using namespace calora::cuda;
  return launch(copy_rows, false, dim3(static_cast<unsigned>(rows)), kThreads, 0, stream, static_cast<uint8_t*>(target), target_stride, static_cast<const uint8_t*>(source), row_bytes);
}
