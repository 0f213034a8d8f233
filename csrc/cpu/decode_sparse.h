// Decode (of up to kDecodeRows rows at a time; rung.h says of how many) of sparse patterns. int8 activations meet the kept weights as
// they stream by, in a way that is each pattern's own (decode_24.h, decode_bitmask.h), and so does bf16 x bf16 weights where there is
// vdpbf16ps (decode_sparse_bf16.h); other exact activations meet expanded weights, 128 columns of a tile at a time in L1.
//
//   Path::kTiles runs of tiles, as dense weights have them (decode.h) -> blocks -> visits of Path::kVisit turns of 32 columns, a
//   tile of each run in turn
//
// A path multiplies a visit to one tile and ends a block. Lines are loaded in the order of their addresses: the processor's own
// prefetching follows that order, and what decides the speed from memory is how well it does (a factor of 2; NOTES.md).
//
// Kernels come for 1, 2, 4 and, where so many are decoded, 8 rows of x; 3 and 5 to 7 take the next one, whose last rows are computed
// and thrown away: the workspace always has a multiple of kDecodeRows rows.
#pragma once
#include "decode_24.h"
#include "decode_bitmask.h"
#include "decode_sparse_bf16.h"
#include "gemm_decode.h"

namespace calora {
namespace {

template <class V, int M, class Path>
void stream_turns(const LinearArgs& a, int64_t tile_begin, int64_t tile_end) {
  const Weight w = a.w;  // a copy: nothing that is stored here can change it
  const Geometry& g = w.g;
  const int64_t block_turns = g.block_columns / kTurnColumns, turn_bytes = code_bytes(w.pattern, w.values, kTurnColumns);
  const Runs runs(tile_begin, tile_end, Path::kTiles);
  for (int64_t round = 0; round < runs.rounds(); ++round) {
    const int64_t live = runs.live(round);
    int64_t tile[Path::kTiles];
    const uint8_t* packed[Path::kTiles];
    typename V::F y[Path::kTiles][M][V::kTileRegs];
    for (int64_t i = 0; i < live; ++i) tile[i] = runs.tile(i, round), packed[i] = w.packed + tile[i] * g.tile_bytes, clear(y[i], V::zero());
    for (int64_t block = 0; block < g.blocks; ++block) {
      const int64_t at = block * g.block_bytes;
      typename Path::Sums sums[Path::kTiles];
      for (int64_t i = 0; i < live; ++i) sums[i].clear();
      for (int64_t t = 0; t < block_turns; t += Path::kVisit) {
        const int64_t turns = block_turns - t < Path::kVisit ? block_turns - t : Path::kVisit, turn = block * block_turns + t;
        for (int64_t i = 0; i < live; ++i)
          Path::multiply(w, tile[i], turn, turns, packed[i] + at + t * turn_bytes, Path::x(a) + turn * kTurnColumns, g.columns, sums[i]);
      }
      for (int64_t i = 0; i < live; ++i) Path::end_block(a, block, packed[i] + at, sums[i], y[i]);
    }
    for (int64_t i = 0; i < live; ++i) finish_tile<V, M>(a, tile[i], y[i]);
  }
}

template <class V, int M>
void add_sums(const float (&sums)[M * kTileRows], typename V::F (&y)[M][V::kTileRegs]) {
  for (int m = 0; m < M; ++m)
    for (int i = 0; i < V::kTileRegs; ++i) y[m][i] = V::load(sums + m * kTileRows + i * V::kLanes);
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
  add_sums<V, M>(sums, y);
  finish_tile<V, M>(a, tile, y);
}

// One tile, expanded as for prefill and multiplied as prefill does: nf4, and unstructured or paired weights without vpexpandb (by table,
// expand_avx2.cpp). Correct and slow: layers run such weights expanded once (ops.runs_as).
template <class V, int M, Values values>
void expanded_tile(const LinearArgs& a, int64_t tile) {
  const Geometry& g = a.w.g;
  alignas(64) float sums[M * kTileRows] = {};
  for (int64_t b = 0; b < g.blocks; ++b) {
    const Block w = block_of<V>(a.w, tile, b);
    for (int64_t m = 0; m < a.m; ++m) {
      const float unit = a.x_scale[m * g.blocks + b] * unit_of(values);
      const int32_t from = sum_start<V>(values, false, a.x_sum[m * g.blocks + b]);
      for (int reg = 0; reg < V::kTileRegs; reg += 2)
        int_pair<V, values, false, 1, 1>(w, 0, w.columns, w.codes, reg, a.xq + m * g.columns + b * g.block_columns, &unit, &from, nullptr, sums + m * kTileRows);
    }
  }
  typename V::F y[M][V::kTileRegs];
  add_sums<V, M>(sums, y);
  finish_tile<V, M>(a, tile, y);
}

template <class V, int M, Values values>
void decode_sparse_values(const LinearArgs& a, int64_t begin, int64_t end) {
  if (a.w.pattern == Pattern::two_four) {
    if constexpr (M <= most_two_four_rows<V>(values)) return stream_turns<V, M, TwoFourPath<V, M, values>>(a, begin, end);
  }
#ifdef __AVX512VBMI2__
  if constexpr (M <= kKeptRows) {
    if constexpr (values == Values::int4)
      if (a.w.pattern == Pattern::paired) return stream_turns<V, M, PairPath<V, M>>(a, begin, end);
    stream_turns<V, M, MaskPath<V, M, values>>(a, begin, end);
  }
#else
  for (int64_t tile = begin; tile < end; ++tile) expanded_tile<V, M, values>(a, tile);
#endif
}

template <class V, int M>
void decode_sparse_rows(const LinearArgs& a, int64_t begin, int64_t end) {
  if (a.activations == Activations::int8 && a.w.values == Values::nf4) {
    for (int64_t tile = begin; tile < end; ++tile) expanded_tile<V, M, Values::nf4>(a, tile);
    return;
  }
  if (a.activations == Activations::int8) {
    if (a.w.values == Values::int4) return decode_sparse_values<V, M, Values::int4>(a, begin, end);
    return decode_sparse_values<V, M, Values::int8>(a, begin, end);
  }
#if defined(__AVX512VBMI2__) && defined(__AVX512BF16__)
  if (uses_bf16_dot<V>(a)) {
    if (a.w.pattern == Pattern::two_four) return stream_turns<V, M, TwoFourBf16Path<V, M>>(a, begin, end);
    return stream_turns<V, M, MaskBf16Path<V, M>>(a, begin, end);
  }
#endif
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
