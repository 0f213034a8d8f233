// Decode (M <= kDecodeRows) of sparse patterns. int8 activations meet the kept weights as they stream by, in a way that is
// each pattern's own (decode_24.h); exact activations meet expanded ones, 128 columns of a tile at a time in L1.
//
// Kernels come for 1, 2, 4 and 8 rows of x; 3 and 5 to 7 take the next one, whose last rows are computed and thrown away:
// the workspace always has kDecodeRows rows.
#pragma once
#include "decode.h"
#include "decode_24.h"
#include "gemm_decode.h"

namespace calora {
namespace {

// The end of a tile, of the rows that exist.
template <class V, int M>
void finish_rows(const LinearArgs& a, int64_t tile, typename V::F (&y)[M][V::kTileRegs]) {
  if (a.m == M) return finish_tile<V, M>(a, 0, tile, y);
  for (int64_t m = 0; m < a.m; ++m) {
    typename V::F row[1][V::kTileRegs];
    for (int i = 0; i < V::kTileRegs; ++i) row[0][i] = y[m][i];
    finish_tile<V, 1>(a, m, tile, row);
  }
}

// Tiles take turns, as those of dense weights do and for the same reason (decode.h).
template <class V, int M, class Path>
void stream_turns(const LinearArgs& a, int64_t tile_begin, int64_t tile_end) {
  constexpr int G = group_regs<V, M>(), R = V::kTileRegs;
  const Geometry& g = a.w.g;
  const int64_t groups = (tile_end - tile_begin + kStreams - 1) / kStreams;
  for (int64_t group = 0, tile = tile_begin; group < groups; ++group) {
    const int64_t tiles = (tile_end - tile + groups - group - 1) / (groups - group);  // even shares: no lone last stream
    const uint8_t* p = a.w.packed + tile * g.tile_bytes;
    typename V::F y[kStreams][M][R];
    for (int64_t i = 0; i < tiles; ++i) clear(y[i], V::zero());
    for (int64_t block = 0; block < g.blocks; ++block, p += g.block_bytes) {
      typename Path::Sums sums[kStreams];
      for (int64_t i = 0; i < tiles; ++i) sums[i].clear();
      for (int64_t c = 0; c < g.block_columns; c += kTurnColumns)
        for (int64_t i = 0; i < tiles; ++i) {
          const uint8_t* turn = p + i * g.tile_bytes + c / kTurnColumns * Path::kTurnBytes;
#pragma GCC unroll 18
          for (int64_t b = 0; b < Path::kTurnBytes; b += 64) _mm_prefetch(reinterpret_cast<const char*>(turn + kAhead + b), _MM_HINT_T1);
#pragma GCC unroll 4
          for (int first = 0; first < R; first += G) Path::template multiply<G>(a, turn, block * g.block_columns + c, first, sums[i]);
        }
      for (int64_t i = 0; i < tiles; ++i) Path::end_block(a, block, p + i * g.tile_bytes, sums[i], y[i]);
    }
    for (int64_t i = 0; i < tiles; ++i) finish_rows<V, M>(a, tile + i, y[i]);
    tile += tiles;
  }
}

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
  typename V::F y[M][R];
  for (int m = 0; m < M; ++m)
    for (int i = 0; i < R; ++i) y[m][i] = V::load(sums + m * kTileRows + i * L);
  finish_rows<V, M>(a, tile, y);
}

template <class V, int M>
void decode_sparse_rows(const LinearArgs& a, int64_t begin, int64_t end) {
  if (a.activations == Activations::int8) {
    if (a.w.values == Values::int4) return stream_turns<V, M, TwoFourPath<V, M, Values::int4>>(a, begin, end);
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
