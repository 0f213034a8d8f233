// The up half of the low-rank bank, shared by every base format: y += t U^T inside a kernel's accumulators.
#pragma once
#include "device.cuh"

namespace calora::cuda {

// y[rt][n][2 j + e] of a lane (g, c): row 16 rt + 8 j + g of `tile`, row m0 + 8 n + 2 c + e of x. The warps split the rank.
// Called while the first copies of the weight are under way, so that its own reads hide behind them.
template <int NB>
__device__ __forceinline__ void add_low_rank(float (&y)[2][NB][4], const LowRank& bank, int64_t out_features, int64_t tile, int64_t m0,
                                             int64_t padded_m, int warp, int warps, int g, int c) {
  const Dtype dtype = static_cast<Dtype>(bank.dtype);
#pragma unroll 2
  for (int64_t r = warp; r < bank.rank; r += warps) {
    float u[2][2];
#pragma unroll
    for (int rt = 0; rt < 2; ++rt)
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const int row = 16 * rt + 8 * j + g;
        u[rt][j] = tile * kTileRows + row < out_features ? load(bank.up, tile * bank.up_tile + row * bank.up_row + r * bank.up_rank, dtype) : 0;
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

}  // namespace calora::cuda
