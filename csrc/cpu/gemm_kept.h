// Prefill of unstructured weights with int8 activations, where there is vpexpandb: int8, and int4 in pairs of rows. The first panel of
// a unit expands a piece of a tile as it multiplies and leaves it in L1 for the others; then the next piece.
//
// Pairs stay pairs: 64 bytes are 4 columns of 32 rows, and whole bytes and bytes without their low nibble are multiplied
// (decode_bitmask.h). Per 128 weights that is one `and` a panel, where dense codes take two and a shift, and the expansion puts no
// nibble to its place.
#pragma once
#include "expand_vbmi2.h"
#include "gemm_micro.h"

namespace calora {
namespace {

#ifdef __AVX512VBMI2__

constexpr int64_t kKeptColumns = 512;  // of int8: 16 KB, so that integer sums are loaded and stored seldom
constexpr int64_t kKeptAhead = 4096;    // bytes

// Columns of a block of a tile, whose codes are expanded by the first panel and read by the others.
struct Piece {
  const Weight& w;
  int64_t tile, first_chunk, chunks;
  const uint8_t* mask;  // of the first chunk
  uint8_t* codes;       // 32 rows, 4 columns a step: whole bytes, or pairs
};

template <bool pairs>
Piece piece_of(const Weight& w, int64_t tile, int64_t block, int64_t k, int64_t columns, uint8_t* codes) {
  const uint8_t* mask = w.packed + tile * w.g.tile_bytes + block * w.g.block_bytes + k / kTurnColumns * (pairs ? kPairMaskBytes : kMaskBytes);
  return {w, tile, (block * w.g.block_columns + k) / kTurnColumns, columns / kTurnColumns, mask, codes};
}

// What a panel does with the codes of a piece: put them to their places on the way, and ask for what comes next, so that the multiplications wait
// for no expansion and for no memory; the first of several leaves them in L1 for the others, which find them there.
enum class Role { alone, first, later };

// R rows of x by the piece.
template <class V, bool pairs, Role role, int R>
inline __attribute__((always_inline)) void kept_dots(const Piece& p, const int8_t* x, typename V::I (&sum)[R][2]) {
  constexpr bool expands = role != Role::later;
  const auto high = V::iset1_8(static_cast<char>(0xf0)), middle = V::iset1_8(static_cast<char>(pairs ? 0x11 * kInt4Zero : kInt8Zero));
  const uint8_t* mask = p.mask;
  uint8_t* codes = p.codes;
  for (int64_t c = 0; c < p.chunks; ++c) {
    const uint8_t* from = expands ? p.w.chunk(p.tile, p.first_chunk + c) : nullptr;
    auto next = [&]() __attribute__((always_inline)) {
      if constexpr (!expands) return V::iload(codes);
      prefetch(from + kKeptAhead);
      const auto v = next_bytes(load_bits(mask), from, middle);
      if constexpr (role == Role::first) V::istore(codes, v);
      return v;
    };
    if (expands) prefetch(mask + kTurnsAhead), prefetch(mask + kTurnsAhead + (pairs ? 0 : 64));
#pragma GCC unroll 8
    for (int s = 0; s < kTurnColumns / 4; ++s, x += 4 * R) {
      const auto first = next();
      mask += 8, codes += 64;
      auto last = first;
      if constexpr (pairs) last = V::iand(first, high);
      else last = next(), mask += 8, codes += 64;
      int_step<V, true, R>(sum, first, last, x);
    }
  }
}

// A whole block in pairs.
template <class V, Role role, int R>
__attribute__((noinline)) void pair_panel(const Piece& p, typename V::F first, typename V::F last, const int8_t* x, const float* unit, const int32_t* from, float* acc) {
  typename V::I sum[R][2];  // of whole bytes, and of high nibbles times 16: without the middles, as of int_pair
#pragma GCC unroll 12
  for (int r = 0; r < R; ++r) {
    const auto low = static_cast<uint32_t>(from[r]);
    sum[r][0] = V::iset1(static_cast<int32_t>(17 * low)), sum[r][1] = V::iset1(static_cast<int32_t>(16 * low));
  }
  kept_dots<V, true, role, R>(p, x, sum);
  last = V::mul(last, V::set1(1.0f / 16));
#pragma GCC unroll 12
  for (int r = 0; r < R; ++r) {
    const auto scale = V::set1(unit[r]);
    float* y = acc + r * kTileRows;
    V::store(y, V::fma(V::to_float(V::isub(sum[r][0], sum[r][1])), V::mul(scale, first), V::load(y)));
    V::store(y + V::kLanes, V::fma(V::to_float(sum[r][1]), V::mul(scale, last), V::load(y + V::kLanes)));
  }
}

// A piece of a row of int8: onto (R, 32) integer sums.
template <class V, Role role, int R>
__attribute__((noinline)) void byte_panel(const Piece& p, const int8_t* x, int32_t* sums) {
  typename V::I sum[R][2];
#pragma GCC unroll 12
  for (int r = 0; r < R; ++r) sum[r][0] = V::iload(sums + r * kTileRows), sum[r][1] = V::iload(sums + r * kTileRows + V::kLanes);
  kept_dots<V, false, role, R>(p, x, sum);
#pragma GCC unroll 12
  for (int r = 0; r < R; ++r) V::istore(sums + r * kTileRows, sum[r][0]), V::istore(sums + r * kTileRows + V::kLanes, sum[r][1]);
}

template <class V, int R, class U>
void add_pairs(const LinearArgs& a, int64_t tile, U& u) {
  const Geometry& g = a.w.g;
  uint8_t* codes = expanded_block(code_bytes(Values::int4, g.block_columns));
  for (int64_t b = 0; b < g.blocks; ++b) {
    const Piece p = piece_of<true>(a.w, tile, b, 0, g.block_columns, codes);
    const uint8_t* packed = a.w.packed + tile * g.tile_bytes + b * g.block_bytes;
    const auto first = block_scale<V>(a.w, packed, 0), last = block_scale<V>(a.w, packed, 1);
    for (int64_t i = 0; i < u.count; ++i) {
      const int64_t panel = u.first + i, at = (panel * g.blocks + b) * R;
      const auto multiply = i ? pair_panel<V, Role::later, R> : u.count > 1 ? pair_panel<V, Role::first, R> : pair_panel<V, Role::alone, R>;
      multiply(p, first, last, a.xq + (panel * g.columns + b * g.block_columns) * R, a.x_scale + at, a.x_sum + at, u.panel(i));
    }
  }
}

template <class V, int R, class U>
void add_kept_bytes(const LinearArgs& a, int64_t tile, U& u) {
  const Geometry& g = a.w.g;
  alignas(64) uint8_t codes[kKeptColumns * kTileRows];
  alignas(64) int32_t sums[kMaxBlockPanels * R * kTileRows];
  for (int64_t r = 0; r < u.count * R; ++r)
    for (int n = 0; n < kTileRows; n += V::kLanes)
      V::istore(sums + r * kTileRows + n, V::iset1(a.x_sum[u.first * R + r]));
  for (int64_t k = 0; k < g.columns; k += kKeptColumns) {
    const Piece p = piece_of<false>(a.w, tile, 0, k, g.columns - k < kKeptColumns ? g.columns - k : kKeptColumns, codes);
    for (int64_t i = 0; i < u.count; ++i) {
      const auto multiply = i ? byte_panel<V, Role::later, R> : u.count > 1 ? byte_panel<V, Role::first, R> : byte_panel<V, Role::alone, R>;
      multiply(p, a.xq + ((u.first + i) * g.columns + k) * R, sums + i * R * kTileRows);
    }
  }
  for (int n = 0; n < kTileRows; n += V::kLanes) {
    const auto scale = block_scale<V>(a.w, a.w.packed + tile * g.tile_bytes, n / V::kLanes);
    for (int64_t r = 0; r < u.count * R; ++r) {
      float* y = u.sums + r * kTileRows + n;
      V::store(y, V::fma(V::to_float(V::iload(sums + r * kTileRows + n)), V::mul(V::set1(a.x_scale[u.first * R + r]), scale), V::load(y)));
    }
  }
}

#endif

}  // namespace
}  // namespace calora
