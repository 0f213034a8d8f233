// Decode (M <= kDecodeRows, of dense weights most_dense_rows): the packed weight streams by once and is multiplied as it comes.
//
//   runs of tiles (kStreams of them, or kOddStreams), one tile of each side by side -> blocks (one scale per row) -> turns -> packs of tiles -> steps
//
// A path says how long a step is (kStepBytes, kStepColumns) and how it is loaded and multiplied: IntPath (int8 activations), FloatPath (fp32), Bf16Path
// (vdpbf16ps). All of them leave the scale to the end of the block, so that it costs one multiplication per block and row
// instead of one per weight.
#pragma once
#include "../kernels.h"
#include "bank.h"
#include "prepare.h"
#include "values.h"

namespace calora {
namespace {

// A single stream stalls at every page: weights are mapped files with 4 KB pages, hardware prefetch stops at a page's end, and
// in a virtual machine a missed translation costs two nested page walks. So kStreams runs of tiles stream by side by side, and
// what comes next is asked for step by step, into L2 and not further ahead than the misses one core can have in flight: 2 KB
// ahead, or into L1, is slower by a fifth or more. Measured: benchmarks/NOTES.md.
constexpr int64_t kStreams = 4, kAhead = 1024;  // tiles; bytes
constexpr int64_t kOddStreams = 5;              // of a whole turn each, where there are registers for their sums: 2 to 10 % faster than four
constexpr int64_t kScalesAhead = 256;           // bytes: 8 blocks of nf4
constexpr int64_t kTurn = 4;                    // steps: blocks are whole turns, and int16 sums hold one
constexpr int64_t kLine = 64;                   // bytes

int load32(const void* p) {
  int v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

// The tiles that are multiplied together, by the same columns of x.
struct Turn {
  const uint8_t* const* codes;  // of each tile
  int64_t k;                    // first column
  int64_t steps;                // a multiple of kTurn
};

// body(codes of tile t, step, t) for every step and each of P tiles, prefetching on the first of the passes over them. Tiles take
// turns by steps, or by whole turns.
template <class Path, class V, int P, class Body>
__attribute__((always_inline)) inline void each_step(const Turn& turn, int first, Body body) {
  const uint8_t* codes[P];
#pragma GCC unroll 8
  for (int t = 0; t < P; ++t) codes[t] = turn.codes[t] + first * V::kBytes;
  constexpr int64_t kVisit = P == kOddStreams ? kTurn : 1;  // steps of a tile before the next has its turn
  for (int64_t turn_step = 0; turn_step < turn.steps; turn_step += kTurn) {
#pragma GCC unroll 4
    for (int64_t visit = 0; visit < kTurn; visit += kVisit)
#pragma GCC unroll 8
      for (int t = 0; t < P; ++t)
#pragma GCC unroll 4
        for (int64_t s = visit; s < visit + kVisit; ++s) {
          const int64_t step = turn_step + s;
          const uint8_t* p = codes[t] + step * Path::kStepBytes;
          if (first == 0)
#pragma GCC unroll 4
            for (int64_t i = 0; i < Path::kStepBytes; i += kLine) prefetch(p + kAhead + i);
          body(p, step, t);
        }
  }
}

// Computes these sums here: left alone, GCC forms the products of all steps first and spills them (36 -> 48 GB/s in cache).
template <int M, int R, class T>
__attribute__((always_inline)) inline void keep_order(T (&rows)[M][R]) {
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
    for (int i = 0; i < R; ++i) asm volatile("" : "+v"(rows[m][i]));
}

template <int M, int R, class T>
__attribute__((always_inline)) inline void clear(T (&rows)[M][R], T value) {
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
    for (int i = 0; i < R; ++i) rows[m][i] = value;
}

// The sums of P tiles by G registers, in registers for a turn: to[t][m][i] = from[t][m][first_from + i].
template <int P, int M, int G, int A, int B, class T>
__attribute__((always_inline)) inline void copy(const T (*from)[M][A], int first_from, T (*to)[M][B], int first_to) {
#pragma GCC unroll 8
  for (int t = 0; t < P; ++t)
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
      for (int i = 0; i < G; ++i) to[t][m][first_to + i] = from[t][m][first_from + i];
}

// Registers of sums: as many as leave room for weights and temporaries. Of one tile as many as fit, then of several tiles,
// which share the broadcasts of x and hide the latency of each other's additions.
template <class V>
constexpr int kSumRegs = V::kLanes == 16 ? 16 : 8;  // of 32 and 16
template <class V, int M>
constexpr int group_regs() {
  return M * V::kTileRegs <= kSumRegs<V> ? V::kTileRegs : M * 2 <= kSumRegs<V> ? 2 : 1;
}
template <class V, int M>
constexpr int pack_tiles() {
  int tiles = 1;
  while (2 * tiles <= kStreams && 2 * tiles * M * group_regs<V, M>() <= kSumRegs<V>) tiles *= 2;
  return tiles;
}

// Runs that stream side by side. (At M = 2, 4-bit codes of five tiles are up to 8 % slower than of four.)
template <class V, int M, Values values>
constexpr int64_t dense_runs() { return V::kLanes == 16 && (M == 1 || (M == 2 && !has_groups(values))) ? kOddStreams : kStreams; }
template <class V, int M, int64_t runs>
constexpr int packed_tiles() { return runs == kOddStreams ? kOddStreams : pack_tiles<V, M>(); }

// Zero points minus 8 of the rows of register i in a tile's block.
template <class V>
typename V::F zero_offset(const Weight& w, int64_t tile, int64_t block, int i) {
  const uint8_t* z = w.zeros + (tile * w.g.blocks + block) * kZeroBytes + i * V::kLanes % 16;
  const auto bytes = V::widen_u8(z);
  const auto nibble = i * V::kLanes < 16 ? V::iand(bytes, V::iset1(15)) : V::template shr32<4>(bytes);
  return V::to_float(V::isub(nibble, V::iset1(kInt4Zero)));
}

// ---- int8 activations -------------------------------------------------------------------------------------------------

// Sums of (unsigned code) * xq; the zero point leaves at the end of the block as zero * x_sum. Integers: exact in any order.
// Of nf4, codes are looked up when they are unpacked, and are then as those of int8.
template <class V, int M, Values values>
struct IntPath {
  using Acc = typename V::I;
  using Sums = Acc[M][V::kTileRegs];
  static constexpr int64_t kStepBytes = 128, kStepColumns = has_groups(values) ? 8 : 4;
  static constexpr bool kShortTurns = !V::kVnni && values == Values::int4;
  // As many runs as tiles are multiplied together, where arithmetic takes as long as memory: taking turns costs a fifth there.
  static constexpr int64_t kRuns = V::kVnni && V::kLanes == 16 && pack_tiles<V, M>() == 2 ? 2 : dense_runs<V, M, values>();
  static Acc none() { return V::izero(); }

  template <int P, int G>
  static void multiply(const LinearArgs& a, const Turn& turn, int first, Sums* sum) {
    if constexpr (V::kVnni) dot<P, G>(a, turn, first, sum);
    else if constexpr (values == Values::nf4) signed_bytes<P, G>(a, turn, first, sum);
    else if constexpr (values == Values::int4) nibbles<P, G>(a, turn, first, sum);
    else bytes<P, G>(a, turn, first, sum);
  }

  // x of row m, four columns from `column` of the turn, in every lane.
  static Acc four(const LinearArgs& a, const Turn& turn, int m, int64_t column) {
    return V::iset1(load32(a.xq + turn.k + m * a.w.g.columns + column));
  }

  template <int G>
  static void split(const uint8_t* p, Acc (&lo)[G], Acc (&hi)[G]) {
    const Acc low = V::iset1_8(15);
#pragma GCC unroll 4
    for (int g = 0; g < G; ++g) {
      const Acc w = V::iload(p + g * V::kBytes);
      lo[g] = multipliers<V, values>(V::iand(w, low)), hi[g] = multipliers<V, values>(V::iand(V::template shr16<4>(w), low));
    }
  }

  template <int P, int G>
  static void dot(const LinearArgs& a, const Turn& turn, int first, Sums* sum) {
    Acc acc[P][M][G];
    copy<P, M, G>(sum, first, acc, 0);
    each_step<IntPath, V, P>(turn, first, [&](const uint8_t* p, int64_t step, int t) __attribute__((always_inline)) {
      if constexpr (values == Values::int8) {
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m) {
          const Acc v = four(a, turn, m, 4 * step);
#pragma GCC unroll 4
          for (int g = 0; g < G; ++g) acc[t][m][g] = V::dot(acc[t][m][g], V::iload(p + g * V::kBytes), v);
        }
      } else {
        Acc lo[G], hi[G];
        split(p, lo, hi);
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m) {
          const Acc v0 = four(a, turn, m, 8 * step), v1 = four(a, turn, m, 8 * step + 4);
#pragma GCC unroll 4
          for (int g = 0; g < G; ++g) acc[t][m][g] = V::dot(V::dot(acc[t][m][g], lo[g], v0), hi[g], v1);
        }
      }
      keep_order(acc[t]);
    });
    copy<P, M, G>(acc, 0, sum, first);
  }

  // int4 without VNNI: 8 results of vpmaddubsw (<= 15 * 127 * 2 each) fit 16 bits, one kTurn; columns come in 32s for this.
  template <int P, int G>
  static void nibbles(const LinearArgs& a, const Turn& turn, int first, Sums* sum) {
    Acc part[P][M][G];
#pragma GCC unroll 8
    for (int t = 0; t < P; ++t) clear(part[t], V::izero());
    each_step<IntPath, V, P>(turn, first, [&](const uint8_t* p, int64_t step, int t) __attribute__((always_inline)) {
      Acc lo[G], hi[G];
      split(p, lo, hi);
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m) {
        const Acc v0 = four(a, turn, m, 8 * step), v1 = four(a, turn, m, 8 * step + 4);
#pragma GCC unroll 4
        for (int g = 0; g < G; ++g)
          part[t][m][g] = V::iadd16(part[t][m][g], V::iadd16(V::maddubs(lo[g], v0), V::maddubs(hi[g], v1)));
      }
      keep_order(part[t]);
    });
#pragma GCC unroll 8
    for (int t = 0; t < P; ++t)
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
        for (int g = 0; g < G; ++g) sum[t][m][first + g] = V::iadd(sum[t][m][first + g], V::madd(part[t][m][g], V::iset1_16(1)));
  }

  // nf4 without VNNI, register by register: 15 operations for two products, which leave no registers for a second pair.
  template <int P, int G>
  static void signed_bytes(const LinearArgs& a, const Turn& turn, int first, Sums* sum) {
    Acc acc[P][M][G];
    copy<P, M, G>(sum, first, acc, 0);
    each_step<IntPath, V, P>(turn, first, [&](const uint8_t* p, int64_t step, int t) __attribute__((always_inline)) {
#pragma GCC unroll 4
      for (int g = 0; g < G; ++g) {
        Acc lo[1], hi[1];
        split(p + g * V::kBytes, lo, hi);
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m)
          acc[t][m][g] = dot4<V>(dot4<V>(acc[t][m][g], lo[0], four(a, turn, m, 8 * step)), hi[0], four(a, turn, m, 8 * step + 4));
        keep_order(acc[t]);
      }
    });
    copy<P, M, G>(acc, 0, sum, first);
  }

  // int8 without VNNI: vpmaddubsw saturates at 255 * 127 * 2. Even and odd columns as 16-bit halves do not, and need no
  // horizontal sum.
  template <int P, int G>
  static void bytes(const LinearArgs& a, const Turn& turn, int first, Sums* sum) {
    Acc acc[P][M][G];
    copy<P, M, G>(sum, first, acc, 0);
    each_step<IntPath, V, P>(turn, first, [&](const uint8_t* p, int64_t step, int t) __attribute__((always_inline)) {
      Acc even[G], odd[G];
#pragma GCC unroll 4
      for (int g = 0; g < G; ++g) {
        const Acc w = V::iload(p + g * V::kBytes);
        even[g] = V::iand(w, V::iset1_16(0xff)), odd[g] = V::template shr16<8>(w);
      }
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m) {
        const Acc v = four(a, turn, m, 4 * step);
        const Acc x_even = V::template sar16<8>(V::template shl16<8>(v)), x_odd = V::template sar16<8>(v);
#pragma GCC unroll 4
        for (int g = 0; g < G; ++g)
          acc[t][m][g] = V::iadd(acc[t][m][g], V::iadd(V::madd(even[g], x_even), V::madd(odd[g], x_odd)));
      }
      keep_order(acc[t]);
    });
    copy<P, M, G>(acc, 0, sum, first);
  }

  static void end_block(const LinearArgs& a, int64_t tile, int64_t block, const uint8_t* p, const Acc (&sum)[M][V::kTileRegs],
                        typename V::F (&y)[M][V::kTileRegs]) {
    const int64_t blocks = a.w.g.blocks;
#pragma GCC unroll 4
    for (int i = 0; i < V::kTileRegs; ++i) {
      const auto scale = V::mul(block_scale<V>(values, a.w, tile, block, p, i), V::set1(unit_of(values)));
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m) {
        const int x_sum = a.x_sum[m * blocks + block];
        auto v = V::to_float(V::isub(sum[m][i], V::iset1(kOffset<V, values> * x_sum)));
        if (a.w.zeros) v = V::fma(zero_offset<V>(a.w, tile, block, i), V::set1(-static_cast<float>(x_sum)), v);
        y[m][i] = V::fma(v, V::mul(scale, V::set1(a.x_scale[m * blocks + block])), y[m][i]);
      }
    }
  }
};

// ---- exact activations ------------------------------------------------------------------------------------------------

// y += scale * (sum - (zero - 8) * sum of x): the zero point leaves once per block.
template <class V, int M, class Path>
void end_float_block(const LinearArgs& a, int64_t tile, int64_t block, const uint8_t* p,
                     const typename V::F (&sum)[M][V::kTileRegs], typename V::F (&y)[M][V::kTileRegs]) {
  if (!has_scales(a.w.values)) {
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
      for (int i = 0; i < V::kTileRegs; ++i) y[m][i] = V::add(y[m][i], sum[m][i]);
    return;
  }
  float x_sum[M] = {};
  if (a.w.zeros)
    for (int m = 0; m < M; ++m) x_sum[m] = Path::x_sum(a, m, block);
#pragma GCC unroll 4
  for (int i = 0; i < V::kTileRegs; ++i) {
    const auto scale = block_scale<V>(a.w.values, a.w, tile, block, p, i);
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
      auto v = sum[m][i];
      if (a.w.zeros) v = V::fma(zero_offset<V>(a.w, tile, block, i), V::set1(-x_sum[m]), v);
      y[m][i] = V::fma(v, scale, y[m][i]);
    }
  }
}

// Sums of (code - middle) * x, or of the book's value * x, in fp32, one column at a time.
//
// With 256 bits int4 codes are multiplied where they lie in their lane, by x that was scaled for it (prepare.h): mask, conversion,
// product. The middle leaves every eight columns, which have sums of their own for it, not once a block: sums of the codes themselves
// would grow, and round, far more than those of the weights where x is not about 0. (512 bits: no gain at M = 1, a loss at 4 and 8. A look-up takes a shift and a permutation.)
template <class V, int M, Values values>
struct FloatPath {
  using Acc = typename V::F;
  using Sums = Acc[M][V::kTileRegs];
  static constexpr int64_t kStepBytes = 128, kStepColumns = has_groups(values) ? 8 : values == Values::int8 ? 4 : 2;
  static constexpr bool kShortTurns = false, kInPlace = multiplies_in_place<V>(values);
  // Steps of eight columns by M rows are long: where registers are few they are neither unrolled nor mixed, else the code leaves the
  // caches of instructions and GCC spills (M = 8: half the speed). As many runs as tiles are multiplied together then.
  static constexpr bool kShortCode = V::kLanes == 8 && has_groups(values);
  static constexpr int64_t kRuns = kShortCode && M == 1 ? pack_tiles<V, M>() : kStreams;
  static Acc none() { return V::zero(); }

  // Column c of a step, of kLanes rows: the code as fp32, minus its middle but for codes in their places.
  template <int c>
  static Acc column(typename V::I w) {
    constexpr int bit = c < 4 ? 8 * c : 8 * (c - 4) + 4;  // of 4-bit codes
    if constexpr (values == Values::bf16) {
      return V::as_float(c ? V::iand(w, V::iset1(static_cast<int>(0xffff0000))) : V::template shl32<16>(w));
    } else if constexpr (values == Values::int8) {  // w was turned into signed bytes
      return V::to_float(V::template sar32<24>(V::template shl32<24 - 8 * c>(w)));
    } else if constexpr (kInPlace) {
      return V::to_float(c == 7 ? V::template shr32<28>(w) : V::iand(w, V::iset1(15 << bit % 28)));
    } else {  // a look-up reads the low 4 bits only: no mask
      return lookup16(values == Values::nf4 ? kNf4Tables.values : kCodes, V::template shr32<bit>(w));
    }
  }
  alignas(64) static constexpr float kCodes[16] = {-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7};

  static typename V::I load(const uint8_t* p) {
    const auto w = V::iload(p);
    return values == Values::int8 ? V::ixor(w, V::iset1_8(static_cast<char>(0x80))) : w;
  }

  template <int P, int G>
  static void multiply(const LinearArgs& a, const Turn& turn, int first, Sums* sum) {
    Acc acc[P][M][G];
    copy<P, M, G>(sum, first, acc, 0);
    auto step_of = [&](const uint8_t* p, int64_t step, int t) __attribute__((always_inline)) {
      typename V::I w[G];
#pragma GCC unroll 4
      for (int g = 0; g < G; ++g) w[g] = load(p + g * V::kBytes);
      const float* x = a.xf + turn.k + step * kStepColumns;
      auto columns = [&](Acc(&to)[M][G]) __attribute__((always_inline)) {
        column_of<G, 0>(a, x, w, to), column_of<G, 1>(a, x, w, to);
        if constexpr (kStepColumns >= 4) column_of<G, 2>(a, x, w, to), column_of<G, 3>(a, x, w, to);
        if constexpr (kStepColumns == 8) {
          column_of<G, 4>(a, x, w, to), column_of<G, 5>(a, x, w, to);
          column_of<G, 6>(a, x, w, to), column_of<G, 7>(a, x, w, to);
        }
      };
      if constexpr (kInPlace) {
        Acc eight[M][G];
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
          for (int g = 0; g < G; ++g) eight[m][g] = V::set1(a.x_eights[(turn.k + m * a.w.g.columns) / 8 + step]);
        columns(eight);
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
          for (int g = 0; g < G; ++g) acc[t][m][g] = V::add(acc[t][m][g], eight[m][g]);
      } else {
        columns(acc[t]);
      }
      keep_order(acc[t]);
    };
    if constexpr (kShortCode) {
      for (int64_t step = 0; step < turn.steps; ++step)
#pragma GCC unroll 8
        for (int t = 0; t < P; ++t) {
          const uint8_t* p = turn.codes[t] + step * kStepBytes;
          if (first == 0) prefetch(p + kAhead), prefetch(p + kAhead + kLine);
          step_of(p + first * V::kBytes, step, t);
        }
    } else {
      each_step<FloatPath, V, P>(turn, first, step_of);
    }
    copy<P, M, G>(acc, 0, sum, first);
  }

  template <int G, int c>
  __attribute__((always_inline)) static void column_of(const LinearArgs& a, const float* x, const typename V::I (&w)[G], Acc (&acc)[M][G]) {
    Acc v[G];
#pragma GCC unroll 4
    for (int g = 0; g < G; ++g) v[g] = column<c>(w[g]);
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
      for (int g = 0; g < G; ++g) acc[m][g] = V::fma(v[g], V::set1(x[m * a.w.g.columns + c]), acc[m][g]);
    if constexpr (kShortCode) keep_order(acc);
  }

  static float x_sum(const LinearArgs& a, int64_t m, int64_t block) {  // of int4, which alone has zero points
    const int64_t k = m * a.w.g.columns + block * a.w.g.block_columns, columns = a.w.g.block_columns;
    float eights = 0;
    for (int64_t i = 0; kInPlace && i < columns / 8; ++i) eights += a.x_eights[k / 8 + i];
    if (kInPlace) return eights * (-1.0f / kInt4Zero);
    Acc total = V::zero();
    for (int64_t i = 0; i < columns; i += V::kLanes) total = V::add(total, V::load(a.xf + k + i));
    return V::sum(total);
  }

  static void end_block(const LinearArgs& a, int64_t tile, int64_t block, const uint8_t* p, const Acc (&sum)[M][V::kTileRegs],
                        Acc (&y)[M][V::kTileRegs]) {
    end_float_block<V, M, FloatPath>(a, tile, block, p, sum, y);
  }
};

// Sums of (code - 8) * x, of the book's value (rounded to bf16) * x, or of bf16 weights, by vdpbf16ps. A 16-bit lane of 4-bit codes holds columns b, b + 4, b + 1, b + 5 as
// nibbles; vpermw turns the lowest (it reads 5 bits, so its table is written twice) of both lanes of a row into bf16, and x
// comes in that order (prepare.h).
template <class V, int M, Values values>
struct Bf16Path {
  using Acc = typename V::F;
  using Sums = Acc[M][V::kTileRegs];
  static constexpr int64_t kStepBytes = 128, kStepColumns = has_groups(values) ? 8 : 2;
  static constexpr bool kShortTurns = false;
  static constexpr int64_t kRuns = dense_runs<V, M, values>();
  static Acc none() { return V::zero(); }
  alignas(64) static constexpr uint16_t kCodes[32] = {
      0xc100, 0xc0e0, 0xc0c0, 0xc0a0, 0xc080, 0xc040, 0xc000, 0xbf80, 0, 0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0,
      0xc100, 0xc0e0, 0xc0c0, 0xc0a0, 0xc080, 0xc040, 0xc000, 0xbf80, 0, 0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0};

  template <int P, int G>
  static void multiply(const LinearArgs& a, const Turn& turn, int first, Sums* sum) {
    const auto codes = V::iload(values == Values::nf4 ? kNf4Tables.bf16 : kCodes);
    Acc acc[P][M][G];
    copy<P, M, G>(sum, first, acc, 0);
    each_step<Bf16Path, V, P>(turn, first, [&](const uint8_t* p, int64_t step, int t) __attribute__((always_inline)) {
      const uint16_t* x = a.xb + turn.k + step * kStepColumns;
      auto pairs = [&](int64_t column, const typename V::I(&w)[G]) __attribute__((always_inline)) {
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m) {
          const auto v = V::iset1(load32(x + column + m * a.w.g.columns));
#pragma GCC unroll 4
          for (int g = 0; g < G; ++g) acc[t][m][g] = V::dot_bf16(acc[t][m][g], w[g], v);
        }
      };
      typename V::I w[G], v[G];
#pragma GCC unroll 4
      for (int g = 0; g < G; ++g) w[g] = V::iload(p + g * V::kBytes);
      if constexpr (values == Values::bf16) {
        pairs(0, w);
      } else {
#pragma GCC unroll 4
        for (int g = 0; g < G; ++g) v[g] = V::lookup32_16(codes, w[g]);
        pairs(0, v);
#pragma GCC unroll 4
        for (int g = 0; g < G; ++g) v[g] = V::lookup32_16(codes, V::template shr16<4>(w[g]));
        pairs(2, v);
#pragma GCC unroll 4
        for (int g = 0; g < G; ++g) v[g] = V::lookup32_16(codes, V::template shr16<8>(w[g]));
        pairs(4, v);
#pragma GCC unroll 4
        for (int g = 0; g < G; ++g) v[g] = V::lookup32_16(codes, V::template shr16<12>(w[g]));
        pairs(6, v);
      }
      keep_order(acc[t]);
    });
    copy<P, M, G>(acc, 0, sum, first);
  }

  static float x_sum(const LinearArgs& a, int64_t m, int64_t block) {
    const uint16_t* x = a.xb + m * a.w.g.columns + block * a.w.g.block_columns;
    Acc total = V::zero();
    for (int64_t k = 0; k < a.w.g.block_columns; k += 2 * V::kLanes)
      total = V::dot_bf16(total, V::iload(x + k), V::iset1_16(0x3f80));
    return V::sum(total);
  }

  static void end_block(const LinearArgs& a, int64_t tile, int64_t block, const uint8_t* p, const Acc (&sum)[M][V::kTileRegs],
                        Acc (&y)[M][V::kTileRegs]) {
    end_float_block<V, M, Bf16Path>(a, tile, block, p, sum, y);
  }
};

// ---- the stream -------------------------------------------------------------------------------------------------------

// Tiles in runs, which are consecutive and differ in length by one at most: each streams on where it stopped.
struct Runs {
  int64_t begin, streams, length, longer;  // tiles; the first `longer` runs have one tile more than length
  Runs(int64_t tile_begin, int64_t tile_end, int64_t streams = kStreams)
      : begin(tile_begin), streams(streams), length((tile_end - tile_begin) / streams), longer((tile_end - tile_begin) % streams) {}
  int64_t tile(int64_t run, int64_t i) const { return begin + run * length + (run < longer ? run : longer) + i; }
  int64_t rounds() const { return length + (longer > 0); }
  int64_t live(int64_t i) const { return i < length ? streams : longer; }  // runs that have an i-th tile: the first ones
};

// The end of a tile of the base, of M rows those that exist: y, or sums that wait for the bank.
template <class V, int M>
void finish_tile(const LinearArgs& a, int64_t tile, const typename V::F (&acc)[M][V::kTileRegs]) {
  if (!a.bank.rank) return store_tile<V, M>(a, tile, acc);
  for (int64_t m = 0; m < M && m < a.m; ++m)
    for (int i = 0; i < V::kTileRegs; ++i) V::store(a.sums + (tile * a.m + m) * kTileRows + i * V::kLanes, acc[m][i]);
}

// y = sums + t U^T + bias, for all tiles after the base has streamed by: between the tiles nearly every read would be a miss
// that the stream stops for. The runs take turns with pieces of U, so that what was asked for 1 KB ahead has come.
template <class V, int M>
void bank_tiles(const LinearArgs& a, int64_t tile_begin, int64_t tile_end) {
  const Runs runs(tile_begin, tile_end);
  const int64_t rank = a.bank.rank;
  for (int64_t round = 0; round < runs.rounds(); ++round) {
    const int64_t live = runs.live(round);
    typename V::F y[kStreams][M][V::kTileRegs];
    for (int64_t i = 0; i < live; ++i)
      for (int m = 0; m < M; ++m)
        for (int r = 0; r < V::kTileRegs; ++r) y[i][m][r] = V::load(a.sums + (runs.tile(i, round) * M + m) * kTileRows + r * V::kLanes);
    for (int64_t r = 0; r < rank; r += kUpChunk)
      for (int64_t i = 0; i < live; ++i) bank_up<V, M>(a, runs.tile(i, round), r, r + kUpChunk < rank ? r + kUpChunk : rank, y[i]);
    for (int64_t i = 0; i < live; ++i) store_tile<V, M>(a, runs.tile(i, round), y[i]);
  }
}

// f(Rows<M>), so that the number of rows of x is a constant inside.
template <int n> struct Rows { static constexpr int value = n; };
template <class F>
void with_rows(int64_t m, F f) {
  static_assert(kDecodeRows == 8);
  switch (m) {
    case 1: return f(Rows<1>());
    case 2: return f(Rows<2>());
    case 3: return f(Rows<3>());
    case 4: return f(Rows<4>());
    case 5: return f(Rows<5>());
    case 6: return f(Rows<6>());
    case 7: return f(Rows<7>());
    default: return f(Rows<8>());
  }
}

template <class V>
void bank_pass(const LinearArgs& a, int64_t begin, int64_t end) {
  if (a.bank.rank) with_rows(a.m, [&](auto m) { bank_tiles<V, decltype(m)::value>(a, begin, end); });
}

template <class V, int M, class Path>
void stream(const LinearArgs& a, int64_t tile_begin, int64_t tile_end) {
  constexpr int64_t kRuns = Path::kRuns;
  constexpr int G = group_regs<V, M>(), P = packed_tiles<V, M, kRuns>();
  const Geometry& g = a.w.g;
  const int64_t steps = g.block_columns / Path::kStepColumns;
  const int64_t turn_steps = P == kRuns && G == V::kTileRegs && !Path::kShortTurns ? steps : kTurn;
  const Runs runs(tile_begin, tile_end, kRuns);
  for (int64_t round = 0; round < runs.rounds(); ++round) {
    const int64_t live = runs.live(round);
    int64_t tile[kRuns];
    typename V::F y[kRuns][M][V::kTileRegs];
    for (int64_t i = 0; i < kRuns; ++i) tile[i] = runs.tile(i < live ? i : 0, round);  // a run that has ended repeats the first
    for (int64_t i = 0; i < live; ++i) clear(y[i], V::zero());
    for (int64_t block = 0; block < g.blocks; ++block) {
      typename Path::Sums sum[kRuns];
      for (int64_t i = 0; i < kRuns; ++i) clear(sum[i], Path::none());
      if (a.w.scales)
        for (int64_t i = 0; i < live; ++i) prefetch(a.w.scale_codes(tile[i], block) + kScalesAhead);
      for (int64_t step = 0; step < steps; step += turn_steps) {
        const uint8_t* codes[kRuns];
        for (int64_t i = 0; i < kRuns; ++i)
          codes[i] = a.w.packed + tile[i] * g.tile_bytes + block * g.block_bytes + step * Path::kStepBytes;
        for (int64_t i = 0; i < live; i += P) {
          const Turn turn{codes + i, block * g.block_columns + step * Path::kStepColumns, turn_steps};
#pragma GCC unroll 4
          for (int first = 0; first < V::kTileRegs; first += G) Path::template multiply<P, G>(a, turn, first, sum + i);
        }
      }
      for (int64_t i = 0; i < live; ++i)
        Path::end_block(a, tile[i], block, a.w.packed + tile[i] * g.tile_bytes + block * g.block_bytes, sum[i], y[i]);
    }
    for (int64_t i = 0; i < live; ++i) finish_tile<V, M>(a, tile[i], y[i]);
  }
}

// Up to how many rows dense weights are decoded: where registers are too few for the sums of more rows, or their x is broadcast too often, prefill
// is faster from five to eight on, but for bf16, which is bound by memory (benchmarks/NOTES.md).
template <class V>
constexpr int64_t most_dense_rows(Values values, Activations activations) {
  const bool int8 = activations == Activations::int8;
  if (V::kLanes == 16) {
    if (!int8) return kDecodeRows;
    return values == Values::int8 ? 6 : V::kVnni ? 4 : values == Values::int4 ? 5 : 6;
  }
  if (values == Values::bf16) return kDecodeRows;
  if (int8 && values == Values::int4 && !V::kVnni) return 4;
  return int8 || values == Values::int4 ? 5 : 7;
}

// Nothing is compiled for more rows: decodes() of rung.h, by the same number, sends those to prefill.
template <class V, int M, Values values, Activations activations, template <class, int, Values> class Path>
void decode_m(const LinearArgs& a, int64_t begin, int64_t end) {
  if constexpr (M <= most_dense_rows<V>(values, activations)) stream<V, M, Path<V, M, values>>(a, begin, end);
}

template <class V, int M>
void decode_m(const LinearArgs& a, int64_t begin, int64_t end) {
  constexpr auto int8 = Activations::int8, exact = Activations::exact;
  const Values values = a.w.values;
  if (a.activations == int8) {
    if (values == Values::int4) return decode_m<V, M, Values::int4, int8, IntPath>(a, begin, end);
    if (values == Values::nf4) return decode_m<V, M, Values::nf4, int8, IntPath>(a, begin, end);
    return decode_m<V, M, Values::int8, int8, IntPath>(a, begin, end);
  }
  if constexpr (V::kBf16Dot) {
    if (uses_bf16_dot<V>(a) && values == Values::int4) return decode_m<V, M, Values::int4, exact, Bf16Path>(a, begin, end);
    if (uses_bf16_dot<V>(a) && values == Values::nf4) return decode_m<V, M, Values::nf4, exact, Bf16Path>(a, begin, end);
    if (uses_bf16_dot<V>(a)) return decode_m<V, M, Values::bf16, exact, Bf16Path>(a, begin, end);
  }
  if (values == Values::int4) return decode_m<V, M, Values::int4, exact, FloatPath>(a, begin, end);
  if (values == Values::nf4) return decode_m<V, M, Values::nf4, exact, FloatPath>(a, begin, end);
  if (values == Values::int8) return decode_m<V, M, Values::int8, exact, FloatPath>(a, begin, end);
  return decode_m<V, M, Values::bf16, exact, FloatPath>(a, begin, end);
}

template <class V>
void decode_tiles(const LinearArgs& a, int64_t begin, int64_t end) {
  with_rows(a.m, [&](auto m) { decode_m<V, decltype(m)::value>(a, begin, end); });
}

}  // namespace
}  // namespace calora
