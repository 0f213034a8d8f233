// Unstructured weights with int8 activations, decode: what is kept is put at its place in a register, by a bit of mask each,
// and multiplied there; what is not kept is the middle code, as in a dense weight, and leaves with the zero point.
//
// Floor per 64 weights (16 rows, 4 columns), beside 8 bytes of mask and the kept codes:
//   mask to a mask register 1, popcount 1, address 1, load 1, nibbles 1.5, expand 2, a copy of the middle 1, product 1 per row
//   of x: 9.5 micro-operations for 25 bytes at 50 % int4. At 6 a cycle 16 bytes a cycle; one expand every 2 cycles allows 12.
//
// Rungs without vpexpandb expand a block by table (expand_avx2.cpp) and multiply it as prefill does: correct and slow.
#pragma once
#include "expand_vbmi2.h"
#include "gemm_decode.h"
#include "sparse_tile.h"

namespace calora {
namespace {

constexpr int64_t kMaskStreams = 4;  // tiles that take turns: each is two streams, bits and codes

#ifdef __AVX512VBMI2__

// One chunk of a tile: sums of (unsigned code) * xq.
template <class V, int M, Values values>
__attribute__((always_inline)) inline void multiply_chunk(const LinearArgs& a, const uint8_t* mask, const uint8_t* from, int64_t k,
                                                          typename V::I (&sum)[M][V::kTileRegs]) {
  using I = typename V::I;
  const I middle = V::iset1_8(static_cast<char>(values == Values::int8 ? kInt8Zero : kInt4Zero));
  const uint8_t* odd = from;
  auto step = [&](const uint8_t* bits, const uint8_t*& codes, auto next, int64_t column) __attribute__((always_inline)) {
    const I w0 = next(load_bits(bits), codes, middle), w1 = next(load_bits(bits + 8), codes, middle);
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
      const I x = broadcast4<V>(a.xq + m * a.w.g.columns + k + column);
      sum[m][0] = V::dot(sum[m][0], w0, x);
      sum[m][1] = V::dot(sum[m][1], w1, x);
    }
  };
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i, mask += 32) {
    touch(from);
    if constexpr (values == Values::int8) {
      touch(from + 64);
      step(mask, from, next_bytes, 8 * i);
      step(mask + 16, from, next_bytes, 8 * i + 4);
    } else {
      step(mask, from, next_nibbles<false>, 8 * i);
      step(mask + 16, odd, next_nibbles<true>, 8 * i + 4);
    }
  }
}

// The middle code times the sum of x leaves, as a zero point does; then the scales.
template <class V, int M, Values values>
void end_chunks(const LinearArgs& a, int64_t block, const uint8_t* p, const typename V::I (&sum)[M][V::kTileRegs], TileSums<V, M>& y) {
  const int64_t blocks = a.w.g.blocks;
  for (int i = 0; i < V::kTileRegs; ++i) {
    const auto scale = V::load_fp16(p + a.w.g.block_bytes - kScaleBytes + 2 * i * V::kLanes);
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
      const int offset = (values == Values::int8 ? kInt8Zero : kInt4Zero) * a.x_sum[m * blocks + block];
      y[m][i] = V::fma(V::to_float(V::isub(sum[m][i], V::iset1(offset))), V::mul(scale, V::set1(a.x_scale[m * blocks + block])), y[m][i]);
    }
  }
}

template <class V, int M, Values values>
void stream_chunks(const LinearArgs& a, int64_t tile_begin, int64_t tile_end) {
  constexpr int R = V::kTileRegs;
  const Geometry& g = a.w.g;
  const int64_t block_chunks = g.block_columns / kTurnColumns, groups = (tile_end - tile_begin + kMaskStreams - 1) / kMaskStreams;
  for (int64_t group = 0, tile = tile_begin; group < groups; ++group) {
    const int64_t tiles = (tile_end - tile + groups - group - 1) / (groups - group);
    const uint8_t* p = a.w.packed + tile * g.tile_bytes;
    TileSums<V, M> y[kMaskStreams];
    for (int64_t i = 0; i < tiles; ++i) zero_sums<V, M>(y[i]);
    for (int64_t block = 0; block < g.blocks; ++block, p += g.block_bytes) {
      typename V::I sum[kMaskStreams][M][R];
      for (int64_t i = 0; i < tiles; ++i)
        for (auto& row : sum[i])
          for (auto& v : row) v = V::izero();
      for (int64_t c = 0; c < block_chunks; ++c)
        for (int64_t i = 0; i < tiles; ++i) {
          const int64_t chunk = block * block_chunks + c, k = chunk * kTurnColumns;
          const uint8_t* mask = p + i * g.tile_bytes + c * kMaskBytes;
          touch(mask), touch(mask + 64);
          multiply_chunk<V, M, values>(a, mask, a.w.chunk(tile + i, chunk), k, sum[i]);
        }
      for (int64_t i = 0; i < tiles; ++i) end_chunks<V, M, values>(a, block, p + i * g.tile_bytes, sum[i], y[i]);
    }
    for (int64_t i = 0; i < tiles; ++i) finish_rows<V, M>(a, tile + i, y[i]);
    tile += tiles;
  }
}

#else

template <class V, int M, Values values>
void stream_chunks(const LinearArgs& a, int64_t tile_begin, int64_t tile_end) {
  const Geometry& g = a.w.g;
  for (int64_t tile = tile_begin; tile < tile_end; ++tile) {
    alignas(64) float sums[M * kTileRows] = {};
    for (int64_t b = 0; b < g.blocks; ++b) {
      const Block w = block_of<V>(a.w, tile, b);
      for (int64_t m = 0; m < a.m; ++m)
        for (int reg = 0; reg < V::kTileRegs; reg += 2)
          int_pair<V, values, false, 1, 1>(w, reg, a.xq + m * g.columns + b * g.block_columns, a.x_scale + m * g.blocks + b,
                                           a.x_sum + m * g.blocks + b, sums + m * kTileRows);
    }
    finish_rows<V, M>(a, tile, sums);
  }
}

#endif

}  // namespace
}  // namespace calora
