// 2:4 with int8 activations, decode: the activations are shuffled to the kept weights, nothing is expanded.
//
// Floor per 8 columns of kLanes rows, in vector operations (codes and places are 12 bytes per lane and 32 columns):
//   VNNI:  nibbles 1.5 (shift, and), places 1.75 (shift, and-or), sum of weights 1; per row of x shuffle 1, product 1
//   so 6.25 operations for 50 bytes (int4 g128, 16 lanes, one row of x): at 2 operations a cycle 16 bytes a cycle, more than
//   one core reads from memory. Dense int4 needs 5 operations for the same 128 weights, and 66 bytes. Measured on Zen 4, in L2:
//   32 cycles for 32 columns of a tile, of which these operations alone take 26.
//   Without VNNI: a look-up makes the nibble signed (1), and each product costs a 16-bit sum (1).
//
// x comes as xq + 128 (offset_x): it is the unsigned side, because weights that activations are shuffled to have no sum of x
// in common. What the offset adds, 128 * (sum of the kept weights of a row), leaves at the end of the block.
#pragma once
#include "sparse_tile.h"

namespace calora {
namespace {

// The vector operations that only shuffling needs.
inline __m256i shuffle8(__m256i bytes, __m256i by) { return _mm256_shuffle_epi8(bytes, by); }
inline __m256i and_or(__m256i a, __m256i b, __m256i c) { return _mm256_or_si256(_mm256_and_si256(a, b), c); }
inline __m256i add8(__m256i a, __m256i b) { return _mm256_add_epi8(a, b); }
inline void repeat16(const void* p, __m256i& to) { to = _mm256_broadcastsi128_si256(_mm_load_si128(static_cast<const __m128i*>(p))); }
inline void repeat8(int64_t v, __m256i& to) { to = _mm256_set1_epi64x(v); }
#ifdef __AVX512F__
inline __m512i shuffle8(__m512i bytes, __m512i by) { return _mm512_shuffle_epi8(bytes, by); }
inline __m512i and_or(__m512i a, __m512i b, __m512i c) { return _mm512_ternarylogic_epi32(a, b, c, 0xea); }
inline __m512i add8(__m512i a, __m512i b) { return _mm512_add_epi8(a, b); }
inline void repeat16(const void* p, __m512i& to) { to = _mm512_broadcast_i32x4(_mm_load_si128(static_cast<const __m128i*>(p))); }
inline void repeat8(int64_t v, __m512i& to) { to = _mm512_set1_epi64(v); }
#endif

// xq -> xq + 128, as unsigned bytes.
inline void offset_x(const LinearArgs& a, int64_t row_begin, int64_t row_end) {
  for (int64_t i = row_begin * a.w.g.columns; i < row_end * a.w.g.columns; i += 32)
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(a.xq + i),
                        _mm256_xor_si256(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(a.xq + i)), _mm256_set1_epi8(static_cast<char>(0x80))));
}

alignas(16) constexpr int8_t kSignedNibbles[16] = {0, 1, 2, 3, 4, 5, 6, 7, -8, -7, -6, -5, -4, -3, -2, -1};

// Up to how many rows of x are decoded. More are faster as panels (gemm_24.h), but for int8 without VNNI, whose products are what takes time.
template <class V>
constexpr int64_t most_two_four_rows(Values values) {
  if (values == Values::int4) return 4;
  if (values == Values::nf4) return kDecodeRows;
  return !V::kVnni ? kMaxRows : V::kLanes == 16 ? 64 : 12;
}

template <int n> struct Substep { static constexpr int value = n; };

// What a turn's kept weights are multiplied as.
template <class V, Values values>
struct TwoFourCodes {
  using I = typename V::I;
  static constexpr int kLines = values == Values::int8 ? 4 : 2;  // of 128 bytes in a turn, places apart
  // A nibble in the high half of a byte is 16 times its value: no look-up, where products of 8 bits by 8 do not saturate.
  static constexpr bool kTimes16 = V::kVnni && values == Values::int4;
  static constexpr float kUnit = kTimes16 ? 1.0f / 16 : 1.0f;  // what an integer sum counts

  // Elements 4 i .. 4 i + 3 of every row as signed bytes.
  template <int i>
  static I elements(const I (&lines)[kLines]) {
    if constexpr (values == Values::int8) return lines[i];
    const I line = lines[i / 2 % kLines];
    if constexpr (kTimes16) {
      return V::iand(i % 2 ? line : V::template shl16<4>(line), V::iset1_8(static_cast<char>(0xf0)));
    } else {
      I table;
      repeat16(kSignedNibbles, table);
      return shuffle8(table, V::iand(i % 2 ? V::template shr16<4>(line) : line, V::iset1_8(15)));
    }
  }

  // Where elements 4 i .. 4 i + 3 meet their columns among 8. Bits 0 and 1 of a place pick a column of its group, bit 2 the group; a shuffle
  // reads bits 0 to 3 and 7, x lies there twice for bit 3. two: places of a substep and the one two later are cut out of their bytes together.
  template <int i>
  static I shuffles(const I& places, I& two) {
    if constexpr (i < 2) two = and_or(i ? V::template shr16<2>(places) : places, V::iset1_8(0x33), V::iset1(0x44440000));
    return i < 2 ? two : V::template shr16<4>(two);
  }
};

template <class V, int M, Values values>
struct TwoFourPath {
  using I = typename V::I;
  using Codes = TwoFourCodes<V, values>;
  static constexpr int R = V::kTileRegs;
  static constexpr int64_t kTurnBytes = turn_bytes(values);

  // Tiles side by side, turns of a tile before the next has its turn, and how far ahead is asked for: what streams best. Far
  // ahead where arithmetic takes longer than memory, which would be too much where it does not, and one tile after the other
  // where it takes longest (benchmarks/NOTES.md).
  static constexpr bool kFar = V::kVnni && (values == Values::int8 ? V::kLanes == 8 || M > 1 : V::kLanes == 16 && M >= 4);
  static constexpr bool kAlone = V::kVnni && V::kLanes == 16 && values == Values::int8 && M > 1;
  static constexpr int64_t kTiles = kAlone ? 1 : values == Values::int4 && M == 1 ? kOddStreams : kStreams;
  static constexpr int64_t kVisit = kAlone ? 4 : kFar == (values == Values::int8) ? 2 : 1, kTurnAhead = kFar ? 4096 : kAhead;

  struct Sums {
    I products[M][R], weights[R];
    __attribute__((always_inline)) void clear() {
#pragma GCC unroll 4
      for (int i = 0; i < R; ++i) {
        weights[i] = V::izero();
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m) products[m][i] = V::izero();
      }
    }
  };

  static const int8_t* x(const LinearArgs& a) { return a.xq; }

  // `turns` turns of one tile. x: its first row at the first turn's first column.
  __attribute__((always_inline)) static void multiply(const Weight&, int64_t, int64_t, int64_t turns, const uint8_t* p, const int8_t* x, int64_t row, Sums& sums) {
    constexpr int G = sparse_regs<V, M>();
#pragma GCC unroll 4
    for (int first = 0; first < R; first += G) registers<G>(p, turns, x, row, first, sums);
  }

  __attribute__((always_inline)) static void end_block(const LinearArgs& a, int64_t block, const uint8_t* p, const Sums& sums, typename V::F (&y)[M][R]) {
#pragma GCC unroll 4
    for (int i = 0; i < R; ++i) {
      auto scale = block_scale<V>(a.w, p, i);
      if constexpr (Codes::kTimes16) scale = V::mul(scale, V::set1(Codes::kUnit));
      const I offset = V::template shl32<7>(sums.weights[i]);
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m)
        y[m][i] = V::fma(V::to_float(V::isub(sums.products[m][i], offset)), V::mul(scale, V::set1(a.x_scale[m * a.w.g.blocks + block])), y[m][i]);
    }
  }

 private:
  // G registers of the sums, from `first` on.
  template <int G>
  __attribute__((always_inline)) static void registers(const uint8_t* p, int64_t turns, const int8_t* x, int64_t row, int first, Sums& sums) {
    I part[M][G], weights[G], lines[G][kLines], places[G];
    auto start = [&](bool from_zero) __attribute__((always_inline)) {
#pragma GCC unroll 4
      for (int g = 0; g < G; ++g) {
        weights[g] = from_zero ? V::izero() : sums.weights[first + g];
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m) part[m][g] = from_zero ? V::izero() : sums.products[m][first + g];
      }
    };
    start(kSum16);
    for (int64_t t = 0; t < turns; ++t, p += kTurnBytes, x += kTurnColumns) {
      if (first == 0)
#pragma GCC unroll 18
        for (int64_t b = 0; b < kTurnBytes; b += kLine) prefetch(p + b + kTurnAhead);
      keep_pointer(x), keep_pointer(p);
#pragma GCC unroll 4
      for (int l = 0; l <= kLines; ++l)  // in the order of the addresses: another is slower from memory
#pragma GCC unroll 4
        for (int g = 0; g < G; ++g) {
          I& to = l < kLines ? lines[g][l] : places[g];
          to = V::iload(p + l * 128 + (first + g) * V::kBytes);
          if constexpr (V::kLanes == 16 && M <= 4) keep_loaded(to);  // enough registers
        }
      I even[G], odd[G];
      substep<G, 0>(x, row, lines, places, even, part, weights), substep<G, 1>(x, row, lines, places, odd, part, weights);
      substep<G, 2>(x, row, lines, places, even, part, weights), substep<G, 3>(x, row, lines, places, odd, part, weights);
    }
    const I one = V::iset1_16(1);
#pragma GCC unroll 4
    for (int g = 0; g < G; ++g) {
      I& all = sums.weights[first + g];
      all = kSum16 ? V::iadd(all, V::madd(V::maddubs(V::iset1_8(1), weights[g]), one)) : weights[g];
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m) {
        I& product = sums.products[m][first + g];
        product = kSum16 ? V::iadd(product, V::madd(part[m][g], one)) : part[m][g];
      }
    }
  }

  // Sums of 16 bits, of weights as bytes, for a visit of two turns at most: 2 * 4 * 2 * 255 * 8 < 2^15, and 2 * 4 * 8 < 2^7.
  static constexpr bool kSum16 = !V::kVnni && values == Values::int4;
  static_assert(!kSum16 || kVisit <= 2);
  // Sums are formed where they are written: of several rows GCC forms all products first, and spills them.
  static constexpr bool kPinned = V::kLanes == 8 && (V::kVnni ? M == 2 : M > 1);
  static constexpr bool kTwoAtOnce = values == Values::int4 || M > 1;  // int8 by one row is 0.62 (avx512-vnni) and 0.94 x (avx2) with it
  static constexpr int kLines = Codes::kLines;

  // 8 columns.
  template <int G, int i>
  __attribute__((always_inline)) static void substep(const int8_t* x, int64_t row, const I (&lines)[G][kLines], const I (&places)[G], I (&two)[G],
                                                     I (&part)[M][G], I (&weights)[G]) {
    I w[G], at[G];
#pragma GCC unroll 4
    for (int g = 0; g < G; ++g) {
      w[g] = Codes::template elements<i>(lines[g]);
      if constexpr (kTwoAtOnce) at[g] = Codes::template shuffles<i>(places[g], two[g]);
      else at[g] = and_or(i ? V::template shr16<2 * i>(places[g]) : places[g], V::iset1_8(3), V::iset1(0x04040000));
      if constexpr (kSum16) weights[g] = add8(weights[g], w[g]);
      else if constexpr (V::kVnni) weights[g] = V::dot(weights[g], V::iset1_8(1), w[g]);
      else weights[g] = V::iadd(weights[g], V::madd(V::maddubs(V::iset1_8(1), w[g]), V::iset1_16(1)));
    }
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
      int64_t eight;
      std::memcpy(&eight, x + m * row + 8 * i, sizeof eight);
      I columns;
      repeat8(eight, columns);
#pragma GCC unroll 4
      for (int g = 0; g < G; ++g) {
        const I met = shuffle8(columns, at[g]);
        if constexpr (V::kVnni) part[m][g] = V::dot(part[m][g], met, w[g]);
        else if constexpr (kSum16) part[m][g] = V::iadd16(part[m][g], V::maddubs(met, w[g]));
        else part[m][g] = V::iadd(part[m][g], halves(met, w[g]));
        if constexpr (kPinned) asm volatile("" : "+v"(part[m][g]));
      }
    }
  }

  // vpmaddubsw saturates at 255 * 127 * 2: even and odd bytes as 16-bit halves do not.
  static I halves(I x, I w) {
    const I even = V::madd(V::iand(x, V::iset1_16(0xff)), V::template sar16<8>(V::template shl16<8>(w)));
    return V::iadd(even, V::madd(V::template shr16<8>(x), V::template sar16<8>(w)));
  }
};

}  // namespace
}  // namespace calora
