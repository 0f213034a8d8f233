// Expanding 2:4 with 512-bit vectors: 16 rows of a tile at a time. (With 256 bits, and bf16: expand_avx2.cpp.)
//
// Per 4 columns of 16 rows (64 dense bytes): 4 byte shuffles, 2 comparisons; with unpacking and storing some 9 operations for int4, 8
// for int8, where 256 bits take 22, because masks do what is logic there.
#pragma once
#include "bank.h"
#include "expand.h"

namespace calora {
namespace {

#ifdef __AVX512BW__

constexpr int64_t kTurnsAhead = 8192;  // bytes: between two blocks all panels of x are multiplied, and no stream goes on

// Bytes 2 group and 2 group + 1 of every 32-bit lane, put at their places among four columns, 0 elsewhere. The first goes on top: a
// place that occurs twice belongs to a group of one kept weight, whose second element is 0.
template <int group>
__attribute__((always_inline)) inline __m512i scatter4(__m512i pair, __m512i places) {
  const __m512i at = _mm512_set1_epi32(0x03020100), lanes = _mm512_broadcast_i32x4(_mm_setr_epi32(0, 0x04040404, 0x08080808, 0x0c0c0c0c));
  const __m512i first = _mm512_add_epi8(lanes, _mm512_set1_epi8(2 * group)), last = _mm512_add_epi8(lanes, _mm512_set1_epi8(2 * group + 1));
  const __mmask64 is_first = _mm512_cmpeq_epi8_mask(_mm512_shuffle_epi8(places, first), at);
  const __mmask64 is_last = _mm512_cmpeq_epi8_mask(_mm512_shuffle_epi8(places, last), at);
  return _mm512_mask_shuffle_epi8(_mm512_maskz_shuffle_epi8(is_last, pair, last), is_first, pair, first);
}

template <Values values>
inline void expand_two_four(const uint8_t* turn, int64_t columns, uint8_t* out) {
  constexpr int kOrXor = 0x56;  // bit by bit: (first | second) ^ third
  const __m512i middle = _mm512_set1_epi8(static_cast<char>(values == Values::int8 ? kInt8Zero : 0x11 * zero_code(values)));
  for (int64_t c = 0; c < columns; c += kTurnColumns, turn += turn_bytes(values), out += code_bytes(values, kTurnColumns)) {
    for (int64_t b = 0; b < turn_bytes(values); b += 64) prefetch(turn + b + kTurnsAhead);
    for (int r = 0; r < 128; r += 64) {  // bytes of a line: 16 rows
      const __m512i places = _mm512_load_si512(turn + turn_bytes(values) - kPlaceBytes + r);
      auto eight = [&](int i, __m512i p) __attribute__((always_inline)) {  // columns
        p = _mm512_and_si512(p, _mm512_set1_epi8(3));
        if constexpr (values == Values::int8) {
          const __m512i pair = _mm512_load_si512(turn + i * 128 + r);
          _mm512_store_si512(out + 2 * i * 128 + r, _mm512_xor_si512(scatter4<0>(pair, p), middle));
          _mm512_store_si512(out + (2 * i + 1) * 128 + r, _mm512_xor_si512(scatter4<1>(pair, p), middle));
        } else {
          const __m512i line = _mm512_load_si512(turn + i / 2 * 128 + r);
          const __m512i pair = _mm512_and_si512(i % 2 ? _mm512_srli_epi16(line, 4) : line, _mm512_set1_epi8(15));
          _mm512_store_si512(out + i * 128 + r, _mm512_ternarylogic_epi32(scatter4<0>(pair, p), _mm512_slli_epi16(scatter4<1>(pair, p), 4), middle, kOrXor));
        }
      };
      eight(0, places), eight(1, _mm512_srli_epi16(places, 2)), eight(2, _mm512_srli_epi16(places, 4)), eight(3, _mm512_srli_epi16(places, 6));
    }
  }
}

inline void expand_two_four(Values values, const uint8_t* turn, int64_t columns, uint8_t* out) {
  if (values == Values::int8) expand_two_four<Values::int8>(turn, columns, out);
  else if (values == Values::int4) expand_two_four<Values::int4>(turn, columns, out);
  else expand_two_four<Values::nf4>(turn, columns, out);
}

#endif

}  // namespace
}  // namespace calora
