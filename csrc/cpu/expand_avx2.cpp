// Expanding with 256-bit vectors: 8 rows of a tile at a time.
//
// 2:4, floor per 4 columns of 8 rows (32 dense bytes): 4 byte shuffles, 2 comparisons, 3 logical operations; with unpacking
// some 11 operations, 0.35 a weight. A panel of 12 rows of x then multiplies each weight 12 times, so that this is little.
#include <immintrin.h>

#include "expand.h"

namespace calora {
namespace {

using I = __m256i;

I load(const uint8_t* p) { return _mm256_load_si256(reinterpret_cast<const I*>(p)); }
void store(uint8_t* p, I v) { _mm256_store_si256(reinterpret_cast<I*>(p), v); }
I both_lanes(__m128i v) { return _mm256_broadcastsi128_si256(v); }
I repeat(int dword) { return _mm256_set1_epi32(dword); }

// Byte `from` of every 32-bit lane in all four bytes of it.
I spread(I v, int from) { return _mm256_shuffle_epi8(v, _mm256_add_epi8(both_lanes(_mm_setr_epi32(0, 0x04040404, 0x08080808, 0x0c0c0c0c)), _mm256_set1_epi8(static_cast<char>(from)))); }

// Bytes 2 group and 2 group + 1 of every lane, put at their places among four columns. A place that occurs twice belongs to a
// group of one kept weight, whose second element is 0.
I scatter4(I pair, I places, int group) {
  const I at = repeat(0x03020100);
  const I first = _mm256_and_si256(spread(pair, 2 * group), _mm256_cmpeq_epi8(spread(places, 2 * group), at));
  const I last = _mm256_and_si256(spread(pair, 2 * group + 1), _mm256_cmpeq_epi8(spread(places, 2 * group + 1), at));
  return _mm256_or_si256(first, last);
}

// The same for a pair of 16-bit elements: columns 0 and 1, or 2 and 3.
I scatter2(I pair, I places, int group, int columns) {
  const I at = repeat(columns | (columns + 1) << 16);
  auto half = [](I v, int from) {  // 16 bits of every lane twice
    return _mm256_shuffle_epi8(v, _mm256_add_epi8(both_lanes(_mm_setr_epi32(0x01000100, 0x05040504, 0x09080908, 0x0d0c0d0c)), _mm256_set1_epi8(static_cast<char>(2 * from))));
  };
  auto place = [&](int e) { return _mm256_and_si256(spread(places, 2 * group + e), _mm256_set1_epi16(0xff)); };
  const I first = _mm256_and_si256(half(pair, 0), _mm256_cmpeq_epi16(place(0), at));
  const I last = _mm256_and_si256(half(pair, 1), _mm256_cmpeq_epi16(place(1), at));
  return _mm256_or_si256(first, last);
}

template <Values values>
void expand_two_four(const uint8_t* turn, int64_t columns, uint8_t* out) {
  for (int64_t c = 0; c < columns; c += kTurnColumns, turn += turn_bytes(values), out += code_bytes(values, kTurnColumns))
    for (int r = 0; r < 4 * kTileRows; r += 32) {  // bytes of a line: 8 rows
      I places = load(turn + turn_bytes(values) - kPlaceBytes + r);
      for (int i = 0; i < 4; ++i, places = _mm256_srli_epi16(places, 2)) {  // 8 columns
        const I p = _mm256_and_si256(places, _mm256_set1_epi8(3));
        if constexpr (values == Values::bf16) {
          for (int group = 0; group < 2; ++group) {
            const I pair = load(turn + (2 * i + group) * 128 + r);
            for (int half = 0; half < 2; ++half) store(out + (4 * i + 2 * group + half) * 128 + r, scatter2(pair, p, group, 2 * half));
          }
        } else if constexpr (values == Values::int8) {
          const I pair = load(turn + i * 128 + r), middle = _mm256_set1_epi8(static_cast<char>(0x80));
          for (int group = 0; group < 2; ++group) store(out + (2 * i + group) * 128 + r, _mm256_xor_si256(scatter4(pair, p, group), middle));
        } else {
          const I line = load(turn + i / 2 * 128 + r);
          const I pair = _mm256_and_si256(i % 2 ? _mm256_srli_epi16(line, 4) : line, _mm256_set1_epi8(15));
          const I codes = _mm256_or_si256(scatter4(pair, p, 0), _mm256_slli_epi16(scatter4(pair, p, 1), 4));
          store(out + i * 128 + r, _mm256_xor_si256(codes, _mm256_set1_epi8(static_cast<char>(0x88))));
        }
      }
    }
}

}  // namespace

void expand(const Weight& w, int64_t tile, int64_t block, int64_t k, int64_t columns, uint8_t* codes) {
  const uint8_t* from = w.packed + tile * w.g.tile_bytes + block * w.g.block_bytes + code_bytes(w.pattern, w.values, k);
  if (w.values == Values::int4) expand_two_four<Values::int4>(from, columns, codes);
  else if (w.values == Values::int8) expand_two_four<Values::int8>(from, columns, codes);
  else expand_two_four<Values::bf16>(from, columns, codes);
}

}  // namespace calora
