// Expanding with 256-bit vectors: 8 rows of a tile at a time.
//
// 2:4, floor per 4 columns of 8 rows (32 dense bytes): 4 byte shuffles, 2 comparisons, 3 logical operations; with unpacking
// some 11 operations, 0.35 a weight. Codes of 4 bits take 16 for 8 columns, 0.25 a weight: what a place is worth is looked up, and
// multiplying adds both elements of a group. A panel of 12 rows of x then multiplies each weight 12 times, so that this is little.
#include <immintrin.h>

#include "expand.h"

namespace calora {
namespace {

using I = __m256i;

I load(const uint8_t* p) { return _mm256_load_si256(reinterpret_cast<const I*>(p)); }
void store(uint8_t* p, I v) { _mm256_store_si256(reinterpret_cast<I*>(p), v); }
I both_lanes(__m128i v) { return _mm256_broadcastsi128_si256(v); }
I repeat(int dword) { return _mm256_set1_epi32(dword); }

// A turn that comes later: between two blocks all panels of x are multiplied, and no stream goes on.
void ask_for_turn(const uint8_t* turn, int64_t bytes) {
  for (int64_t b = 8192; b < 8192 + bytes; b += 64) _mm_prefetch(reinterpret_cast<const char*>(turn + b), _MM_HINT_T0);
}

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

// Codes of 8 columns of 8 rows, a byte 4 r + j with those of columns j and 4 + j of row r. elements: of 4 bits, a byte each, two of a group side
// by side. places: theirs in the bits 0 and 1 of as many bytes, bits 2, 3 and 7 are 0.
I scatter8(I elements, I places) {
  auto columns = [&](__m128i worth) {  // two of each group, which lie 8 bits apart
    const I sum = _mm256_maddubs_epi16(_mm256_shuffle_epi8(both_lanes(worth), places), elements);  // 7 bits apart: 256 is no byte
    return _mm256_madd_epi16(_mm256_add_epi16(sum, _mm256_and_si256(sum, _mm256_set1_epi16(15 << 7))), repeat(1 | 16 << 16));
  };
  const I first = columns(_mm_setr_epi32(0x00008001, 0, 0, 0)), last = columns(_mm_setr_epi32(static_cast<int>(0x80010000u), 0, 0, 0));
  return _mm256_or_si256(first, _mm256_slli_epi32(last, 16));
}

template <Values values>
void expand_four_bits(const uint8_t* turn, int64_t columns, uint8_t* out) {
  const I low = _mm256_set1_epi8(15), two = _mm256_set1_epi8(0x33), middle = _mm256_set1_epi8(static_cast<char>(0x11 * zero_code(values)));
  for (int64_t c = 0; c < columns; c += kTurnColumns, turn += turn_bytes(values), out += code_bytes(values, kTurnColumns)) {
    ask_for_turn(turn, turn_bytes(values));
    for (int r = 0; r < 4 * kTileRows; r += 32) {  // bytes of a line: 8 rows
      const I places = load(turn + turn_bytes(values) - kPlaceBytes + r);
      const I even = _mm256_and_si256(places, two), odd = _mm256_and_si256(_mm256_srli_epi16(places, 2), two);  // of two times 8 columns
      for (int i = 0; i < 2; ++i) {
        const I line = load(turn + i * 128 + r);
        auto put = [&](int at, I elements, I p) {
          store(out + at * 128 + r, _mm256_xor_si256(scatter8(_mm256_and_si256(elements, low), i ? _mm256_srli_epi16(p, 4) : p), middle));
        };
        put(2 * i, line, even), put(2 * i + 1, _mm256_srli_epi16(line, 4), odd);
      }
    }
  }
}

template <Values values>
void expand_two_four(const uint8_t* turn, int64_t columns, uint8_t* out) {
  for (int64_t c = 0; c < columns; c += kTurnColumns, turn += turn_bytes(values), out += code_bytes(values, kTurnColumns)) {
    ask_for_turn(turn, turn_bytes(values));
    for (int r = 0; r < 4 * kTileRows; r += 32) {  // bytes of a line: 8 rows
      I places = load(turn + turn_bytes(values) - kPlaceBytes + r);
      for (int i = 0; i < 4; ++i, places = _mm256_srli_epi16(places, 2)) {  // 8 columns
        const I p = _mm256_and_si256(places, _mm256_set1_epi8(3));
        if constexpr (values == Values::bf16) {
          for (int group = 0; group < 2; ++group) {
            const I pair = load(turn + (2 * i + group) * 128 + r);
            for (int half = 0; half < 2; ++half) store(out + (4 * i + 2 * group + half) * 128 + r, scatter2(pair, p, group, 2 * half));
          }
        } else {
          const I pair = load(turn + i * 128 + r), middle = _mm256_set1_epi8(static_cast<char>(0x80));
          for (int group = 0; group < 2; ++group) store(out + (2 * i + group) * 128 + r, _mm256_xor_si256(scatter4(pair, p, group), middle));
        }
      }
    }
  }
}

// ---- unstructured -------------------------------------------------------------------------------------------------------
//
// Without vpexpandb: 8 bits of the mask look up the shuffle that puts 8 codes at their places. Per 64 dense bytes 8 look-ups,
// 8 loads, 8 shuffles and 8 counts, 0.5 operations a weight: 5 times what unpacking dense codes takes. Correct, and slow.

struct Shuffles {
  alignas(64) uint8_t of[256][8];
  constexpr Shuffles() : of{} {
    for (int mask = 0; mask < 256; ++mask)
      for (int bit = 0, next = 0; bit < 8; ++bit) of[mask][bit] = static_cast<uint8_t>(mask >> bit & 1 ? next++ : 0x80);
  }
};
constexpr Shuffles kShuffles;

__m128i load8(const uint8_t* p) { return _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)); }

// 16 codes, bytes, by 16 bits of a mask; 0 where there is none. turned: applied to each code before.
__m128i expand16(const uint8_t* mask, const uint8_t*& from, int shift, __m128i low, __m128i turned) {
  auto half = [&](int i) {
    __m128i v = load8(from);
    if (shift) v = _mm_srli_epi16(v, 4);
    from += __builtin_popcount(mask[i]);
    return _mm_shuffle_epi8(_mm_xor_si128(_mm_and_si128(v, low), turned), load8(kShuffles.of[mask[i]]));
  };
  const __m128i first = half(0);
  return _mm_unpacklo_epi64(first, half(1));
}

// Whole bytes, `zero` where nothing is kept.
void expand_bytes(const uint8_t* mask, int64_t mask_bytes, const uint8_t* from, int zero, uint8_t* out) {
  const __m128i all = _mm_set1_epi8(-1), middle = _mm_set1_epi8(static_cast<char>(zero));
  for (int64_t i = 0; i < mask_bytes; i += 2, out += 16)
    _mm_store_si128(reinterpret_cast<__m128i*>(out), _mm_xor_si128(expand16(mask + i, from, 0, all, middle), middle));
}

void expand_nibbles(const uint8_t* mask, const uint8_t* from, int zero, uint8_t* out) {
  const __m128i low = _mm_set1_epi8(15), turned = _mm_set1_epi8(static_cast<char>(zero)), middle = _mm_set1_epi8(static_cast<char>(0x11 * zero));
  const uint8_t* odd = from;
  for (int step = 0; step < kMaskBytes; step += 32)  // two steps of 16 bytes of mask are one of 128 bytes of codes
    for (int i = 0; i < 16; i += 2, out += 16) {
      const __m128i first = expand16(mask + step + i, from, 0, low, turned), second = expand16(mask + step + 16 + i, odd, 4, low, turned);
      _mm_store_si128(reinterpret_cast<__m128i*>(out), _mm_xor_si128(_mm_or_si128(first, _mm_slli_epi16(second, 4)), middle));
    }
}

void expand_bf16(const uint8_t* mask, const uint8_t* from, uint8_t* out) {
  const __m128i halves = _mm_set1_epi16(0x0100);
  for (int i = 0; i < kMaskBytes; ++i, out += 16) {
    const __m128i place = load8(kShuffles.of[mask[i]]), twice = _mm_unpacklo_epi8(place, place);
    // 2 p and 2 p + 1; 0x80 saturates and stays negative
    const __m128i by = _mm_adds_epu8(_mm_adds_epu8(twice, twice), halves);
    _mm_store_si128(reinterpret_cast<__m128i*>(out), _mm_shuffle_epi8(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)), by));
    from += 2 * __builtin_popcount(mask[i]);
  }
}

// Pairs of rows, four columns at a time -> the dense order, eight at a time.
void expand_paired(const Weight& w, int64_t tile, int64_t column, int64_t columns, const uint8_t* mask, uint8_t* out) {
  alignas(64) uint8_t pairs[kTurnColumns * kTileRows / 2];
  const I low = _mm256_set1_epi8(15);
  for (int64_t c = 0; c < columns / kTurnColumns; ++c, mask += kPairMaskBytes) {
    expand_bytes(mask, kPairMaskBytes, w.chunk(tile, column / kTurnColumns + c), 0x11 * kInt4Zero, pairs);
    for (int step = 0; step < 8; step += 2, out += 128)
      for (int i = 0; i < 64; i += 32) {
        const I even = load(pairs + 64 * step + i), odd = load(pairs + 64 * (step + 1) + i);
        store(out + i, _mm256_or_si256(_mm256_and_si256(even, low), _mm256_slli_epi16(_mm256_and_si256(odd, low), 4)));
        store(out + 64 + i, _mm256_or_si256(_mm256_and_si256(_mm256_srli_epi16(even, 4), low), _mm256_andnot_si256(low, odd)));
      }
  }
}

void expand_bitmask(const Weight& w, int64_t tile, int64_t column, int64_t columns, const uint8_t* mask, uint8_t* out) {
  for (int64_t c = 0; c < columns / kTurnColumns; ++c, mask += kMaskBytes, out += code_bytes(w.values, kTurnColumns)) {
    const uint8_t* from = w.chunk(tile, column / kTurnColumns + c);
    if (w.values == Values::int8) expand_bytes(mask, kMaskBytes, from, kInt8Zero, out);
    else if (has_groups(w.values)) expand_nibbles(mask, from, zero_code(w.values), out);
    else expand_bf16(mask, from, out);
  }
}

}  // namespace

int64_t pair_rows(const uint8_t* codes, uint8_t* mask, uint8_t* kept) {
  const I low = _mm256_set1_epi8(15), nothing = _mm256_set1_epi8(static_cast<char>(0x11 * kInt4Zero));
  int64_t count = 0;
  for (int step = 0; step < 8; ++step)
    for (int i = 0; i < 64; i += 32, mask += 4) {
      const uint8_t* at = codes + step / 2 * 128 + i;
      const I first = step % 2 ? _mm256_srli_epi16(load(at), 4) : load(at), last = step % 2 ? load(at + 64) : _mm256_slli_epi16(load(at + 64), 4);
      const I pairs = _mm256_or_si256(_mm256_and_si256(first, low), _mm256_andnot_si256(low, last));
      const auto bits = ~static_cast<uint32_t>(_mm256_movemask_epi8(_mm256_cmpeq_epi8(pairs, nothing)));
      __builtin_memcpy(mask, &bits, sizeof bits);
      if (kept) {
        alignas(32) uint8_t bytes[32];
        store(bytes, pairs);
        int64_t next = count;
        for (uint32_t left = bits; left; left &= left - 1) kept[next++] = bytes[__builtin_ctz(left)];
      }
      count += __builtin_popcount(bits);
    }
  return count;
}

void expand(const Weight& w, int64_t tile, int64_t block, int64_t k, int64_t columns, uint8_t* codes) {
  const uint8_t* from = w.packed + tile * w.g.tile_bytes + block * w.g.block_bytes + code_bytes(w.pattern, w.values, k);
  if (w.pattern == Pattern::bitmask) expand_bitmask(w, tile, block * w.g.block_columns + k, columns, from, codes);
  else if (w.pattern == Pattern::paired) expand_paired(w, tile, block * w.g.block_columns + k, columns, from, codes);
  else if (w.values == Values::int4) expand_four_bits<Values::int4>(from, columns, codes);
  else if (w.values == Values::nf4) expand_four_bits<Values::nf4>(from, columns, codes);
  else if (w.values == Values::int8) expand_two_four<Values::int8>(from, columns, codes);
  else expand_two_four<Values::bf16>(from, columns, codes);
}

}  // namespace calora
