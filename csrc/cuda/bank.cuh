// The up half of the low-rank bank, shared by every base format: y += t U^T inside a kernel's accumulators.
#pragma once
#include "device.cuh"

namespace calora::cuda {

// U of the adapters that rows of x take, for a tile, on its way to the L2 cache while weights are read.
__device__ __forceinline__ void prefetch_up(const LowRank& bank, int64_t tile, int64_t m0, int rows, int64_t m_end) {
  const int64_t bytes = static_cast<Dtype>(bank.dtype) == Dtype::f32 ? 4 : 2, begin = tile * bank.up_tile * bytes;
  const int64_t limit = bank.up_adapter * bytes, end = begin + bank.up_tile * bytes < limit ? begin + bank.up_tile * bytes : limit;
  for (int row = 0; row < rows && m0 + row < m_end; ++row) {
    const int64_t adapter = bank.row_adapter[m0 + row];
    if (adapter < 0 || adapter >= bank.adapters) continue;
    const auto* const up = static_cast<const uint8_t*>(bank.up) + adapter * limit;
    for (int64_t at = begin + 128 * threadIdx.x; at < end; at += 128 * blockDim.x) prefetch(up + at);
  }
}

// What the bank of row m of x adds to the 32 rows of a tile; written by a warp.
__device__ __forceinline__ void low_rank_of_row(float* to, const LowRank& bank, int64_t out_features, int64_t tile, int lane, int64_t m, int64_t m_end) {
  const Dtype dtype = static_cast<Dtype>(bank.dtype);
  const int64_t adapter = bank.row_adapter[m], padded_m = padded_rows(m_end);
  if (adapter == -1) {
    to[lane] = 0;
    return;
  }
  // Of an adapter that is not there, the first: t is NaN.
  const int64_t first = (adapter > 0 && adapter < bank.adapters ? adapter * bank.up_adapter : 0) + tile * bank.up_tile;
  const int rank = static_cast<int>(bank.rank);
  if (bank.up_row == 1 && dtype != Dtype::f32 && reinterpret_cast<uintptr_t>(bank.up) % 16 == 0) {
    // Tiled: lane (q, c) takes ranks q, q + 8 .. of rows 8 c .. 8 c + 7, in 16-byte words; then lanes q add up, each for one row in the end.
    const int q = lane / 4, c = lane % 4;
    const auto* const up = static_cast<const uint16_t*>(bank.up) + first + 8 * c;
    float sum[8] = {};
#pragma unroll 8
    for (int r = q; r < rank; r += 8) {
      const uint4 word = load_cached(up + r * static_cast<int>(kTileRows));
      const float t = bank.t[r * padded_m + m];
      const uint32_t v[4] = {word.x, word.y, word.z, word.w};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const auto low = static_cast<uint16_t>(v[i]), high = static_cast<uint16_t>(v[i] >> 16);
        sum[2 * i] += t * (dtype == Dtype::bf16 ? bf16_to_float(low) : f16_to_float(low));
        sum[2 * i + 1] += t * (dtype == Dtype::bf16 ? bf16_to_float(high) : f16_to_float(high));
      }
    }
#pragma unroll
    for (int half = 4; half; half /= 2) {  // keep one half of the rows, give the other away
      const bool upper = q & half;
#pragma unroll
      for (int i = 0; i < half; ++i) {
        const float kept = upper ? sum[half + i] : sum[i], given = upper ? sum[i] : sum[half + i];
        sum[i] = kept + __shfl_xor_sync(0xffffffffu, given, 4 * half);
      }
    }
    to[8 * c + q] = sum[0];
    return;
  }
  float sum = 0;
  if (tile * kTileRows + lane < out_features)
    for (int r = 0; r < rank; ++r) sum += load(bank.up, first + lane * bank.up_row + r * bank.up_rank, dtype) * bank.t[r * padded_m + m];
  to[lane] = sum;
}

// A pair of floats as two pairs of bf16 whose sum they are but for 2^-17 of themselves.
struct Halves {
  uint32_t high, low;
  __device__ __forceinline__ Halves(float first, float second) {
    const uint16_t a = float_to_bf16(first), b = float_to_bf16(second);
    high = pair(a, b);
    low = pair(float_to_bf16(first - bf16_to_float(a)), float_to_bf16(second - bf16_to_float(b)));
  }
};

// t of 16 ranks from r0 on as the other operand: t[n][h][e] is rank r0 + 2 c + 8 h + e of row m0 + 8 n + g of x.
template <int NB>
__device__ __forceinline__ void load_t(float (&t)[NB][2][2], const LowRank& bank, int r0, int64_t m0, int64_t m_end, int g, int c) {
  const int rank = static_cast<int>(bank.rank), padded_m = static_cast<int>(padded_rows(m_end));
#pragma unroll
  for (int n = 0; n < NB; ++n)
#pragma unroll
    for (int h = 0; h < 2; ++h)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int r = r0 + 2 * c + 8 * h + e;
        const int64_t m = m0 + 8 * n + g;
        t[n][h][e] = r >= rank ? 0 : bank.t[r * padded_m + (m < m_end ? m : m_end - 1)];
      }
}

// y[rt][n][2 j + e] of a lane (g, c), row 16 rt + 8 j + g of `tile` and row m0 + 8 n + 2 c + e of x, += t U^T: 16 ranks an mma, of which the
// warps of a tile take turns. Factors go in as sums of two bf16. In shared memory U is 16-bit, (rank, 32).
template <int NB, bool Wide, bool InShared>
__device__ __forceinline__ void add_ranks(float (&y)[2][NB][4], const LowRank& bank, int64_t out_features, int64_t tile, Shared up, int64_t m0, int64_t m_end,
                                          int slice, int slices, int lane) {
  const Dtype dtype = static_cast<Dtype>(bank.dtype);
  const int g = lane / 4, c = lane % 4, rank = static_cast<int>(bank.rank);
  for (int r0 = 16 * slice; r0 < rank; r0 += 16 * slices) {
    float t[NB][2][2];
    load_t(t, bank, r0, m0, m_end, g, c);
#pragma unroll
    for (int rt = 0; rt < 2; ++rt) {
      uint32_t high[4], low[4];
      if constexpr (InShared) {
        // Beyond the rank its last one again: t is 0 there.
        const int r = r0 + lane / 16 * 8 + lane % 8;
        load_matrices_transposed(up + ((r < rank ? r : rank - 1) * 64 + 32 * rt + lane / 8 % 2 * 16), high);
        if (dtype != Dtype::bf16)
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const Halves halves(f16_to_float(static_cast<uint16_t>(high[i])), f16_to_float(static_cast<uint16_t>(high[i] >> 16)));
            high[i] = halves.high, low[i] = halves.low;
          }
      } else {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          float u[2];
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            const int row = 16 * rt + 8 * (i & 1) + g, r = r0 + 2 * c + 8 * (i >> 1) + e;
            const int64_t at = tile * bank.up_tile + row * bank.up_row + r * bank.up_rank;
            u[e] = r >= rank || tile * kTileRows + row >= out_features ? 0 : Wide ? load(bank.up, at, Dtype::f32) : load16(bank.up, at, dtype);
          }
          const Halves halves(u[0], u[1]);
          high[i] = halves.high, low[i] = halves.low;
        }
      }
#pragma unroll
      for (int n = 0; n < NB; ++n) {
        const Halves t0(t[n][0][0], t[n][0][1]), t1(t[n][1][0], t[n][1][1]);
        mma<Bf16>(y[rt][n], high, t0.low, t1.low);
        if (dtype != Dtype::bf16) mma<Bf16>(y[rt][n], low, t0.high, t1.high);
        mma<Bf16>(y[rt][n], high, t0.high, t1.high);
      }
    }
  }
}

template <int NB>
__device__ __forceinline__ void add_low_rank(float (&y)[2][NB][4], const LowRank& bank, int64_t out_features, int64_t tile, bool in_shared, Shared up,
                                             int64_t m0, int64_t m_end, int slice, int slices, int lane) {
  if (in_shared) add_ranks<NB, false, true>(y, bank, out_features, tile, up, m0, m_end, slice, slices, lane);
  else if (static_cast<Dtype>(bank.dtype) == Dtype::f32) add_ranks<NB, true, false>(y, bank, out_features, tile, up, m0, m_end, slice, slices, lane);
  else add_ranks<NB, false, false>(y, bank, out_features, tile, up, m0, m_end, slice, slices, lane);
}

}  // namespace calora::cuda
