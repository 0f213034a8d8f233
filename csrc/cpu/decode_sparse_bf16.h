// Sparse bf16 weights by bf16 x, decode, with vdpbf16ps: for rungs that have it and vpexpandw.
//
// Floor per 32 weights (16 rows, 2 columns) of an unstructured one: mask 0.5 cycle, vpexpandw 1.3, product per row of x 1.0, on
// shared execution units of Zen 4: 2.9 cycles measured, while 9.1 bits a weight take 4.9 cycles from memory at 27 GB/s (5.8 bits
// at 70 %: 3.1). Of a 2:4 one, per 64 weights (16 rows, 4 columns): shift, vpermw and product per row of x, for 72 bytes.
#pragma once
#include "expand_vbmi2.h"
#include "sparse_tile.h"

namespace calora {
namespace {

#if defined(__AVX512VBMI2__) && defined(__AVX512BF16__)

template <class V, int M>
struct SparseBf16Path {
  using F = typename V::F;
  static constexpr int R = V::kTileRegs;
  static constexpr int kChains = M <= 4 ? 2 : 1;  // of sums: one would wait for the latency of vdpbf16ps

  struct Sums {
    F products[kChains][M][R];
    __attribute__((always_inline)) void clear() {
#pragma GCC unroll 2
      for (int c = 0; c < kChains; ++c) calora::clear(products[c], V::zero());
    }
  };

  static const uint16_t* x(const LinearArgs& a) { return a.xb; }

  __attribute__((always_inline)) static void end_block(const LinearArgs&, int64_t, const uint8_t*, const Sums& sums, F (&y)[M][R]) {
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 2
      for (int i = 0; i < R; ++i) {
        y[m][i] = V::add(y[m][i], sums.products[0][m][i]);
        if constexpr (kChains == 2) y[m][i] = V::add(y[m][i], sums.products[1][m][i]);
      }
  }
};

template <class V, int M>
struct MaskBf16Path : SparseBf16Path<V, M> {
  using Base = SparseBf16Path<V, M>;
  using Base::kChains, Base::R;
  // Several rows of x: one tile, far ahead. 32 weights keep up to a line, so that a line is asked for with every 32; with every 64
  // it leaves lines out where more than half is kept.
  static constexpr bool kFar = M > 1;
  static constexpr int64_t kTiles = kFar ? 1 : 2, kVisit = kFar ? 4 : 2, kChunkAhead = kFar ? 8192 : kAhead;

  __attribute__((always_inline)) static void multiply(const Weight& w, int64_t tile, int64_t chunk, int64_t turns, const uint8_t* mask,
                                                      const uint16_t* x, int64_t row, typename Base::Sums& sums) {
    const auto nothing = kept_zero();
    typename V::F sum[kChains][M][R];
    copy<kChains, M, R>(sums.products, 0, sum, 0);
    for (int64_t t = 0; t < turns; ++t, mask += kMaskBytes, x += kTurnColumns) {
      const uint8_t* from = w.chunk(tile, chunk + t);
      prefetch(mask + kChunkAhead), prefetch(mask + kChunkAhead + kLine);
      keep_pointer(x), keep_pointer(mask);
#pragma GCC unroll 16
      for (int s = 0; s < 16; ++s) {
        typename V::I codes[R];
#pragma GCC unroll 2
        for (int i = 0; i < R; ++i) {
          const auto bits = static_cast<__mmask32>(load32(mask + 8 * s + 4 * i));
          codes[i] = _mm512_mask_expand_epi16(nothing, bits, V::iload(from));
          from += 2 * __builtin_popcount(bits);
          if (kFar || i == R - 1) prefetch(from + kChunkAhead);
        }
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m) {
          const auto two = V::iset1(load32(x + m * row + 2 * s));
#pragma GCC unroll 2
          for (int i = 0; i < R; ++i) sum[s % kChains][m][i] = V::dot_bf16(sum[s % kChains][m][i], codes[i], two);
        }
      }
    }
    copy<kChains, M, R>(sum, 0, sums.products, 0);
  }
};

template <class V, int M>
struct TwoFourBf16Path : SparseBf16Path<V, M> {
  using Base = SparseBf16Path<V, M>;
  using Base::kChains, Base::R;
  // More tiles side by side are slower, by more the more rows of x: four times at M = 8 (benchmarks/NOTES.md).
  static constexpr int64_t kTiles = M == 1 ? 2 : 1, kVisit = M == 1 ? 1 : 4, kTurnAhead = M == 1 ? kAhead : 4096, kTurnBytes = turn_bytes(Values::bf16);
  static constexpr int kGroups = kTurnColumns / 4;  // of four columns, a line each

  __attribute__((always_inline)) static void multiply(const Weight&, int64_t, int64_t, int64_t turns, const uint8_t* p, const uint16_t* x, int64_t row,
                                                      typename Base::Sums& sums) {
    using I = typename V::I;
    typename V::F sum[kChains][M][R];
    copy<kChains, M, R>(sums.products, 0, sum, 0);
    // Bytes 0 and 1, or 2 and 3, of every 32-bit lane in the low halves of its 16-bit lanes: places of even and of odd groups.
    const I to_even = _mm512_broadcast_i32x4(_mm_setr_epi32(0x80018000, 0x80058004, 0x80098008, 0x800d800c));
    const I to_odd = _mm512_broadcast_i32x4(_mm_setr_epi32(0x80038002, 0x80078006, 0x800b800a, 0x800f800e));
    for (int64_t t = 0; t < turns; ++t, p += kTurnBytes, x += kTurnColumns) {
      keep_pointer(x), keep_pointer(p);
#pragma GCC unroll 18
      for (int64_t b = 0; b < kTurnBytes; b += kLine) prefetch(p + b + kTurnAhead);
      I places[2][R];
#pragma GCC unroll 2
      for (int i = 0; i < R; ++i) {
        const I all = V::iload(p + kGroups * 128 + i * V::kBytes);
        places[0][i] = _mm512_shuffle_epi8(all, to_even), places[1][i] = _mm512_shuffle_epi8(all, to_odd);
      }
#pragma GCC unroll 8
      for (int q = 0; q < kGroups; ++q) {
        I kept[R], at[R];
#pragma GCC unroll 2
        for (int i = 0; i < R; ++i) {
          kept[i] = V::iload(p + 128 * q + i * V::kBytes);
          at[i] = _mm512_srli_epi16(places[q % 2][i], 2 * (q / 2));
        }
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m) {
          int64_t four;
          std::memcpy(&four, x + m * row + 4 * q, sizeof four);
          const I columns = _mm512_set1_epi64(four);  // eight times: what lies above the two bits of a place picks one of equals
#pragma GCC unroll 2
          for (int i = 0; i < R; ++i) sum[q % kChains][m][i] = V::dot_bf16(sum[q % kChains][m][i], kept[i], V::lookup32_16(columns, at[i]));
        }
      }
    }
    copy<kChains, M, R>(sum, 0, sums.products, 0);
  }
};

#endif

}  // namespace
}  // namespace calora
