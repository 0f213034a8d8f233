// Unstructured weights with int8 activations, decode: what is kept is put at its place in a register, by a bit of mask each,
// and multiplied there; what is not kept is the middle code, as in a dense weight, and leaves with the zero point.
//
// Floor per 64 weights (16 rows, 4 columns), beside 8 bytes of mask and the kept codes:
//   the mask into a mask register, popcount, address, load, nibbles 1.5, a copy of the middle, expand, product per row of x.
//   On Zen 4, measured one by one: mask 1.0 cycle, expand 1.4 and product 1.0 share their execution units, so that 3.4 cycles
//   a 64 weights is the floor whatever the density; the loads (1.5, misaligned) and the rest go beside it. At 3.7 GHz that is
//   70 G weights a second and thread: 28 GB/s of a 50 % int4 file, 21 GB/s at 70 %. It is compute that binds there; the loop
//   below takes 3.8 cycles in L2.
//
// Rungs without vpexpandb expand a block by table (expand_avx2.cpp) and multiply it as prefill does: correct and slow.
#pragma once
#include "expand_vbmi2.h"
#include "gemm_decode.h"
#include "sparse_tile.h"

namespace calora {
namespace {

constexpr int64_t kMaskStreams = 2;  // tiles that take turns: each is two streams, bits and codes

#ifdef __AVX512VBMI2__

template <int M>
constexpr int chains() { return M <= 4 ? 2 : 1; }  // of sums: one would wait for the latency of vpdpbusd
template <class V, int M>
using ChunkSums = typename V::I[chains<M>()][M][V::kTileRegs];

// One chunk of a tile: sums of (unsigned code) * xq. x: its first row at the chunk's first column.
template <class V, int M, Values values>
__attribute__((always_inline)) inline void multiply_chunk(const int8_t* x, int64_t row, const uint8_t* mask, const uint8_t* from,
                                                          ChunkSums<V, M>& sum) {
  using I = typename V::I;
  constexpr int kChains = chains<M>();
  const I middle = V::iset1_8(static_cast<char>(values == Values::int8 ? kInt8Zero : kInt4Zero));
  const uint8_t* odd = from;
  keep_pointer(x), keep_pointer(mask);
#pragma GCC unroll 8
  for (int s = 0; s < 8; ++s) {
    const uint8_t* bits = mask + 16 * s;
    I w[2];
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      if constexpr (values == Values::int8) w[half] = next_bytes(load_bits(bits + 8 * half), from, middle);
      else if (s % 2) w[half] = next_nibbles<true>(load_bits(bits + 8 * half), odd, middle);
      else w[half] = next_nibbles<false>(load_bits(bits + 8 * half), from, middle);
    }
    if (values == Values::int8 || s % 2 == 0) touch(from);
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
      const I four = broadcast4<V>(x + m * row + 4 * s);
#pragma GCC unroll 2
      for (int half = 0; half < 2; ++half) sum[s % kChains][m][half] = V::dot(sum[s % kChains][m][half], w[half], four);
    }
  }
}

// The middle code times the sum of x leaves, as a zero point does; then the scales.
template <class V, int M, Values values>
__attribute__((always_inline)) inline void end_chunks(const LinearArgs& a, int64_t block, const uint8_t* p, const ChunkSums<V, M>& sum,
                                                      TileSums<V, M>& y) {
  const int64_t blocks = a.w.g.blocks;
#pragma GCC unroll 2
  for (int i = 0; i < V::kTileRegs; ++i) {
    const auto scale = V::load_fp16(p + a.w.g.block_bytes - kScaleBytes + 2 * i * V::kLanes);
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
      const int offset = (values == Values::int8 ? kInt8Zero : kInt4Zero) * a.x_sum[m * blocks + block];
      const auto all = chains<M>() == 2 ? V::iadd(sum[0][m][i], sum[chains<M>() - 1][m][i]) : sum[0][m][i];
      y[m][i] = V::fma(V::to_float(V::isub(all, V::iset1(offset))), V::mul(scale, V::set1(a.x_scale[m * blocks + block])), y[m][i]);
    }
  }
}

template <class V, int M, Values values>
void stream_chunks(const LinearArgs& a, int64_t tile_begin, int64_t tile_end) {
  constexpr int R = V::kTileRegs, kChains = chains<M>();
  const Weight w = a.w;  // a copy: nothing that is stored here can change it
  const Geometry& g = w.g;
  const int64_t block_chunks = g.block_columns / kTurnColumns, groups = (tile_end - tile_begin + kMaskStreams - 1) / kMaskStreams;
  for (int64_t group = 0, tile = tile_begin; group < groups; ++group) {
    const int64_t tiles = (tile_end - tile + groups - group - 1) / (groups - group);
    const uint8_t* p = w.packed + tile * g.tile_bytes;
    TileSums<V, M> y[kMaskStreams];
    for (int64_t i = 0; i < tiles; ++i) zero_sums<V, M>(y[i]);
    for (int64_t block = 0; block < g.blocks; ++block, p += g.block_bytes) {
      ChunkSums<V, M> sums[kMaskStreams];  // of blocks longer than a visit
      for (int64_t c = 0; c < block_chunks; c += kVisit) {
        const int64_t chunk = block * block_chunks + c, chunks = block_chunks - c < kVisit ? block_chunks - c : kVisit;
        for (int64_t i = 0; i < tiles; ++i) {
          ChunkSums<V, M> local;  // stays in registers
#pragma GCC unroll 4
          for (int chain = 0; chain < kChains; ++chain)
#pragma GCC unroll 8
            for (int m = 0; m < M; ++m)
#pragma GCC unroll 2
              for (int half = 0; half < R; ++half) local[chain][m][half] = c ? sums[i][chain][m][half] : V::izero();
          const uint8_t* mask = p + i * g.tile_bytes + c * kMaskBytes;
          for (int64_t n = 0; n < chunks; ++n, mask += kMaskBytes) {
            touch(mask), touch(mask + 64);
            multiply_chunk<V, M, values>(a.xq + (chunk + n) * kTurnColumns, g.columns, mask, w.chunk(tile + i, chunk + n), local);
          }
          if (c + chunks == block_chunks) {
            end_chunks<V, M, values>(a, block, p + i * g.tile_bytes, local, y[i]);
          } else {
#pragma GCC unroll 4
            for (int chain = 0; chain < kChains; ++chain)
#pragma GCC unroll 8
              for (int m = 0; m < M; ++m)
#pragma GCC unroll 2
                for (int half = 0; half < R; ++half) sums[i][chain][m][half] = local[chain][m][half];
          }
        }
      }
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
