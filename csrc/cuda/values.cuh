// How the value types become operands of an mma: one struct each, over the chunk order of api.h. T: Bf16 or F16; NB: mma
// columns / 8, that is, how often a fragment is used.
//
//   kWords      16-byte words a lane has of a chunk
//   kScaleWord  bytes a lane has of a block's scales: 8 (fp16), 4 (nf4's codes) or 0; scale() takes the i-th of them out
//   kOuter      those scales are times one of the tile; kUnit: what a fragment's values are to be multiplied with besides
//   kOffset     what fragment() leaves added to (code - middle code); sum(x) times it is taken off the sum
//   fragment    A fragment (rt, s) of T from the lane's words
//   weight      one value of those words, (code - middle code), as fp32: for decoding to a dense matrix
//   kBits, word, bit   a code's bits, and where they lie: of which 32-bit word, from which bit on
//   kNothing    a word of codes that all mean 0
#pragma once
#include "device.cuh"

namespace calora::cuda {

constexpr int kNoFold = 8;  // as NB: fragments that leave no offset

// fp16 scales in a block.
struct Scaled {
  static constexpr int kScaleWord = 8;
  static constexpr bool kOuter = false;
  static constexpr float kUnit = 1;
  static __device__ __forceinline__ float scale(uint2 word, int i) { return f16_to_float(static_cast<uint16_t>((i & 2 ? word.y : word.x) >> (i & 1 ? 16 : 0))); }
};
struct Unscaled {
  static constexpr int kScaleWord = 0;
  static constexpr bool kOuter = false;
  static constexpr float kUnit = 1;
  static __device__ __forceinline__ float scale(uint2, int) { return 1; }
};

template <class T, int NB>
struct Int4 : Scaled {
  static constexpr int kWords = 1, kBits = 4;
  static constexpr uint32_t kNothing = 0x88888888;
  static constexpr bool kZeros = true;
  static constexpr bool kFold = NB <= 2;
  // Folded: the codes go in as kBase + code, and the sum is corrected by sum(x) once per block; one more mma a step instead of
  // four subtractions per fragment, so worth it where few rows of x share a fragment.
  static constexpr float kOffset = kFold ? T::kBase + kInt4Zero : 0;

  static __device__ __forceinline__ void fragment(const uint32_t (&words)[4], int rt, int s, uint32_t (&a)[4]) {
    const uint32_t q = words[2 * s + rt];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      a[i] = and_or(q >> (4 * i), 0x000f000f, T::kBaseBits);
      if (!kFold) a[i] = T::subtract(a[i], T::kBaseBits | kInt4Zero * 0x00010001);
    }
  }
  static __device__ __forceinline__ int word(int rt, int, int s, int) { return 2 * s + rt; }
  static __device__ __forceinline__ int bit(int j, int h, int e) { return 4 * (j + 2 * h) + 16 * e; }
  static __device__ __forceinline__ float weight(const uint32_t (&words)[4], int rt, int j, int s, int h, int e) {
    return static_cast<float>(static_cast<int>(words[word(rt, j, s, h)] >> bit(j, h, e) & 15) - kInt4Zero);
  }
};

template <class T, int NB>
struct Int8 : Scaled {
  static constexpr int kWords = 2, kBits = 8;
  static constexpr uint32_t kNothing = 0x80808080;
  static constexpr bool kZeros = false;
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
struct Dense16 : Unscaled {  // bf16 weights
  static constexpr int kWords = 4, kBits = 16;
  static constexpr uint32_t kNothing = 0;
  static constexpr bool kZeros = false;
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

// The value of code 0..15 times `unit` in the 16-bit type T, nearest, as bits; 0 becomes -0, as its neighbour in the table is negative.
template <class T>
constexpr uint32_t nf4_bits(int code, double unit) {
  double v = kNf4[code] * unit;
  const uint32_t sign = v <= 0 ? 0x8000 : 0;
  if (v == 0) return sign;
  if (v < 0) v = -v;
  uint32_t exponent = T::kBias;
  for (; v < 1; v *= 2) --exponent;
  for (; v >= 2; v /= 2) ++exponent;
  return sign | ((exponent << T::kMantissa) + static_cast<uint32_t>((v - 1) * (1 << T::kMantissa) + 0.5));
}

// nf4: values are looked up by byte_permute, 8 places at a time, low and high bytes apart. A digit from 8 on gives the sign of
// the byte at digit - 8, so both halves of the table are asked for every digit, the upper one with its highest bit turned, and
// what comes from the wrong half is undone by an xor: the table's lower half has bytes without the highest bit (the others are
// complemented), and its upper half the bytes whose highest bit is that of the byte 8 places before, before it was complemented.
// That the two agree, in both types and both bytes, is what kNf4Code and kBookUnit are chosen for. Of all such units these two
// round normal weights least: by 9.3e-4 (bf16) and 8.5e-5 (fp16) of their norm in groups of 64; rounded weight by weight, they would
// lose 1.6e-3 and 2e-4.
template <class T>
constexpr uint32_t nf4_bytes(int which, int place) {  // low (0) or high (1) bytes of the values at four places
  uint32_t all = 0;
  for (int i = 0; i < 4; ++i) {
    const uint32_t byte = nf4_bits<T>(kNf4Code[place + i], T::kBookUnit) >> (8 * which) & 255;
    all |= (place < 8 && byte >= 128 ? 255 - byte : byte) << (8 * i);
  }
  return all;
}
template <class T>
constexpr bool nf4_agrees() {
  for (int place = 0; place < 8; ++place)
    if ((nf4_bits<T>(kNf4Code[place], T::kBookUnit) ^ nf4_bits<T>(kNf4Code[place + 8], T::kBookUnit)) & 0x8080) return false;
  return kNf4Code[0] == kNf4Zero;
}
static_assert(nf4_agrees<Bf16>() && nf4_agrees<F16>());
template <class T, int Which, int Place>
constexpr uint32_t kNf4Bytes = nf4_bytes<T>(Which, Place);

struct Nf4Book {
  float v[16];
};
constexpr Nf4Book nf4_book() {
  Nf4Book book{};
  for (int place = 0; place < 16; ++place) book.v[place] = kNf4[kNf4Code[place]];
  return book;
}
__device__ constexpr Nf4Book kNf4Book = nf4_book();  // in memory: one cache line, which a load of any 32 of its words takes as one

template <class T, int NB>
struct Nf4 {
  static constexpr int kWords = 1, kBits = 4, kScaleWord = 4;
  static constexpr uint32_t kNothing = 0;
  static constexpr bool kZeros = false, kOuter = true;
  static constexpr float kOffset = 0, kUnit = static_cast<float>(1 / T::kBookUnit);

  static __device__ __forceinline__ float scale(uint2 word, int i) { return f16_to_float(static_cast<uint16_t>((word.x >> (8 * i) & 255) << kScaleShift)); }
  static __device__ __forceinline__ void fragment(const uint32_t (&words)[4], int rt, int s, uint32_t (&a)[4]) {
    const uint32_t q = words[2 * s + rt], turned = q ^ 0x88888888;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const uint32_t first = q >> (16 * h), second = turned >> (16 * h);
      const uint32_t low = byte_permute(kNf4Bytes<T, 0, 0>, kNf4Bytes<T, 0, 4>, first) ^ byte_permute(kNf4Bytes<T, 0, 8>, kNf4Bytes<T, 0, 12>, second);
      const uint32_t high = byte_permute(kNf4Bytes<T, 1, 0>, kNf4Bytes<T, 1, 4>, first) ^ byte_permute(kNf4Bytes<T, 1, 8>, kNf4Bytes<T, 1, 12>, second);
      a[2 * h] = byte_permute(low, high, 0x5140);
      a[2 * h + 1] = byte_permute(low, high, 0x7362);
    }
  }
  static __device__ __forceinline__ int word(int rt, int, int s, int) { return 2 * s + rt; }
  static __device__ __forceinline__ int bit(int j, int h, int e) { return 4 * (e + 2 * j) + 16 * h; }
  static __device__ __forceinline__ float weight(const uint32_t (&words)[4], int rt, int j, int s, int h, int e) {
    return kNf4Book.v[words[word(rt, j, s, h)] >> bit(j, h, e) & 15];
  }
};

// Where the scales of a block lie: at its end, or in a tensor of their own.
template <class V>
__device__ __forceinline__ const uint8_t* scales_of(const PackedWeight& w, const Geometry& geo, int64_t tile, int64_t block) {
  if (V::kOuter) return w.scales + (tile * geo.blocks + block) * kTileRows;
  return w.packed + tile * geo.tile_bytes + (block + 1) * geo.block_bytes - kScaleBytes;
}
template <class V>
__device__ __forceinline__ uint2 load_scales(const uint8_t* word) {
  if (V::kScaleWord == 8) return *reinterpret_cast<const uint2*>(word);
  return uint2{V::kScaleWord ? *reinterpret_cast<const uint32_t*>(word) : 0, 0};
}
template <class V>
__device__ __forceinline__ float outer_scale(const PackedWeight& w, const Geometry& geo, int64_t tile) {
  return V::kOuter ? reinterpret_cast<const float*>(w.scales + geo.tiles * geo.blocks * kTileRows)[tile] : 1.f;
}

}  // namespace calora::cuda
