// How the value types become operands of an mma: one struct each, over the chunk order of api.h. T: Bf16 or F16; NB: mma
// columns / 8, that is, how often a fragment is used.
//
//   kWords      16-byte words a lane has of a chunk
//   kScaled     there are scales
//   kOffset     what fragment() leaves added to (code - middle code); sum(x) times it is taken off the sum
//   fragment    A fragment (rt, s) of T from the lane's words
//   weight      one value of those words, (code - middle code), as fp32: for decoding to a dense matrix
//   kBits, word, bit   a code's bits, and where they lie: of which 32-bit word, from which bit on
//   kNothing    a word of codes that all mean 0
#pragma once
#include "device.cuh"

namespace calora::cuda {

constexpr int kNoFold = 8;  // as NB: fragments that leave no offset

template <class T, int NB>
struct Int4 {
  static constexpr int kWords = 1, kBits = 4;
  static constexpr uint32_t kNothing = 0x88888888;
  static constexpr bool kScaled = true, kZeros = true;
  static constexpr bool kFold = NB <= 2;
  // Folded: the codes go in as 16 + code, and the sum is corrected by sum(x) once per block; one more mma a step instead of
  // four subtractions per fragment, so worth it where few rows of x share a fragment.
  static constexpr float kOffset = kFold ? 16 + kInt4Zero : 0;

  static __device__ __forceinline__ void fragment(const uint32_t (&words)[4], int rt, int s, uint32_t (&a)[4]) {
    const uint32_t q = words[2 * s + rt];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int shift = 4 * i - T::kCodeShift;
      a[i] = and_or(shift < 0 ? q << -shift : q >> shift, T::kCodeMask, T::kSixteen);
      if (!kFold) a[i] = T::subtract(a[i], T::kTwentyFour);
    }
  }
  static __device__ __forceinline__ int word(int rt, int, int s, int) { return 2 * s + rt; }
  static __device__ __forceinline__ int bit(int j, int h, int e) { return 4 * (j + 2 * h) + 16 * e; }
  static __device__ __forceinline__ float weight(const uint32_t (&words)[4], int rt, int j, int s, int h, int e) {
    return static_cast<float>(static_cast<int>(words[word(rt, j, s, h)] >> bit(j, h, e) & 15) - kInt4Zero);
  }
};

template <class T, int NB>
struct Int8 {
  static constexpr int kWords = 2, kBits = 8;
  static constexpr uint32_t kNothing = 0x80808080;
  static constexpr bool kScaled = true, kZeros = false;
  static constexpr float kOffset = 0;

  // Bytes 2 j and 2 j + 1 of q, minus 128, as a pair of T; exact in both types.
  static __device__ __forceinline__ uint32_t convert(uint32_t q, int j) {
    if constexpr (T::kCodeShift == F16::kCodeShift) {  // 1024 + byte is an fp16 with the byte for its low bits
      return T::subtract(byte_permute(q, 0x64646464, j ? 0x4342 : 0x4140), 0x64806480);
    } else {  // 2^23 + byte is a float likewise; what is left after the subtraction fits the upper half of it
      const float low = bits_to_float(byte_permute(q, 0x4b000000, j ? 0x7442 : 0x7440)) - 8388736.f;
      const float high = bits_to_float(byte_permute(q, 0x4b000000, j ? 0x7443 : 0x7441)) - 8388736.f;
      return byte_permute(__float_as_uint(low), __float_as_uint(high), 0x7632);
    }
  }
  static __device__ __forceinline__ void fragment(const uint32_t (&words)[8], int rt, int s, uint32_t (&a)[4]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) a[i] = convert(words[4 * s + 2 * rt + (i >> 1)], i & 1);
  }
  static __device__ __forceinline__ int word(int rt, int, int s, int h) { return 4 * s + 2 * rt + h; }
  static __device__ __forceinline__ int bit(int j, int, int e) { return 8 * (2 * j + e); }
  static __device__ __forceinline__ float weight(const uint32_t (&words)[8], int rt, int j, int s, int h, int e) {
    return static_cast<float>(static_cast<int>(words[word(rt, j, s, h)] >> bit(j, h, e) & 255) - kInt8Zero);
  }
};

template <class T, int NB>
struct Dense16 {  // bf16 weights
  static constexpr int kWords = 4, kBits = 16;
  static constexpr uint32_t kNothing = 0;
  static constexpr bool kScaled = false, kZeros = false;
  static constexpr float kOffset = 0;

  static __device__ __forceinline__ void fragment(const uint32_t (&words)[16], int rt, int s, uint32_t (&a)[4]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t q = words[4 * (2 * s + rt) + i];
      if constexpr (T::kCodeShift == Bf16::kCodeShift) a[i] = q;
      else a[i] = pair(float_to_f16(bits_to_float(q << 16)), float_to_f16(bits_to_float(q & 0xffff0000)));
    }
  }
  static __device__ __forceinline__ int word(int rt, int j, int s, int h) { return 4 * (2 * s + rt) + j + 2 * h; }
  static __device__ __forceinline__ int bit(int, int, int e) { return 16 * e; }
  static __device__ __forceinline__ float weight(const uint32_t (&words)[16], int rt, int j, int s, int h, int e) {
    const uint32_t q = words[word(rt, j, s, h)];
    return bits_to_float(e ? q & 0xffff0000 : q << 16);
  }
};

}  // namespace calora::cuda
