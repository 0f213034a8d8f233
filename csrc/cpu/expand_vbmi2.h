// Expanding an unstructured weight with vpexpandb and vpexpandw: one instruction puts up to 64 codes at their places.
//
// Floor per 64 dense codes: load, expand (2 micro-operations), store, popcount, addition; int4 also and / shift / or.
//
// vpexpandb and vpexpandw that put zeros elsewhere wait for what their destination held before (Zen 4, measured: 5.0 cycles each
// into one register, 1.3 into eight or into one that was cleared). Those that merge into a copy of a constant do not. vpexpandw from
// memory takes 1.7 times as long as from a register.
#pragma once
#include "expand_24.h"
#include "sparse_tile.h"

namespace calora {
namespace {

#ifdef __AVX512VBMI2__

__attribute__((always_inline)) inline uint64_t load_bits(const uint8_t* p) {
  uint64_t v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

// Zeros to merge into. Known to the compiler they would become the form that puts zeros itself.
__attribute__((always_inline)) inline __m512i kept_zero() {
  __m512i v = _mm512_setzero_si512();
  asm("" : "+v"(v));
  return v;
}

// The next codes of a stream at the places that `bits` name, `middle` elsewhere.
__attribute__((always_inline)) inline __m512i next_bytes(uint64_t bits, const uint8_t*& from, __m512i middle) {
  const __m512i v = _mm512_mask_expand_epi8(middle, bits, _mm512_loadu_si512(from));
  from += __builtin_popcountll(bits);
  return v;
}

// The same from the low or the high nibbles of a stream of bytes.
template <bool high>
__attribute__((always_inline)) inline __m512i next_nibbles(uint64_t bits, const uint8_t*& from, __m512i middle) {
  __m512i v = _mm512_loadu_si512(from);
  if constexpr (high) v = _mm512_srli_epi16(v, 4);
  from += __builtin_popcountll(bits);
  return _mm512_mask_expand_epi8(middle, bits, _mm512_and_si512(v, _mm512_set1_epi8(15)));
}

inline void expand_chunk(Values values, const uint8_t* mask, const uint8_t* from, uint8_t* out) {
  if (values == Values::int8) {
    const __m512i middle = _mm512_set1_epi8(static_cast<char>(kInt8Zero));
    for (int i = 0; i < 16; ++i) _mm512_store_si512(out + 64 * i, next_bytes(load_bits(mask + 8 * i), from, middle));
  } else if (has_groups(values)) {
    const __m512i middle = _mm512_set1_epi8(static_cast<char>(zero_code(values)));
    const uint8_t* odd = from;
    for (int step = 0; step < 4; ++step)
      for (int half = 0; half < 2; ++half) {
        const uint8_t* bits = mask + 32 * step + 8 * half;
        const __m512i low = next_nibbles<false>(load_bits(bits), from, middle), high = next_nibbles<true>(load_bits(bits + 16), odd, middle);
        _mm512_store_si512(out + 128 * step + 64 * half, _mm512_or_si512(low, _mm512_slli_epi16(high, 4)));
      }
  } else {
    const __m512i nothing = kept_zero();
#pragma GCC unroll 4
    for (int i = 0; i < 32; ++i) {
      const auto bits = static_cast<__mmask32>(load32(mask + 4 * i));
      __m512i v = _mm512_loadu_si512(from);
      keep_loaded(v);
      _mm512_store_si512(out + 64 * i, _mm512_mask_expand_epi16(nothing, bits, v));
      from += 2 * __builtin_popcount(bits);
    }
  }
}

// The same of a chunk in pairs of rows.
inline void expand_pairs(const uint8_t* mask, const uint8_t* from, uint8_t* out) {
  const __m512i middle = _mm512_set1_epi8(static_cast<char>(0x11 * kInt4Zero)), low = _mm512_set1_epi8(15);
  for (int step = 0; step < 8; step += 2, out += 128) {
    const __m512i even = next_bytes(load_bits(mask + 8 * step), from, middle), odd = next_bytes(load_bits(mask + 8 * step + 8), from, middle);
    constexpr int kChoose = 0xca;  // bit by bit: first ? second : third
    _mm512_store_si512(out, _mm512_ternarylogic_epi32(low, even, _mm512_slli_epi16(odd, 4), kChoose));
    _mm512_store_si512(out + 64, _mm512_ternarylogic_epi32(low, _mm512_srli_epi16(even, 4), odd, kChoose));
  }
}

inline void expand_kept(const Weight& w, int64_t tile, int64_t block, int64_t k, int64_t columns, uint8_t* codes) {
  const int64_t mask_bytes = code_bytes(w.pattern, w.values, kTurnColumns), bytes = code_bytes(w.values, kTurnColumns);
  const uint8_t* mask = w.packed + tile * w.g.tile_bytes + block * w.g.block_bytes + code_bytes(w.pattern, w.values, k);
  const int64_t first = (block * w.g.block_columns + k) / kTurnColumns, last = w.g.chunks() - 1;
  for (int64_t c = first; c < first + columns / kTurnColumns; ++c, mask += mask_bytes, codes += bytes) {
    const uint8_t *from = w.chunk(tile, c), *next = w.chunk(tile, c < last ? c + 1 : last);
    for (int64_t b = 0; b < mask_bytes; b += 64) prefetch(mask + b + kTurnsAhead);
    for (int64_t b = 0; b < next - from && b < bytes; b += 64) prefetch(from + b + kTurnsAhead);
    if (w.pattern == Pattern::paired) expand_pairs(mask, from, codes);
    else expand_chunk(w.values, mask, from, codes);
  }
}

#endif

inline void expand_columns(const Weight& w, int64_t tile, int64_t block, int64_t k, int64_t columns, uint8_t* codes) {
#ifdef __AVX512VBMI2__
  if (has_kept(w.pattern)) return expand_kept(w, tile, block, k, columns, codes);
#endif
#ifdef __AVX512BW__
  if (w.pattern == Pattern::two_four && w.values != Values::bf16)
    return expand_two_four(w.values, w.packed + tile * w.g.tile_bytes + block * w.g.block_bytes + code_bytes(w.pattern, w.values, k), columns, codes);
#endif
  expand(w, tile, block, k, columns, codes);
}

}  // namespace
}  // namespace calora
