// Decode (M <= kDecodeRows) of sparse patterns. int8 activations meet the kept weights as they stream by, in a way that is
// each pattern's own (decode_24.h, decode_bitmask.h); exact activations meet expanded ones, 128 columns of a tile at a time in L1.
//
// Kernels come for 1, 2, 4 and 8 rows of x; 3 and 5 to 7 take the next one, whose last rows are computed and thrown away:
// the workspace always has kDecodeRows rows.
#pragma once
#include "decode_24.h"
#include "decode_bitmask.h"
#include "gemm_decode.h"

namespace calora {
namespace {

// One tile by M rows of fp32 x.
template <class V, int M>
void exact_tile(const LinearArgs& a, int64_t tile) {
  constexpr int R = V::kTileRegs, L = V::kLanes, S = R == 2 || M <= 4 ? M : M / 2;  // rows whose sums fit the registers
  const Geometry& g = a.w.g;
  alignas(64) float panel[kChunkColumns * kTileRows], sums[M * kTileRows] = {};
  for (int64_t b = 0; b < g.blocks; ++b)
    for (int64_t k = 0; k < g.block_columns; k += kChunkColumns) {
      const int64_t columns = g.block_columns - k < kChunkColumns ? g.block_columns - k : kChunkColumns;
      const Block w = block_of<V>(a.w, tile, b, k, columns);
      decode_fp32<V>(a.w.values, w, 0, columns, panel);
      const float* x = a.xf + b * g.block_columns + k;
      for (int n = 0; n < kTileRows; n += 2 * L)
        for (int m = 0; m < M; m += S)
          float_pair<V, false, S>(panel + n, w.scale + n, columns, x + m * g.columns, 1, g.columns, sums + m * kTileRows + n);
    }
  finish_rows<V, M>(a, tile, sums);
}

// One tile of nf4 by M rows of int8 x: expanded, and multiplied as prefill does. Correct and slow.
template <class V, int M>
void nf4_tile(const LinearArgs& a, int64_t tile) {
  const Geometry& g = a.w.g;
  alignas(64) float sums[M * kTileRows] = {};
  for (int64_t b = 0; b < g.blocks; ++b) {
    const Block w = block_of<V>(a.w, tile, b);
    for (int64_t m = 0; m < a.m; ++m)
      for (int reg = 0; reg < V::kTileRegs; reg += 2)
        int_pair<V, Values::nf4, false, 1, 1>(w, reg, a.xq + m * g.columns + b * g.block_columns, a.x_scale + m * g.blocks + b,
                                              a.x_sum + m * g.blocks + b, sums + m * kTileRows);
  }
  finish_rows<V, M>(a, tile, sums);
}

template <class V, int M>
void decode_sparse_rows(const LinearArgs& a, int64_t begin, int64_t end) {
  const bool int4 = a.w.values == Values::int4;
  if (a.activations == Activations::int8 && a.w.values == Values::nf4) {
    for (int64_t tile = begin; tile < end; ++tile) nf4_tile<V, M>(a, tile);
    return;
  }
  if (a.activations == Activations::int8) {
    if (a.w.pattern == Pattern::bitmask && int4) return stream_chunks<V, M, Values::int4>(a, begin, end);
    if (a.w.pattern == Pattern::bitmask) return stream_chunks<V, M, Values::int8>(a, begin, end);
    if (int4) return stream_turns<V, M, TwoFourPath<V, M, Values::int4>>(a, begin, end);
    return stream_turns<V, M, TwoFourPath<V, M, Values::int8>>(a, begin, end);
  }
  for (int64_t tile = begin; tile < end; ++tile) exact_tile<V, M>(a, tile);
}

template <class V>
void decode_sparse(const LinearArgs& a, int64_t begin, int64_t end) {
  if (a.m == 1) return decode_sparse_rows<V, 1>(a, begin, end);
  if (a.m == 2) return decode_sparse_rows<V, 2>(a, begin, end);
  if (a.m <= 4) return decode_sparse_rows<V, 4>(a, begin, end);
  return decode_sparse_rows<V, 8>(a, begin, end);
}

}  // namespace
}  // namespace calora
