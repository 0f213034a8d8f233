// The up half of the low-rank bank, shared by every base format: y += t U^T inside a kernel's accumulators.
#pragma once
#include "device.cuh"

namespace calora::cuda {

// y[rt][n][2 j + e] of a lane (g, c): row 16 rt + 8 j + g of `tile`, row m0 + 8 n + 2 c + e of x. The warps split the rank.
// Called while the first copies of the weight are under way, so that its own reads hide behind them.
template <int NB>
__device__ __forceinline__ void add_low_rank_by_row(float (&y)[2][NB][4], const LowRank& bank, int64_t out_features, int64_t tile, int64_t m0,
                                                    int64_t m_end, int warp, int warps, int g, int c) {
  const Dtype dtype = static_cast<Dtype>(bank.dtype);
#pragma unroll
  for (int n = 0; n < NB; ++n)
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int64_t m = m0 + 8 * n + 2 * c + e;
      const int64_t adapter = m < m_end ? bank.row_adapter[m] : -1;
      if (adapter == -1) continue;
      const int64_t first = adapter > 0 && adapter < bank.adapters ? adapter * bank.up_adapter : 0;  // one that is not there: t is NaN
      for (int64_t r = warp; r < bank.rank; r += warps) {
        const float t = bank.t[r * padded_rows(m_end) + m];
#pragma unroll
        for (int rt = 0; rt < 2; ++rt)
#pragma unroll
          for (int j = 0; j < 2; ++j) {
            const int row = 16 * rt + 8 * j + g;
            if (tile * kTileRows + row >= out_features) continue;
            y[rt][n][2 * j + e] += t * load(bank.up, first + tile * bank.up_tile + row * bank.up_row + r * bank.up_rank, dtype);
          }
      }
    }
}

// Many ranks at a time, so that their reads are under way together: the reads of weights do not go on meanwhile.
template <int NB, bool Wide>
__device__ __forceinline__ void add_ranks(float (&y)[2][NB][4], const LowRank& bank, int64_t out_features, int64_t tile, int64_t m0, int64_t padded_m,
                                          int warp, int warps, int g, int c) {
  const Dtype dtype = static_cast<Dtype>(bank.dtype);
  constexpr int kTogether = NB <= 2 ? 8 : 2;
#pragma unroll kTogether
  for (int64_t r = warp; r < bank.rank; r += warps) {
    float u[2][2];
#pragma unroll
    for (int rt = 0; rt < 2; ++rt)
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const int row = 16 * rt + 8 * j + g;
        const int64_t at = tile * bank.up_tile + row * bank.up_row + r * bank.up_rank;
        u[rt][j] = tile * kTileRows + row >= out_features ? 0 : Wide ? load(bank.up, at, Dtype::f32) : load16(bank.up, at, dtype);
      }
#pragma unroll
    for (int n = 0; n < NB; ++n) {
      const int64_t m = m0 + 8 * n + 2 * c;
      if (m >= padded_m) continue;
      const float2 t = *reinterpret_cast<const float2*>(bank.t + r * padded_m + m);
#pragma unroll
      for (int rt = 0; rt < 2; ++rt)
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          y[rt][n][2 * j] += u[rt][j] * t.x;
          y[rt][n][2 * j + 1] += u[rt][j] * t.y;
        }
    }
  }
}

template <int NB>
__device__ __forceinline__ void add_low_rank(float (&y)[2][NB][4], const LowRank& bank, int64_t out_features, int64_t tile, int64_t m0,
                                             int64_t m_end, int warp, int warps, int g, int c) {
  if (bank.row_adapter) return add_low_rank_by_row<NB>(y, bank, out_features, tile, m0, m_end, warp, warps, g, c);
  const int64_t padded_m = padded_rows(m_end);
  if (static_cast<Dtype>(bank.dtype) == Dtype::f32) add_ranks<NB, true>(y, bank, out_features, tile, m0, padded_m, warp, warps, g, c);
  else add_ranks<NB, false>(y, bank, out_features, tile, m0, padded_m, warp, warps, g, c);
}

}  // namespace calora::cuda
