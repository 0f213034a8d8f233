// 512-bit vectors: 16 lanes of 32 bits, so a tile of 32 rows is 2 registers. With VNNI in the flags of the including file
// dot() is vpdpbusd; with BF16 dot_bf16() is vdpbf16ps.
#pragma once
#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace calora {
namespace {  // internal linkage: a function compiled with these flags must never be the copy that baseline code links to

struct Simd {
  using F = __m512;   // 16 floats
  using I = __m512i;  // 64 bytes, 32 shorts or 16 ints
  static constexpr int kLanes = 16, kBytes = 64;
  static constexpr int kTileRegs = 2;  // registers of 32-bit lanes in a tile of 32 rows
#ifdef __AVX512VNNI__
  static constexpr bool kVnni = true;
#else
  static constexpr bool kVnni = false;
#endif
#ifdef __AVX512BF16__
  static constexpr bool kBf16Dot = true;
#else
  static constexpr bool kBf16Dot = false;
#endif

  static F zero() { return _mm512_setzero_ps(); }
  static F set1(float v) { return _mm512_set1_ps(v); }
  static F load(const float* p) { return _mm512_loadu_ps(p); }
  static void store(float* p, F v) { _mm512_storeu_ps(p, v); }
  // The first n of kLanes floats (the rest 0), for ragged ends.
  static __mmask16 first(int64_t n) { return static_cast<__mmask16>((1u << n) - 1); }
  static F load_part(const float* p, int64_t n) { return _mm512_maskz_loadu_ps(first(n), p); }
  static void store_part(float* p, F v, int64_t n) { _mm512_mask_storeu_ps(p, first(n), v); }
  static F load_part(const uint16_t* p, int64_t n) { return widen(_mm256_maskz_loadu_epi16(first(n), p)); }
  static void store_part(uint16_t* p, F v, int64_t n) { _mm256_mask_storeu_epi16(p, first(n), narrow(v)); }
  static F add(F a, F b) { return _mm512_add_ps(a, b); }
  static F mul(F a, F b) { return _mm512_mul_ps(a, b); }
  static F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
  static F abs(F v) { return _mm512_abs_ps(v); }
  static F max(F a, F b) { return _mm512_max_ps(a, b); }
  static float sum(F v) { return _mm512_reduce_add_ps(v); }
  static float max_of(F v) { return _mm512_reduce_max_ps(v); }

  // A uint16_t holds a bf16.
  static F load(const uint16_t* p) { return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
  static void store(uint16_t* p, F v) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow(v)); }
  static F widen(__m256i v) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(v), 16)); }
  // Round to nearest even; a NaN stays a NaN. Not vcvtneps2bf16, which flushes denormals to 0.
  static __m256i narrow(F v) {
    const I bits = _mm512_castps_si512(v);
    const I odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    I r = _mm512_srli_epi32(_mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd), 16);
    const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    r = _mm512_mask_or_epi32(r, nan, _mm512_srli_epi32(bits, 16), _mm512_set1_epi32(0x40));
    return _mm512_cvtepi32_epi16(r);
  }
  // Even and odd lanes of 32 -> the first 16 and the last 16.
  static void interleave(F& even, F& odd) {
    const I lo = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    const I hi = _mm512_setr_epi32(8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
    const F first = _mm512_permutex2var_ps(even, lo, odd);
    odd = _mm512_permutex2var_ps(even, hi, odd);
    even = first;
  }
  // 16 bytes, each an fp16 number but for the shift.
  template <int shift> static F load_small_floats(const void* p) {
    return _mm512_cvtph_ps(_mm256_slli_epi16(_mm256_cvtepu8_epi16(_mm_loadu_si128(static_cast<const __m128i*>(p))), shift));
  }
  static F load_fp16(const void* p) { return _mm512_cvtph_ps(_mm256_loadu_si256(static_cast<const __m256i*>(p))); }

  static I izero() { return _mm512_setzero_si512(); }
  static I iload(const void* p) { return _mm512_loadu_si512(p); }
  static void istore(void* p, I v) { _mm512_storeu_si512(p, v); }
  static I iset1(int v) { return _mm512_set1_epi32(v); }
  static I iset1_16(short v) { return _mm512_set1_epi16(v); }
  static I iset1_8(char v) { return _mm512_set1_epi8(v); }
  static I iand(I a, I b) { return _mm512_and_si512(a, b); }
  static I ixor(I a, I b) { return _mm512_xor_si512(a, b); }
  static I iadd(I a, I b) { return _mm512_add_epi32(a, b); }
  static I isub(I a, I b) { return _mm512_sub_epi32(a, b); }
  static I imul(I a, I b) { return _mm512_mullo_epi32(a, b); }
  static I iadd16(I a, I b) { return _mm512_add_epi16(a, b); }
  template <int n> static I shr16(I v) { return _mm512_srli_epi16(v, n); }
  template <int n> static I sar16(I v) { return _mm512_srai_epi16(v, n); }
  template <int n> static I shl16(I v) { return _mm512_slli_epi16(v, n); }
  template <int n> static I shr32(I v) { return _mm512_srli_epi32(v, n); }
  template <int n> static I sar32(I v) { return _mm512_srai_epi32(v, n); }
  template <int n> static I shl32(I v) { return _mm512_slli_epi32(v, n); }
  static I maddubs(I u8, I s8) { return _mm512_maddubs_epi16(u8, s8); }  // saturates unless |sum of two products| < 2^15
  static I madd(I a16, I b16) { return _mm512_madd_epi16(a16, b16); }
  static I to_int(F v) { return _mm512_cvtps_epi32(v); }  // half to even
  static F to_float(I v) { return _mm512_cvtepi32_ps(v); }
  static F as_float(I v) { return _mm512_castsi512_ps(v); }
  static I widen_u8(const uint8_t* p) { return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
  static void store_i8(int8_t* p, I v) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtsepi32_epi8(v)); }
  static int isum(I v) { return _mm512_reduce_add_epi32(v); }
  // 16 bytes by each index byte, which is below 16.
  static I lookup8(const uint8_t* table, I index) {
    return _mm512_shuffle_epi8(_mm512_broadcast_i32x4(_mm_load_si128(reinterpret_cast<const __m128i*>(table))), index);
  }
  static I abs8(I v) { return _mm512_abs_epi8(v); }
  static I sign8(I v, I by) { return _mm512_mask_sub_epi8(v, _mm512_movepi8_mask(by), izero(), v); }  // v, -v or, where by is 0, anything

#ifdef __AVX512VNNI__
  // acc (int32) + the four products u8 * s8 of each lane.
  static I dot(I acc, I u8, I s8) { return _mm512_dpbusd_epi32(acc, u8, s8); }
#endif
#ifdef __AVX512BF16__
  // acc (fp32) + the two products bf16 * bf16 of each lane. Denormal inputs count as 0.
  static F dot_bf16(F acc, I a, I b) { return _mm512_dpbf16_ps(acc, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b)); }
  static I lookup32_16(I table, I index) { return _mm512_permutexvar_epi16(index, table); }  // by the low 5 bits of each 16-bit lane
#endif
};

}  // namespace
}  // namespace calora
