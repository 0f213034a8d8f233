// The micro-kernels of prefill: R rows of x times a tile of 32 rows of W, over one block of columns, onto fp32 sums in L1.
//
//     acc[r][0..31]  +=  unit[r] * scale_w[0..31] * (from[r] + integer sum over the block)    int_panel
//     acc[r][0..31]  +=  scale_w[0..31] * (fp32 sum over the chunk)                       float_panel
//
// Each keeps 2 registers of weights by up to 12 rows (32 registers) or 6 rows (16 registers) of sums live; x is broadcast
// from its panel. Nibbles are unpacked in registers between the multiplications, which leave enough slots: a decoded copy
// in L1 costs as many loads and, where M is small, stores that nothing hides.
#pragma once
#include "../kernels.h"
#include "values.h"

namespace calora {
namespace {

#define CALORA_INLINE inline __attribute__((always_inline))
#define CALORA_UNROLL _Pragma("GCC unroll 16")

// Keeps a sum in one register. Without it GCC 12 schedules the products apart from their sums, and spills half of them.
template <class T>
CALORA_INLINE void pin(T& a, T& b) { asm("" : "+v"(a), "+v"(b)); }

template <class V>
CALORA_INLINE typename V::I broadcast4(const void* p) {
  int32_t v;
  std::memcpy(&v, p, sizeof v);
  return V::iset1(v);
}

// Whether sums are of 32 bits all along, or first of 16.
template <class V, Values values>
constexpr bool kSum32 = V::kVnni || values == Values::nf4;

// Four columns: acc[r] += w . x[r]. Sums of 16 bits hold 8 steps of codes up to 15.
template <class V, bool sum32, int RS>
CALORA_INLINE void int_step(typename V::I (&acc)[RS][2], typename V::I w0, typename V::I w1, const int8_t* x) {
  CALORA_UNROLL
  for (int r = 0; r < RS; ++r) {
    const auto xr = broadcast4<V>(x + 4 * r);
    if constexpr (sum32) {
      acc[r][0] = dot4<V>(acc[r][0], w0, xr);
      acc[r][1] = dot4<V>(acc[r][1], w1, xr);
    } else {
      acc[r][0] = V::iadd16(acc[r][0], V::maddubs(w0, xr));
      acc[r][1] = V::iadd16(acc[r][1], V::maddubs(w1, xr));
    }
    pin(acc[r][0], acc[r][1]);
  }
}

// Columns of 4-bit codes: both nibbles of a byte. What lies `ahead` bytes on is asked for step by step: a burst of prefetches is
// served in part only.
template <class V, Values values, int RS, int R>
CALORA_INLINE void nibble_dots(const uint8_t* codes, const int8_t* x, int64_t columns, int64_t ahead, typename V::I (&acc)[RS][2]) {
  auto nibbles = [](typename V::I v) __attribute__((always_inline)) { return multipliers<V, values>(V::iand(v, V::iset1_8(15))); };
  for (int64_t k = 0; k < columns; k += 8, codes += 128, x += 8 * R) {
    _mm_prefetch(reinterpret_cast<const char*>(codes + ahead), _MM_HINT_T0);
    if constexpr (V::kBytes == 64) _mm_prefetch(reinterpret_cast<const char*>(codes + ahead + 64), _MM_HINT_T0);
    const auto p0 = V::iload(codes), p1 = V::iload(codes + V::kBytes);
    int_step<V, kSum32<V, values>, RS>(acc, nibbles(p0), nibbles(p1), x);
    int_step<V, kSum32<V, values>, RS>(acc, nibbles(V::template shr16<4>(p0)), nibbles(V::template shr16<4>(p1)), x + 4 * R);
  }
}

// Columns of int8 codes: whole bytes, or one of their nibbles. Where whole bytes take several passes, what is to come is asked for at
// `next`, in each pass its share. (Where they take one, the processor follows the stream, and asking slows it down.)
template <class V, int RS, int R, int nibble>
CALORA_INLINE void int8_dots(const uint8_t* codes, const int8_t* x, int64_t columns, const uint8_t* next, typename V::I (&acc)[RS][2]) {
  const auto low = V::iset1_8(15);
  for (int64_t k = 0; k < columns; k += 4, codes += 128, x += 4 * R) {
    if constexpr (V::kTileRegs == 4 && nibble < 0) _mm_prefetch(reinterpret_cast<const char*>(next + 8 * k), _MM_HINT_T0);
    auto p0 = V::iload(codes), p1 = V::iload(codes + V::kBytes);
    if constexpr (nibble == 1) p0 = V::template shr16<4>(p0), p1 = V::template shr16<4>(p1);
    if constexpr (nibble >= 0) p0 = V::iand(p0, low), p1 = V::iand(p1, low);
    int_step<V, V::kVnni, RS>(acc, p0, p1, x);
  }
}

// Without VNNI: int16 sums of 32 columns at a time, added to int32 sums in memory with weight `times`.
template <class V, int RS, class Dots>
CALORA_INLINE void add_int16_dots(int32_t (*sums)[2 * V::kLanes], short times, Dots dots) {
  typename V::I acc[RS][2];
  CALORA_UNROLL
  for (int r = 0; r < RS; ++r) acc[r][0] = acc[r][1] = V::izero();
  dots(acc);
  const auto factor = V::iset1_16(times);
  CALORA_UNROLL
  for (int r = 0; r < RS; ++r) {
    V::istore(sums[r], V::iadd(V::iload(sums[r]), V::madd(acc[r][0], factor)));
    V::istore(sums[r] + V::kLanes, V::iadd(V::iload(sums[r] + V::kLanes), V::madd(acc[r][1], factor)));
  }
}

// One block of codes of a tile, beside its scales and zero points.
struct Block {
  const uint8_t* codes;
  int64_t columns;
  int64_t ahead = 0;  // bytes behind the codes that are multiplied, where what comes next is asked for
  alignas(64) float scale[kTileRows];
  alignas(64) int32_t zero[kTileRows];
};

// Columns [k, end) of RS rows of a panel of R by the registers `reg` and `reg + 1` of a tile. kept: the integer sums of all rows of the panel,
// where a block is multiplied in pieces.
template <class V, Values values, bool zeros, int RS, int R>
CALORA_INLINE void int_pair(const Block& w, int64_t k, int64_t end, const uint8_t* next, int reg, const int8_t* x, const float* unit, const int32_t* from,
                            int32_t (*kept)[kTileRows], float* acc) {
  using I = typename V::I;
  constexpr int L = V::kLanes;
  const uint8_t* codes = w.codes + code_bytes(values, k) + reg * V::kBytes;
  const int n = reg * L;
  x += k * R;
  // The zero point is folded in: sum (code - zero) x = sum code x - zero * sum x. Sums wrap, and end up in range.
  auto start = [&](int r, int v) __attribute__((always_inline)) {
    if (k) return V::iload(kept[r] + n + v * L);
    if constexpr (zeros) return V::imul(V::iload(w.zero + n + v * L), V::iset1(from[r]));
    else return V::iset1(from[r]);
  };
  I sum[RS][2];
  if constexpr (kSum32<V, values>) {
    CALORA_UNROLL
    for (int r = 0; r < RS; ++r) sum[r][0] = start(r, 0), sum[r][1] = start(r, 1);
    if constexpr (has_groups(values)) nibble_dots<V, values, RS, R>(codes, x, end - k, w.ahead, sum);
    else int8_dots<V, RS, R, -1>(codes, x, end - k, next, sum);
  } else {
    alignas(64) int32_t sums[RS][2 * L];
    for (int r = 0; r < RS; ++r) V::istore(sums[r], start(r, 0)), V::istore(sums[r] + L, start(r, 1));
    for (int64_t i = 0; i < end - k; i += 32, x += 32 * R) {
      if constexpr (values == Values::int4) {
        add_int16_dots<V, RS>(sums, 1, [&](I(&part)[RS][2]) __attribute__((always_inline)) { nibble_dots<V, values, RS, R>(codes + 16 * i, x, 32, w.ahead, part); });
      } else {  // vpmaddubsw saturates on bytes, not on nibbles: code = 16 * high + low
        add_int16_dots<V, RS>(sums, 1, [&](I(&part)[RS][2]) __attribute__((always_inline)) { int8_dots<V, RS, R, 0>(codes + 32 * i, x, 32, next, part); });
        add_int16_dots<V, RS>(sums, 16, [&](I(&part)[RS][2]) __attribute__((always_inline)) { int8_dots<V, RS, R, 1>(codes + 32 * i, x, 32, next, part); });
      }
    }
    CALORA_UNROLL
    for (int r = 0; r < RS; ++r) sum[r][0] = V::iload(sums[r]), sum[r][1] = V::iload(sums[r] + L);
  }
  if (end < w.columns) {
    CALORA_UNROLL
    for (int r = 0; r < RS; ++r) V::istore(kept[r] + n, sum[r][0]), V::istore(kept[r] + n + L, sum[r][1]);
    return;
  }
  const auto s0 = V::load(w.scale + n), s1 = V::load(w.scale + n + L);
  CALORA_UNROLL
  for (int r = 0; r < RS; ++r) {
    const auto sx = V::set1(unit[r]);
    float* y = acc + r * kTileRows + n;
    V::store(y, V::fma(V::to_float(sum[r][0]), V::mul(sx, s0), V::load(y)));
    V::store(y + L, V::fma(V::to_float(sum[r][1]), V::mul(sx, s1), V::load(y + L)));
  }
}

// Of int8, whose blocks are whole rows, with VNNI: so much at a time that of four passes three find it in L1, while the next is asked for.
constexpr int64_t kPieceColumns = 256;

// One block of a tile by one panel. Not inlined: register allocation then sees nothing else.
template <class V, Values values, bool zeros, int R>
__attribute__((noinline)) void int_panel(const Block& w, const int8_t* x, const float* unit, const int32_t* from, float* acc) {
  constexpr int A = (R + 1) / 2, B = R / 2;
  if constexpr (V::kTileRegs == 2) {
    int_pair<V, values, zeros, R, R>(w, 0, w.columns, w.codes, 0, x, unit, from, nullptr, acc);
  } else if constexpr (!V::kVnni || values != Values::int8) {
    for (int reg = 0; reg < V::kTileRegs; reg += 2) {
      int_pair<V, values, zeros, A, R>(w, 0, w.columns, w.codes, reg, x, unit, from, nullptr, acc);
      int_pair<V, values, zeros, B, R>(w, 0, w.columns, w.codes, reg, x + 4 * A, unit + A, from + A, nullptr, acc + A * kTileRows);
    }
  } else {
    alignas(64) int32_t kept[R][kTileRows];
    for (int64_t k = 0; k < w.columns; k += kPieceColumns) {
      const int64_t end = w.columns - k < kPieceColumns ? w.columns : k + kPieceColumns, quarter = code_bytes(values, end - k) / 4;
      const uint8_t* next = w.codes + code_bytes(values, end);
      for (int reg = 0; reg < V::kTileRegs; reg += 2, next += 2 * quarter) {
        int_pair<V, values, zeros, A, R>(w, k, end, next, reg, x, unit, from, kept, acc);
        int_pair<V, values, zeros, B, R>(w, k, end, next + quarter, reg, x + 4 * A, unit + A, from + A, kept + A, acc + A * kTileRows);
      }
    }
  }
}

// fp32 products, or pairs of bf16 products, of `steps` rows of 32 lanes with x. Lane r of step s of x: x[s * step + r * row].
template <class V, bool bf16, int RS>
CALORA_INLINE void float_pair(const float* w, const float* scale, int64_t steps, const float* x, int64_t step, int64_t row, float* acc) {
  constexpr int L = V::kLanes;
  typename V::F sum[RS][2];
  CALORA_UNROLL
  for (int r = 0; r < RS; ++r) sum[r][0] = sum[r][1] = V::zero();
  for (int64_t s = 0; s < steps; ++s, w += kTileRows, x += step) {
    if constexpr (bf16) {
      const auto w0 = V::iload(w), w1 = V::iload(w + L);
      CALORA_UNROLL
      for (int r = 0; r < RS; ++r) {
        const auto xr = broadcast4<V>(x + r * row);
        sum[r][0] = V::dot_bf16(sum[r][0], w0, xr);
        sum[r][1] = V::dot_bf16(sum[r][1], w1, xr);
        pin(sum[r][0], sum[r][1]);
      }
    } else {
      const auto w0 = V::load(w), w1 = V::load(w + L);
      CALORA_UNROLL
      for (int r = 0; r < RS; ++r) {
        const auto xr = V::set1(x[r * row]);
        sum[r][0] = V::fma(w0, xr, sum[r][0]);
        sum[r][1] = V::fma(w1, xr, sum[r][1]);
        pin(sum[r][0], sum[r][1]);
      }
    }
  }
  const auto s0 = V::load(scale), s1 = V::load(scale + L);
  CALORA_UNROLL
  for (int r = 0; r < RS; ++r) {
    float* y = acc + r * kTileRows;
    V::store(y, V::fma(sum[r][0], s0, V::load(y)));
    V::store(y + L, V::fma(sum[r][1], s1, V::load(y + L)));
  }
}

template <class V, bool bf16, int R>
CALORA_INLINE void float_rows(const float* w, const float* scale, int64_t steps, const float* x, int64_t step, int64_t row, float* acc) {
  if constexpr (V::kTileRegs == 2) {
    float_pair<V, bf16, R>(w, scale, steps, x, step, row, acc);
  } else {
    constexpr int A = (R + 1) / 2, B = R / 2;
    for (int n = 0; n < kTileRows; n += 2 * V::kLanes) {
      float_pair<V, bf16, A>(w + n, scale + n, steps, x, step, row, acc + n);
      float_pair<V, bf16, B>(w + n, scale + n, steps, x + A * row, step, row, acc + A * kTileRows + n);
    }
  }
}

// A decoded chunk of a tile, (steps, 32) lanes of fp32 or bf16 pairs, by one panel of x.
template <class V, bool bf16, int R>
__attribute__((noinline)) void float_panel(const float* w, const float* scale, int64_t steps, const float* x, float* acc) {
  float_rows<V, bf16, R>(w, scale, steps, x, R, 1, acc);
}

// acc += t U^T: R rows of t (row stride rank) by a turned chunk of U, (ranks, 32).
template <class V, int R>
__attribute__((noinline)) void up_panel(const float* up, const float* ones, int64_t ranks, const float* t, int64_t rank, float* acc) {
  float_rows<V, false, R>(up, ones, ranks, t, 1, rank, acc);
}

#undef CALORA_UNROLL
#undef CALORA_INLINE

}  // namespace
}  // namespace calora
