// Unstructured weights with int8 activations, decode: what is kept is put at its place in a register, by a bit of mask each,
// and multiplied there; what is not kept is the middle code, as in a dense weight, and leaves with the zero point.
//
// Floor per 64 weights (16 rows, 4 columns), beside 8 bytes of mask and the kept codes:
//   the mask into a mask register, popcount, address, load, nibbles 1.5, a copy of the middle, expand, product per row of x.
//   On Zen 4, measured: mask 1.0 cycle, expand 1.5 and product 1.0 share two execution units and add up to 3.3, whatever the
//   density; all the rest goes beside them (together 3.35). vptestmb or vpshufbitqmb instead of kmovq cost the same, a product
//   of expanded x by dense codes (vpcompressb) too. At 3.65 GHz that is 71 G weights a second and thread, where dense int4
//   reads 52: no layout with one bit and one vpexpandb per 64 weights is more than 1.36 x as fast, at any density. The loop takes 3.7
//   in L2 (0.2 of them end the blocks).
//
// Rungs without vpexpandb expand a block by table (expand_avx2.cpp) and multiply it as prefill does: correct and slow.
#pragma once
#include "expand_vbmi2.h"
#include "sparse_tile.h"

namespace calora {
namespace {

constexpr int64_t kKeptRows = 4;  // of x: more are faster as panels (gemm_kept.h)

#ifdef __AVX512VBMI2__

template <class V, int M, Values values>
struct MaskPath {
  using I = typename V::I;
  static constexpr int R = V::kTileRegs;

  // Tiles side by side, each two streams, and turns of a tile before the next has its turn. More streams than the processor's
  // own prefetching follows cost a third of the speed; software prefetches gain 3 % at 50 % int8, and lose up to 15 % at 70 %,
  // where arithmetic does not take longer than memory.
  static constexpr int64_t kTiles = M < 4 ? 2 : 1, kVisit = 4, kFar = M < 4 ? 0 : 4096;  // bytes ahead
  static constexpr int kChains = 2;  // of sums: one would wait for the latency of vpdpbusd

  struct Sums {  // of (unsigned code) * xq
    I products[kChains][M][R];
    __attribute__((always_inline)) void clear() {
#pragma GCC unroll 2
      for (int c = 0; c < kChains; ++c) calora::clear(products[c], V::izero());
    }
  };

  static const int8_t* x(const LinearArgs& a) { return a.xq; }
  __attribute__((always_inline)) static void ask(const uint8_t* p) { kFar ? prefetch(p + kFar) : void(); }

  // `turns` chunks of one tile. x: its first row at the first chunk's first column.
  __attribute__((always_inline)) static void multiply(const Weight& w, int64_t tile, int64_t chunk, int64_t turns, const uint8_t* mask, const int8_t* x,
                                                      int64_t row, Sums& sums) {
    const I middle = V::iset1_8(static_cast<char>(values == Values::int8 ? kInt8Zero : kInt4Zero));
    I sum[kChains][M][R];
    copy<kChains, M, R>(sums.products, 0, sum, 0);
    for (int64_t t = 0; t < turns; ++t, mask += kMaskBytes, x += kTurnColumns) {
      const uint8_t *from = w.chunk(tile, chunk + t), *odd = from;
      keep_pointer(x), keep_pointer(mask), ask(mask), ask(mask + kLine);
#pragma GCC unroll 8
      for (int s = 0; s < 8; ++s) {
        const uint8_t* bits = mask + 16 * s;
        ask(s % 2 ? odd : from);
        if constexpr (values == Values::int8) ask(from + kLine);
        I codes[R];
#pragma GCC unroll 2
        for (int i = 0; i < R; ++i) {
          if constexpr (values == Values::int8) codes[i] = next_bytes(load_bits(bits + 8 * i), from, middle);
          else if (s % 2) codes[i] = next_nibbles<true>(load_bits(bits + 8 * i), odd, middle);
          else codes[i] = next_nibbles<false>(load_bits(bits + 8 * i), from, middle);
        }
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m) {
          const I four = V::iset1(load32(x + m * row + 4 * s));
#pragma GCC unroll 2
          for (int i = 0; i < R; ++i) sum[s % kChains][m][i] = V::dot(sum[s % kChains][m][i], codes[i], four);
        }
      }
    }
    copy<kChains, M, R>(sum, 0, sums.products, 0);
  }

  // The middle code times the sum of x leaves, as a zero point does; then the scales.
  __attribute__((always_inline)) static void end_block(const LinearArgs& a, int64_t block, const uint8_t* p, const Sums& sums, typename V::F (&y)[M][R]) {
    const int64_t blocks = a.w.g.blocks;
#pragma GCC unroll 2
    for (int i = 0; i < R; ++i) {
      const auto scale = block_scale<V>(a.w, p, i);
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m) {
        const int offset = (values == Values::int8 ? kInt8Zero : kInt4Zero) * a.x_sum[m * blocks + block];
        const I all = V::iadd(sums.products[0][m][i], sums.products[1][m][i]);
        y[m][i] = V::fma(V::to_float(V::isub(all, V::iset1(offset))), V::mul(scale, V::set1(a.x_scale[m * blocks + block])), y[m][i]);
      }
    }
  }
};

// The same in pairs of rows (layouts.h). Per 128 weights, beside 8 bytes of mask: the mask into a mask register, popcount, address,
// load, a copy of the middle, expand, one `and`, and two products per row of x.
//
// No nibble is shifted to its place: with codes l and h a byte is l + 16 h, so that whole bytes give sum(l x) + 16 sum(h x), and
// bytes without their low nibble give 16 sum(h x). What is left of both once the middle is out fits 32 bits for any row that the
// op accepts (16 * 8 * 127 * 131072 < 2^31); before, sums may wrap.
template <class V, int M>
struct PairPath {
  using I = typename V::I;
  static constexpr int R = V::kTileRegs;
  static constexpr int64_t kTiles = M == 1 ? 2 : 1, kVisit = 4, kFar = M == 1 ? 0 : 8192;  // bytes ahead, where arithmetic takes as long as memory
  static constexpr int kChains = 2;
  static_assert(R == 2, "a register of rows 0..15, one of rows 16..31");

  struct Sums {  // of whole bytes, and of high nibbles times 16
    I products[kChains][M][R];
    __attribute__((always_inline)) void clear() {
#pragma GCC unroll 2
      for (int c = 0; c < kChains; ++c) calora::clear(products[c], V::izero());
    }
  };

  static const int8_t* x(const LinearArgs& a) { return a.xq; }
  __attribute__((always_inline)) static void ask(const uint8_t* p) { kFar ? prefetch(p + kFar) : void(); }

  __attribute__((always_inline)) static void multiply(const Weight& w, int64_t tile, int64_t chunk, int64_t turns, const uint8_t* mask, const int8_t* x,
                                                      int64_t row, Sums& sums) {
    const I high = V::iset1_8(static_cast<char>(0xf0)), middle = V::iset1_8(static_cast<char>(0x11 * kInt4Zero));
    I sum[kChains][M][R];
    copy<kChains, M, R>(sums.products, 0, sum, 0);
    for (int64_t t = 0; t < turns; ++t, mask += kPairMaskBytes, x += kTurnColumns) {
      const uint8_t* from = w.chunk(tile, chunk + t);
      keep_pointer(x), keep_pointer(mask), ask(mask);
#pragma GCC unroll 8
      for (int s = 0; s < 8; ++s) {
        const uint64_t bits = load_bits(mask + 8 * s);
        I pairs = V::iload(from);
        keep_loaded(pairs), ask(from);
        pairs = _mm512_mask_expand_epi8(middle, bits, pairs), from += __builtin_popcountll(bits);
        const I upper = V::iand(pairs, high);
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m) {
          const I four = V::iset1(load32(x + m * row + 4 * s));
          I(&to)[R] = sum[s % kChains][m];
          to[0] = V::dot(to[0], pairs, four), to[1] = V::dot(to[1], upper, four);
        }
      }
    }
    copy<kChains, M, R>(sum, 0, sums.products, 0);
  }

  __attribute__((always_inline)) static void end_block(const LinearArgs& a, int64_t block, const uint8_t* p, const Sums& sums, typename V::F (&y)[M][R]) {
    const int64_t blocks = a.w.g.blocks;
    const auto first = block_scale<V>(a.w, p, 0), last = V::mul(block_scale<V>(a.w, p, 1), V::set1(1.0f / 16));
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
      const I both = V::iadd(sums.products[0][m][0], sums.products[1][m][0]), upper = V::iadd(sums.products[0][m][1], sums.products[1][m][1]);
      const int offset = kInt4Zero * a.x_sum[m * blocks + block];
      const auto x_scale = V::set1(a.x_scale[m * blocks + block]);
      y[m][0] = V::fma(V::to_float(V::isub(V::isub(both, upper), V::iset1(offset))), V::mul(first, x_scale), y[m][0]);
      y[m][1] = V::fma(V::to_float(V::isub(upper, V::iset1(16 * offset))), V::mul(last, x_scale), y[m][1]);
    }
  }
};

#endif

}  // namespace
}  // namespace calora
