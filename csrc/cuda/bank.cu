// The down half of the low-rank bank, t = phi(x D^T) in fp32, and small helpers of the operators.
#include "device.cuh"

namespace calora::cuda {
namespace {

constexpr int kThreads = 256;

// Columns [column, column + 8) of a row of D; beyond `columns` 0.
__device__ __forceinline__ void load8(const void* row, int64_t column, int64_t columns, Dtype dtype, float (&v)[8]) {
#pragma unroll
  for (int i = 0; i < 8; ++i) v[i] = column + i < columns ? load(row, column + i, dtype) : 0;
}
template <class X>
__device__ __forceinline__ void unpack8(uint4 word, float (&v)[8]) {
  const uint32_t q[4] = {word.x, word.y, word.z, word.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) v[2 * i] = X::to_float(static_cast<uint16_t>(q[i])), v[2 * i + 1] = X::to_float(static_cast<uint16_t>(q[i] >> 16));
}

// One block: Ranks rows of D against Rows rows of x, its threads split the columns. ByRow: a row of x with a D of its own, or none.
// No branch among the loads of a round, so that they are all under way at once: with one, eight rows of x took 15 us instead of 4.
template <class X, int Ranks, int Rows, bool ByRow>
__global__ void __launch_bounds__(kThreads, 2) bank_down(const LinearArgs a) {
  static_assert(!ByRow || Rows == 1);
  wait_for_previous();
  release_next();  // the linear kernel copies its first weights meanwhile
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int64_t r0 = static_cast<int64_t>(blockIdx.x) * Ranks, m0 = static_cast<int64_t>(blockIdx.y) * Rows, columns = a.w.in_features;
  const int64_t adapter = ByRow ? a.bank.row_adapter[m0] : 0;
  const bool there = adapter >= 0 && adapter < a.bank.adapters;
  const auto dtype = static_cast<Dtype>(a.bank.dtype);
  const uint8_t *down[Ranks], *x[Rows];
#pragma unroll
  for (int r = 0; r < Ranks; ++r) {
    const int64_t row = (there ? adapter * a.bank.rank : 0) + (r0 + r < a.bank.rank ? r0 + r : r0);
    down[r] = static_cast<const uint8_t*>(a.bank.down) + row * columns * (dtype == Dtype::f32 ? 4 : 2);
  }
#pragma unroll
  for (int m = 0; m < Rows; ++m) x[m] = static_cast<const uint8_t*>(a.x) + 2 * (m0 + m < a.m ? m0 + m : a.m - 1) * a.x_stride;
  float sum[Ranks][Rows] = {};
  const auto accumulate = [&](const auto& load_down) {
#pragma unroll(Ranks == 1 ? 4 : Ranks == 2 ? 2 : 1)
    for (int64_t column = 8 * threadIdx.x; column < columns; column += 8 * kThreads) {
      float d[Ranks][8];
      uint4 words[Rows];
#pragma unroll
      for (int r = 0; r < Ranks; ++r) load_down(down[r], column, d[r]);
#pragma unroll
      for (int m = 0; m < Rows; ++m) words[m] = load_cached(x[m] + 2 * column);  // whole words: x is 0 behind its columns
#pragma unroll
      for (int m = 0; m < Rows; ++m) {
        float v[8];
        unpack8<X>(words[m], v);
#pragma unroll
        for (int r = 0; r < Ranks; ++r)
#pragma unroll
          for (int i = 0; i < 8; ++i) sum[r][m] += d[r][i] * v[i];
      }
    }
  };
  const bool whole = columns % 8 == 0 && reinterpret_cast<uintptr_t>(a.bank.down) % 16 == 0;  // rows of D are whole 16-byte words
  if (!there) {
  } else if (whole && dtype == X::kDtype) {
    accumulate([](const uint8_t* row, int64_t column, float (&d)[8]) { unpack8<X>(load_cached(row + 2 * column), d); });
  } else if (whole && dtype == Dtype::f32) {
    accumulate([](const uint8_t* row, int64_t column, float (&d)[8]) {
      const uint4 low = load_cached(row + 4 * column), high = load_cached(row + 4 * column + 16);
      d[0] = bits_to_float(low.x), d[1] = bits_to_float(low.y), d[2] = bits_to_float(low.z), d[3] = bits_to_float(low.w);
      d[4] = bits_to_float(high.x), d[5] = bits_to_float(high.y), d[6] = bits_to_float(high.z), d[7] = bits_to_float(high.w);
    });
  } else {
    accumulate([&](const uint8_t* row, int64_t column, float (&d)[8]) { load8(row, column, columns, dtype, d); });
  }
  __shared__ float sums[kThreads / 32][Ranks][Rows];
#pragma unroll
  for (int r = 0; r < Ranks; ++r)
#pragma unroll
    for (int m = 0; m < Rows; ++m) {
#pragma unroll
      for (int offset = 16; offset; offset /= 2) sum[r][m] += __shfl_xor_sync(0xffffffffu, sum[r][m], offset);
      if (lane == 0) sums[warp][r][m] = sum[r][m];
    }
  __syncthreads();
  const int r = threadIdx.x / Rows, m = threadIdx.x % Rows;
  if (r >= Ranks || r0 + r >= a.bank.rank || m0 + m >= a.m) return;
  float t = 0;
#pragma unroll
  for (int w = 0; w < kThreads / 32; ++w) t += sums[w][r][m];
  if (r0 + r >= a.bank.identity_rank) t = 0.5f * t * (1.f + erff(t * 0.70710678118654752f));
  if (ByRow && !there && adapter != -1) t = bits_to_float(0x7fc00000);
  a.bank.t[(r0 + r) * padded_rows(a.m) + m0 + m] = t;
}

template <class X, int Ranks, int Rows, bool ByRow>
int launch_down(const LinearArgs& a, void* stream) {
  const dim3 grid(static_cast<unsigned>(round_up(a.bank.rank, Ranks) / Ranks), static_cast<unsigned>(round_up(a.m, Rows) / Rows));
  return launch(bank_down<X, Ranks, Rows, ByRow>, grid, kThreads, 0, stream, a);
}

template <class X>
int by_rows(const LinearArgs& a, void* stream) {
  if (a.bank.row_adapter) return launch_down<X, 1, 1, true>(a, stream);
  if (a.m == 1) return launch_down<X, 1, 1, false>(a, stream);
  // As many blocks as run at once: with few rows of x they have one row of D each, with more of them x is what is read often.
  if (a.m <= 8) return launch_down<X, 1, 4, false>(a, stream);
  return a.m <= 32 ? launch_down<X, 2, 4, false>(a, stream) : launch_down<X, 4, 8, false>(a, stream);
}

__global__ void __launch_bounds__(kThreads) copy_rows(uint8_t* target, int64_t target_stride, const uint8_t* source, int64_t row_bytes) {
  wait_for_previous();
  for (int64_t i = threadIdx.x; i < target_stride / 2; i += kThreads)
    reinterpret_cast<uint16_t*>(target + blockIdx.x * target_stride)[i] =
        i < row_bytes / 2 ? reinterpret_cast<const uint16_t*>(source + blockIdx.x * row_bytes)[i] : 0;
}

}  // namespace
}  // namespace calora::cuda

extern "C" int calora_cuda_bank_down(const calora::cuda::LinearArgs* args, void* stream) {
  using namespace calora::cuda;
  return static_cast<Dtype>(args->x_dtype) == Dtype::bf16 ? by_rows<Bf16>(*args, stream) : by_rows<F16>(*args, stream);
}

extern "C" int calora_cuda_copy_rows(void* target, int64_t target_stride, const void* source, int64_t row_bytes, int64_t rows, void* stream) {
  using namespace calora::cuda;
  return launch(copy_rows, dim3(static_cast<unsigned>(rows)), kThreads, 0, stream, static_cast<uint8_t*>(target), target_stride, static_cast<const uint8_t*>(source), row_bytes);
}
