// How scales and NF4 codes become numbers in registers: what decode.h and the micro-kernels of prefill share. (Other codes are
// numbers already.)
#pragma once
#include <immintrin.h>

#include "../kernels.h"

namespace calora {
namespace {

// The book as fp32; as bf16, twice, because vpermw reads five bits; and as the bytes that meet int8 activations: with the
// offset of int8 weights for vpdpbusd, signed for the rungs without it (dot4 below).
struct Nf4Tables {
  alignas(64) float values[16];
  alignas(64) uint16_t bf16[32];
  alignas(16) uint8_t parts[16], offset_parts[16];
  constexpr Nf4Tables() : values{}, bf16{}, parts{}, offset_parts{} {
    for (int i = 0; i < 16; ++i) {
      const auto bits = __builtin_bit_cast(uint32_t, kNf4[i]);
      values[i] = kNf4[i];
      bf16[i] = bf16[16 + i] = static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
      parts[i] = static_cast<uint8_t>(nf4_part(i));
      offset_parts[i] = static_cast<uint8_t>(nf4_part(i) + kInt8Zero);
    }
  }
};
constexpr Nf4Tables kNf4Tables;

// 16 floats by the low 4 bits of each lane.
inline __m256 lookup16(const float* table, __m256i index) {
  const __m256 low = _mm256_permutevar8x32_ps(_mm256_load_ps(table), index), high = _mm256_permutevar8x32_ps(_mm256_load_ps(table + 8), index);
  return _mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32(index, 28)));
}
#ifdef __AVX512F__
inline __m512 lookup16(const float* table, __m512i index) { return _mm512_permutexvar_ps(index, _mm512_load_ps(table)); }
#endif

// What is added to a code, or to the part of one that NF4 multiplies, to make it the unsigned side of a product.
template <class V, Values values>
constexpr int kOffset = values == Values::int4 ? kInt4Zero : values == Values::int8 || V::kVnni ? kInt8Zero : 0;

// What an integer sum counts.
constexpr float unit_of(Values values) { return values == Values::nf4 ? 1.0f / kNf4Parts : 1.0f; }

// Where the integer sum of a block starts, so that it ends without the offset of the codes: -offset * x_sum, which wraps as the sum does.
// With zero points, which differ by row, -x_sum.
template <class V>
int32_t sum_start(Values values, bool zeros, int32_t x_sum) {
  const int offset = zeros ? 1 : values == Values::int4 ? kOffset<V, Values::int4> : values == Values::nf4 ? kOffset<V, Values::nf4> : kOffset<V, Values::int8>;
  return static_cast<int32_t>(-static_cast<uint32_t>(offset) * static_cast<uint32_t>(x_sum));
}

// The bytes that meet int8 activations, from nibbles.
template <class V, Values values>
__attribute__((always_inline)) inline typename V::I multipliers(typename V::I nibbles) {
  if constexpr (values == Values::nf4) return V::lookup8(V::kVnni ? kNf4Tables.offset_parts : kNf4Tables.parts, nibbles);
  else return nibbles;
}

// acc (int32) + the four products of each lane. w is unsigned; without VNNI, signed and at most kNf4Parts: vpmaddubsw then takes
// |w| and x with the sign of w, and 2 * 124 * 127 does not saturate it.
template <class V>
__attribute__((always_inline)) inline typename V::I dot4(typename V::I acc, typename V::I w, typename V::I x) {
  if constexpr (V::kVnni) return V::dot(acc, w, x);
  else return V::iadd(acc, V::madd(V::maddubs(V::abs8(w), V::sign8(x, w)), V::iset1_16(1)));
}

// The fp16 scales of rows i * kLanes ... that end the block at p.
template <class V>
typename V::F block_scale(const Weight& w, const uint8_t* p, int i) {
  return V::load_fp16(p + w.g.block_bytes - kScaleBytes + 2 * i * V::kLanes);
}

// The scales of those rows wherever they are, of a tile's block, which begins at p.
template <class V>
__attribute__((always_inline)) inline typename V::F block_scale(Values values, const Weight& w, int64_t tile, int64_t block, const uint8_t* p, int i) {
  if (values != Values::nf4) return block_scale<V>(w, p, i);
  return V::mul(V::template load_small_floats<kScaleShift>(w.scale_codes(tile, block) + i * V::kLanes), V::set1(w.outer_scale(tile)));
}

}  // namespace
}  // namespace calora
