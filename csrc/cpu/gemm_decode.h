// Packed weights -> the panels that float_panel reads: `steps` rows of 32 lanes of 4 bytes.
//
//   forward    lane = row of the tile, step = 1 column (fp32) or 2 columns (bf16 pair); values are code - zero (nf4: the book's), the scale waits
//   backward   lane = one of 32 columns, step = row of W (fp32) or 2 rows (bf16 pair); values are whole weights, because the
//              sum runs over rows; in bf16 they are rounded, as a bf16 layer's are
#pragma once
#include "expand_vbmi2.h"
#include "gemm_micro.h"

namespace calora {
namespace {

constexpr int64_t kChunkColumns = 128;

// Columns [k, k + columns) of a block: codes in the dense layout, as they lie or expanded.
template <class V>
Block block_of(const Weight& w, int64_t tile, int64_t block, int64_t k, int64_t columns) {
  Block b;
  const Geometry& g = w.g;
  const uint8_t* packed = w.packed + tile * g.tile_bytes + block * g.block_bytes;
  b.columns = columns;
  if (w.pattern == Pattern::dense) {
    b.codes = packed + code_bytes(w.values, k);
  } else {
    uint8_t* codes = expanded_block(code_bytes(w.values, columns));
    expand_columns(w, tile, block, k, columns, codes);
    b.codes = codes;
  }
  for (int n = 0; n < kTileRows; n += V::kLanes) {
    V::store(b.scale + n, has_scales(w.values) ? block_scale<V>(w.values, w, tile, block, packed, n / V::kLanes) : V::set1(1.0f));
    if (w.zeros) {  // byte i: rows i and 16 + i
      const auto z = V::widen_u8(w.zeros + (tile * g.blocks + block) * kZeroBytes + n % 16);
      V::istore(b.zero + n, n < 16 ? V::iand(z, V::iset1(15)) : V::template shr32<4>(z));
    } else {
      V::istore(b.zero + n, V::iset1(zero_code(w.values)));
    }
  }
  return b;
}

template <class V>
Block block_of(const Weight& w, int64_t tile, int64_t block) {
  return block_of<V>(w, tile, block, 0, w.g.block_columns);
}

// Columns [k, k + columns) of a block as fp32. Of int8 and bf16, whose blocks are whole rows, what lies b.ahead bytes on is asked for.
template <class V>
void decode_fp32(Values values, const Block& b, int64_t k, int64_t columns, float* to) {
  for (int i = 0; i < V::kTileRegs; ++i) {
    const uint8_t* p = b.codes + code_bytes(values, k) + i * V::kBytes;
    const uint8_t* next = b.codes + code_bytes(values, k) + b.ahead + i * code_bytes(values, columns) / V::kTileRegs;  // the pass's share
    float* out = to + i * V::kLanes;
    const auto zero = V::iload(b.zero + i * V::kLanes);
    if (values == Values::int4) {
      const auto low = V::iset1(15);
      for (int64_t c = 0; c < columns; c += 8, p += 128, out += 8 * kTileRows) {
        auto v = V::iload(p);
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j, v = V::template shr32<8>(v)) {
          V::store(out + j * kTileRows, V::to_float(V::isub(V::iand(v, low), zero)));
          V::store(out + (4 + j) * kTileRows, V::to_float(V::isub(V::iand(V::template shr32<4>(v), low), zero)));
        }
      }
    } else if (values == Values::nf4) {
      for (int64_t c = 0; c < columns; c += 8, p += 128, out += 8 * kTileRows) {
        auto v = V::iload(p);
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j, v = V::template shr32<8>(v)) {
          V::store(out + j * kTileRows, lookup16(kNf4Tables.values, v));
          V::store(out + (4 + j) * kTileRows, lookup16(kNf4Tables.values, V::template shr32<4>(v)));
        }
      }
    } else if (values == Values::int8) {
      const auto low = V::iset1(255);
      for (int64_t c = 0; c < columns; c += 4, p += 128, out += 4 * kTileRows, next += V::kBytes) {
        prefetch(next);
        auto v = V::iload(p);
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j, v = V::template shr32<8>(v)) V::store(out + j * kTileRows, V::to_float(V::isub(V::iand(v, low), zero)));
      }
    } else {
      const auto high = V::iset1(static_cast<int>(0xffff0000u));
      for (int64_t c = 0; c < columns; c += 2, p += 128, out += 2 * kTileRows, next += V::kBytes) {
        prefetch(next);
        const auto v = V::iload(p);
        V::store(out, V::as_float(V::template shl32<16>(v)));
        V::store(out + kTileRows, V::as_float(V::iand(v, high)));
      }
    }
  }
}

// Columns [k, k + columns) of a block of codes as pairs of bf16: columns (0, 2), (1, 3) of every four. (bf16 weights lie as
// pairs (0, 1), (2, 3) and need no decoding.)
template <class V>
void decode_bf16(Values values, const Block& b, int64_t k, int64_t columns, float* to) {
  using I = typename V::I;
  alignas(64) static constexpr uint16_t kIntegers[32] = {  // bf16 of a 5-bit two's complement number
      0x0000, 0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0, 0x4100, 0x4110, 0x4120, 0x4130, 0x4140, 0x4150, 0x4160, 0x4170,
      0xc180, 0xc170, 0xc160, 0xc150, 0xc140, 0xc130, 0xc120, 0xc110, 0xc100, 0xc0e0, 0xc0c0, 0xc0a0, 0xc080, 0xc040, 0xc000, 0xbf80};
  for (int i = 0; i < V::kTileRegs; ++i) {
    const uint8_t* p = b.codes + code_bytes(values, k) + i * V::kBytes;
    float* out = to + i * V::kLanes;
    if (values == Values::int4) {
      const I table = V::iload(kIntegers), low = V::iset1_16(15), zero = V::iload(b.zero + i * V::kLanes);
      const I minus = V::isub(V::izero(), zero);  // of a 32-bit lane; its low half twice:
      const I offset = V::ixor(V::iand(minus, V::iset1(0xffff)), V::template shl32<16>(minus));
      auto put = [&](int64_t step, I code) { V::istore(out + step * kTileRows, V::lookup32_16(table, V::iadd16(V::iand(code, low), offset))); };
      for (int64_t c = 0; c < columns; c += 8, p += 128, out += 4 * kTileRows) {
        const I v = V::iload(p);
        put(0, v), put(1, V::template shr16<8>(v)), put(2, V::template shr16<4>(v)), put(3, V::template shr16<12>(v));
      }
    } else if (values == Values::nf4) {
      const I table = V::iload(kNf4Tables.bf16);
      auto put = [&](int64_t step, I code) { V::istore(out + step * kTileRows, V::lookup32_16(table, code)); };
      for (int64_t c = 0; c < columns; c += 8, p += 128, out += 4 * kTileRows) {
        const I v = V::iload(p);
        put(0, v), put(1, V::template shr16<8>(v)), put(2, V::template shr16<4>(v)), put(3, V::template shr16<12>(v));
      }
    } else {
      const I low = V::iset1(255), zero = V::iset1(kInt8Zero), high = V::iset1(static_cast<int>(0xffff0000u));
      auto put = [&](int64_t step, I first, I second) {  // both as fp32, whose low halves are 0
        const I a = (I)V::to_float(V::isub(V::iand(first, low), zero)), c = (I)V::to_float(V::isub(V::iand(second, low), zero));
        V::istore(out + step * kTileRows, V::ixor(V::template shr32<16>(a), V::iand(c, high)));
      };
      for (int64_t c = 0; c < columns; c += 4, p += 128, out += 2 * kTileRows) {
        const I v = V::iload(p);
        put(0, v, V::template shr32<16>(v)), put(1, V::template shr32<8>(v), V::template shr32<24>(v));
      }
    }
  }
}

// Two fp32 weights of each lane as a pair of bf16, rounded to nearest even.
inline __m256i join_bf16(__m256 first, __m256 second) {
  auto rounded = [](__m256 v) {
    const __m256i bits = _mm256_castps_si256(v), odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    return _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
  };
  return _mm256_blend_epi16(_mm256_srli_epi32(rounded(first), 16), rounded(second), 0xaa);
}

// The 32 rows of a tile by columns [k, k + 32) as weights: (32 rows, 32 columns) fp32, or (16 pairs of rows, 32 columns) bf16.
// 256-bit vectors on every rung: each row is a few scattered words.
template <class V, Values values, bool bf16>
void decode_transposed(const Weight& w, int64_t tile, int64_t k, float* to) {
  const Block b = block_of<V>(w, tile, k / w.g.block_columns, k % w.g.block_columns, kColumnAlign);
  auto word = [](const uint8_t* at) {
    int32_t v;
    std::memcpy(&v, at, sizeof v);
    return v;
  };
  auto weights = [&](int r, int c) {  // of row r, columns [c, c + 8)
    const uint8_t* p = b.codes + 4 * r + code_bytes(values, c);
    const __m256i zero = _mm256_set1_epi32(b.zero[r]);
    if constexpr (values == Values::bf16) {
      const __m128i pairs = _mm_setr_epi32(word(p), word(p + 128), word(p + 256), word(p + 384));
      return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(pairs), 16));
    } else if constexpr (values == Values::int8) {
      const __m128i bytes = _mm_insert_epi32(_mm_cvtsi32_si128(word(p)), word(p + 128), 1);
      return _mm256_mul_ps(_mm256_cvtepi32_ps(_mm256_sub_epi32(_mm256_cvtepu8_epi32(bytes), zero)), _mm256_set1_ps(b.scale[r]));
    } else {
      const __m256i shifts = _mm256_setr_epi32(0, 8, 16, 24, 4, 12, 20, 28);
      const __m256i codes = _mm256_srlv_epi32(_mm256_set1_epi32(word(p)), shifts), code = _mm256_and_si256(codes, _mm256_set1_epi32(15));
      if constexpr (values == Values::nf4) return _mm256_mul_ps(lookup16(kNf4Tables.values, code), _mm256_set1_ps(b.scale[r]));
      return _mm256_mul_ps(_mm256_cvtepi32_ps(_mm256_sub_epi32(code, zero)), _mm256_set1_ps(b.scale[r]));
    }
  };
  for (int r = 0; r < kTileRows; r += bf16 ? 2 : 1, to += kColumnAlign)
    for (int c = 0; c < kColumnAlign; c += 8) {
      if constexpr (bf16) _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + c), join_bf16(weights(r, c), weights(r + 1, c)));
      else _mm256_storeu_ps(to + c, weights(r, c));
    }
}

template <class V, bool bf16>
void decode_transposed(const Weight& w, int64_t tile, int64_t k, float* to) {
  if (w.values == Values::int4) decode_transposed<V, Values::int4, bf16>(w, tile, k, to);
  else if (w.values == Values::nf4) decode_transposed<V, Values::nf4, bf16>(w, tile, k, to);
  else if (w.values == Values::int8) decode_transposed<V, Values::int8, bf16>(w, tile, k, to);
  else decode_transposed<V, Values::bf16, bf16>(w, tile, k, to);
}

}  // namespace
}  // namespace calora
