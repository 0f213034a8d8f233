// 256-bit vectors: 8 lanes of 32 bits, so a tile of 32 rows is 4 registers. The flags of the including file decide what
// dot() is: vpdpbusd with AVX-VNNI (or its EVEX twin), else vpmaddubsw + vpmaddwd.
#pragma once
#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace calora {
namespace {  // internal linkage: a function compiled with these flags must never be the copy that baseline code links to

#if defined(__AVX512VNNI__) && defined(__AVX512VL__)
#define CALORA_DPBUSD _mm256_dpbusd_epi32
#elif defined(__AVXVNNI__)
#define CALORA_DPBUSD _mm256_dpbusd_avx_epi32
#endif

struct Simd {
  using F = __m256;   // 8 floats
  using I = __m256i;  // 32 bytes, 16 shorts or 8 ints
  static constexpr int kLanes = 8, kBytes = 32;
  static constexpr int kTileRegs = 4;  // registers of 32-bit lanes in a tile of 32 rows
#ifdef CALORA_DPBUSD
  static constexpr bool kVnni = true;
#else
  static constexpr bool kVnni = false;
#endif
  static constexpr bool kBf16Dot = false;

  static F zero() { return _mm256_setzero_ps(); }
  static F set1(float v) { return _mm256_set1_ps(v); }
  static F load(const float* p) { return _mm256_loadu_ps(p); }
  static void store(float* p, F v) { _mm256_storeu_ps(p, v); }
  // The first n of kLanes floats (the rest 0), for ragged ends.
  static F load_part(const float* p, int64_t n) { return _mm256_maskload_ps(p, first(n)); }
  static void store_part(float* p, F v, int64_t n) { _mm256_maskstore_ps(p, first(n), v); }
  static I first(int64_t n) { return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(n)), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7)); }
  static F load_part(const uint16_t* p, int64_t n) {
    alignas(16) uint16_t full[kLanes] = {};
    std::memcpy(full, p, 2 * static_cast<std::size_t>(n));
    return load(full);
  }
  static void store_part(uint16_t* p, F v, int64_t n) {
    alignas(16) uint16_t full[kLanes];
    store(full, v);
    std::memcpy(p, full, 2 * static_cast<std::size_t>(n));
  }
  static F add(F a, F b) { return _mm256_add_ps(a, b); }
  static F mul(F a, F b) { return _mm256_mul_ps(a, b); }
  static F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
  static F abs(F v) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), v); }
  static F max(F a, F b) { return _mm256_max_ps(a, b); }
  static float sum(F v) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_shuffle_ps(s, s, 1)));
  }
  static float max_of(F v) {
    __m128 s = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    s = _mm_max_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_max_ss(s, _mm_shuffle_ps(s, s, 1)));
  }

  // A uint16_t holds a bf16.
  static F load(const uint16_t* p) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))), 16));
  }
  // Even and odd lanes of 16 -> the first 8 and the last 8.
  static void interleave(F& even, F& odd) {
    const F a = _mm256_unpacklo_ps(even, odd), b = _mm256_unpackhi_ps(even, odd);
    even = _mm256_permute2f128_ps(a, b, 0x20);
    odd = _mm256_permute2f128_ps(a, b, 0x31);
  }
  // 8 bytes, each an fp16 number but for the shift.
  template <int shift> static F load_small_floats(const void* p) {
    return _mm256_cvtph_ps(_mm_slli_epi16(_mm_cvtepu8_epi16(_mm_loadl_epi64(static_cast<const __m128i*>(p))), shift));
  }
  static F load_fp16(const void* p) { return _mm256_cvtph_ps(_mm_loadu_si128(static_cast<const __m128i*>(p))); }
  // Round to nearest even; a NaN stays a NaN (its payload may round to infinity, hence the blend).
  static void store(uint16_t* p, F v) {
    const I bits = _mm256_castps_si256(v);
    const I odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    I r = _mm256_srli_epi32(_mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd), 16);
    const I nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    r = _mm256_blendv_epi8(r, _mm256_or_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(0x40)), nan);
    const __m128i packed = _mm_packus_epi32(_mm256_castsi256_si128(r), _mm256_extracti128_si256(r, 1));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), packed);
  }

  static I izero() { return _mm256_setzero_si256(); }
  static I iload(const void* p) { return _mm256_loadu_si256(static_cast<const I*>(p)); }
  static void istore(void* p, I v) { _mm256_storeu_si256(static_cast<I*>(p), v); }
  static I iset1(int v) { return _mm256_set1_epi32(v); }
  static I iset1_16(short v) { return _mm256_set1_epi16(v); }
  static I iset1_8(char v) { return _mm256_set1_epi8(v); }
  static I iand(I a, I b) { return _mm256_and_si256(a, b); }
  static I ixor(I a, I b) { return _mm256_xor_si256(a, b); }
  static I iadd(I a, I b) { return _mm256_add_epi32(a, b); }
  static I isub(I a, I b) { return _mm256_sub_epi32(a, b); }
  static I imul(I a, I b) { return _mm256_mullo_epi32(a, b); }
  static I iadd16(I a, I b) { return _mm256_add_epi16(a, b); }
  template <int n> static I shr16(I v) { return _mm256_srli_epi16(v, n); }
  template <int n> static I sar16(I v) { return _mm256_srai_epi16(v, n); }
  template <int n> static I shl16(I v) { return _mm256_slli_epi16(v, n); }
  template <int n> static I shr32(I v) { return _mm256_srli_epi32(v, n); }
  template <int n> static I sar32(I v) { return _mm256_srai_epi32(v, n); }
  template <int n> static I shl32(I v) { return _mm256_slli_epi32(v, n); }
  static I maddubs(I u8, I s8) { return _mm256_maddubs_epi16(u8, s8); }  // saturates unless |sum of two products| < 2^15
  static I madd(I a16, I b16) { return _mm256_madd_epi16(a16, b16); }
  static I to_int(F v) { return _mm256_cvtps_epi32(v); }  // half to even
  static F to_float(I v) { return _mm256_cvtepi32_ps(v); }
  static F as_float(I v) { return _mm256_castsi256_ps(v); }
  static I widen_u8(const uint8_t* p) { return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))); }
  static void store_i8(int8_t* p, I v) {  // 8 ints in [-128, 127]
    const __m128i s = _mm_packs_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packs_epi16(s, s));
  }
  // 16 bytes by each index byte, which is below 16.
  static I lookup8(const uint8_t* table, I index) {
    return _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(table))), index);
  }
  static I abs8(I v) { return _mm256_abs_epi8(v); }
  static I sign8(I v, I by) { return _mm256_sign_epi8(v, by); }  // v, -v or, where by is 0, anything
  static int isum(I v) {
    __m128i s = _mm_add_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
    s = _mm_add_epi32(s, _mm_shuffle_epi32(s, 0x4e));
    return _mm_cvtsi128_si32(_mm_add_epi32(s, _mm_shuffle_epi32(s, 0xb1)));
  }

  // acc (int32) + the four products u8 * s8 of each lane; needs kVnni (without it: maddubs / madd, see decode.h).
#ifdef CALORA_DPBUSD
  static I dot(I acc, I u8, I s8) { return CALORA_DPBUSD(acc, u8, s8); }
#endif
};

}  // namespace
}  // namespace calora
