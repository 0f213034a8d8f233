// Decode (M <= kDecodeRows): the packed weight streams by once and is multiplied as it comes.
//
//   kStreams tiles -> blocks (one scale per row) -> turns of kTurn steps per tile -> groups of registers -> steps of 128 bytes
//
// A path says how a step is multiplied: IntPath (int8 activations), FloatPath (fp32), Bf16Path (vdpbf16ps). All of them leave
// the scale to the end of the block, so that it costs one multiplication per block and row instead of one per weight.
#pragma once
#include "../kernels.h"
#include "bank.h"
#include "prepare.h"

namespace calora {
namespace {

constexpr int64_t kStepBytes = 128;

// A single stream stalls at every page: weights are mapped files with 4 KB pages, hardware prefetch stops at a page's end, and
// in a virtual machine a missed translation costs two nested page walks. So kStreams tiles take turns of kTurn steps. One
// pinned thread, fraction of the read bandwidth in the same minute (the two columns: two states of the machine's memory):
//   1 stream 0.72 0.87 | with a line touched 32 KB ahead 0.76 0.97 | 4 streams 0.85 0.90 | 8 streams 0.92 1.0 | 16: 0.62
// Prefetching into L1 (0.73) or every line 4 KB ahead takes the line fill buffers that the streams need; L2 is enough.
constexpr int64_t kStreams = 8, kTurn = 4;  // tiles; steps
constexpr int64_t kAhead = 512;             // bytes
// always_inline: GCC takes a function that only prefetches for one without effects and deletes the call.
__attribute__((always_inline)) inline void prefetch(const uint8_t* p) {
#pragma GCC unroll 8
  for (int64_t i = 0; i < kTurn * kStepBytes; i += 64) _mm_prefetch(reinterpret_cast<const char*>(p + kAhead + i), _MM_HINT_T1);
}

int load32(const void* p) {
  int v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

// kTurn steps of one tile. Column 8 * 4 of int4, 4 * 4 of int8, 2 * 4 of bf16: blocks are whole turns.
struct Turn {
  const uint8_t* codes;
  int64_t k;  // first column
};

// body(p, step) for every step of a turn, prefetching on the first of the passes over it.
template <class V, class Body>
__attribute__((always_inline)) inline void each_step(const Turn& turn, int first, Body body) {
  if (first == 0) prefetch(turn.codes);
#pragma GCC unroll 4
  for (int64_t step = 0; step < kTurn; ++step) body(turn.codes + step * kStepBytes + first * V::kBytes, step);
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

// How many of a tile's registers are accumulated together: as many as leave room for weights and temporaries.
template <class V, int M>
constexpr int group_regs() {
  constexpr int budget = V::kLanes == 16 ? 16 : 8;  // of 32 and 16 registers
  return M * V::kTileRegs <= budget ? V::kTileRegs : M * 2 <= budget ? 2 : 1;
}

// Zero points minus 8 of the rows of register i in a tile's block.
template <class V>
typename V::F zero_offset(const Weight& w, int64_t tile, int64_t block, int i) {
  const uint8_t* z = w.zeros + (tile * w.g.blocks + block) * kZeroBytes + i * V::kLanes % 16;
  const auto bytes = V::widen_u8(z);
  const auto nibble = i * V::kLanes < 16 ? V::iand(bytes, V::iset1(15)) : V::template shr32<4>(bytes);
  return V::to_float(V::isub(nibble, V::iset1(kInt4Zero)));
}

template <class V>
typename V::F block_scale(const Weight& w, const uint8_t* block, int i) {
  return V::load_fp16(block + w.g.block_bytes - kScaleBytes + 2 * i * V::kLanes);
}

// ---- int8 activations -------------------------------------------------------------------------------------------------

// Sums of (unsigned code) * xq; the zero point leaves at the end of the block as zero * x_sum. Integers: exact in any order.
template <class V, int M, Values values>
struct IntPath {
  using Acc = typename V::I;
  static Acc none() { return V::izero(); }

  template <int G>
  static void multiply(const LinearArgs& a, const Turn& turn, int first, Acc (&sum)[M][V::kTileRegs]) {
    if constexpr (V::kVnni) dot<G>(a, turn, first, sum);
    else if constexpr (values == Values::int4) nibbles<G>(a, turn, first, sum);
    else bytes<G>(a, turn, first, sum);
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
      lo[g] = V::iand(w, low), hi[g] = V::iand(V::template shr16<4>(w), low);
    }
  }

  template <int G>
  static void dot(const LinearArgs& a, const Turn& turn, int first, Acc (&sum)[M][V::kTileRegs]) {
    Acc acc[M][G], odd[M][G];  // odd: a second chain where one row would wait for the 4 cycles of vpdpbusd
    clear(odd, V::izero());
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
      for (int g = 0; g < G; ++g) acc[m][g] = sum[m][first + g];
    each_step<V>(turn, first, [&](const uint8_t* p, int64_t step) __attribute__((always_inline)) {
      if constexpr (values == Values::int8) {
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m) {
          const Acc v = four(a, turn, m, 4 * step);
#pragma GCC unroll 4
          for (int g = 0; g < G; ++g) acc[m][g] = V::dot(acc[m][g], V::iload(p + g * V::kBytes), v);
        }
      } else {
        Acc lo[G], hi[G];
        split(p, lo, hi);
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m) {
          const Acc v0 = four(a, turn, m, 8 * step), v1 = four(a, turn, m, 8 * step + 4);
#pragma GCC unroll 4
          for (int g = 0; g < G; ++g) {
            acc[m][g] = V::dot(acc[m][g], lo[g], v0);
            auto& second = M == 1 ? odd[m][g] : acc[m][g];
            second = V::dot(second, hi[g], v1);
          }
        }
      }
    });
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
      for (int g = 0; g < G; ++g) sum[m][first + g] = M == 1 ? V::iadd(acc[m][g], odd[m][g]) : acc[m][g];
  }

  // int4 without VNNI: 8 results of vpmaddubsw (<= 15 * 127 * 2 each) fit 16 bits, one turn; columns come in 32s for this.
  template <int G>
  static void nibbles(const LinearArgs& a, const Turn& turn, int first, Acc (&sum)[M][V::kTileRegs]) {
    Acc part[M][G];
    clear(part, V::izero());
    each_step<V>(turn, first, [&](const uint8_t* p, int64_t step) __attribute__((always_inline)) {
      Acc lo[G], hi[G];
      split(p, lo, hi);
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m) {
        const Acc v0 = four(a, turn, m, 8 * step), v1 = four(a, turn, m, 8 * step + 4);
#pragma GCC unroll 4
        for (int g = 0; g < G; ++g)
          part[m][g] = V::iadd16(part[m][g], V::iadd16(V::maddubs(lo[g], v0), V::maddubs(hi[g], v1)));
      }
      keep_order(part);
    });
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
      for (int g = 0; g < G; ++g) sum[m][first + g] = V::iadd(sum[m][first + g], V::madd(part[m][g], V::iset1_16(1)));
  }

  // int8 without VNNI: vpmaddubsw saturates at 255 * 127 * 2. Even and odd columns as 16-bit halves do not, and need no
  // horizontal sum.
  template <int G>
  static void bytes(const LinearArgs& a, const Turn& turn, int first, Acc (&sum)[M][V::kTileRegs]) {
    Acc acc[M][G];
    clear(acc, V::izero());
    each_step<V>(turn, first, [&](const uint8_t* p, int64_t step) __attribute__((always_inline)) {
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
          acc[m][g] = V::iadd(acc[m][g], V::iadd(V::madd(even[g], x_even), V::madd(odd[g], x_odd)));
      }
      keep_order(acc);
    });
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
      for (int g = 0; g < G; ++g) sum[m][first + g] = V::iadd(sum[m][first + g], acc[m][g]);
  }

  static void end_block(const LinearArgs& a, int64_t tile, int64_t block, const uint8_t* p, const Acc (&sum)[M][V::kTileRegs],
                        typename V::F (&y)[M][V::kTileRegs]) {
    const int64_t blocks = a.w.g.blocks;
    constexpr int kMiddle = values == Values::int8 ? kInt8Zero : kInt4Zero;
#pragma GCC unroll 4
    for (int i = 0; i < V::kTileRegs; ++i) {
      const auto scale = block_scale<V>(a.w, p, i);
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m) {
        const int x_sum = a.x_sum[m * blocks + block];
        auto v = V::to_float(V::isub(sum[m][i], V::iset1(kMiddle * x_sum)));
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
  float x_sum[M];
  if (a.w.zeros)
    for (int m = 0; m < M; ++m) x_sum[m] = Path::x_sum(a, m, block);
#pragma GCC unroll 4
  for (int i = 0; i < V::kTileRegs; ++i) {
    const auto scale = block_scale<V>(a.w, p, i);
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
      auto v = sum[m][i];
      if (a.w.zeros) v = V::fma(zero_offset<V>(a.w, tile, block, i), V::set1(-x_sum[m]), v);
      y[m][i] = V::fma(v, scale, y[m][i]);
    }
  }
}

// Sums of (code - middle) * x in fp32, one column at a time.
template <class V, int M, Values values>
struct FloatPath {
  using Acc = typename V::F;
  static Acc none() { return V::zero(); }
  static constexpr int kColumns = values == Values::int4 ? 8 : values == Values::int8 ? 4 : 2;  // of a step

  // Column c of a step, of kLanes rows: the code minus its middle, as fp32.
  template <int c>
  static Acc column(typename V::I w) {
    if constexpr (values == Values::bf16) {
      return V::as_float(c ? V::iand(w, V::iset1(static_cast<int>(0xffff0000))) : V::template shl32<16>(w));
    } else if constexpr (values == Values::int8) {  // w was turned into signed bytes
      return V::to_float(V::template sar32<24>(V::template shl32<24 - 8 * c>(w)));
    } else {
      constexpr int bit = c < 4 ? 8 * c : 8 * (c - 4) + 4;
      if constexpr (V::kLanes == 16) {  // vpermps reads the low 4 bits only: no mask
        return V::lookup16(V::load(kCodes), V::template shr32<bit>(w));
      } else {  // w was turned into signed nibbles
        return V::to_float(V::template sar32<28>(V::template shl32<28 - bit>(w)));
      }
    }
  }
  alignas(64) static constexpr float kCodes[16] = {-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7};

  static typename V::I load(const uint8_t* p) {
    const auto w = V::iload(p);
    if constexpr (values == Values::int8) return V::ixor(w, V::iset1_8(static_cast<char>(0x80)));
    else if constexpr (values == Values::int4 && V::kLanes == 8) return V::ixor(w, V::iset1_8(static_cast<char>(0x88)));
    else return w;
  }

  template <int G>
  static void multiply(const LinearArgs& a, const Turn& turn, int first, Acc (&sum)[M][V::kTileRegs]) {
    constexpr int kChains = M * G <= 4 ? 2 : 1;  // of dependent multiply-adds
    const float* x = a.xf + turn.k;
    Acc acc[M][G][kChains];
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
      for (int g = 0; g < G; ++g)
#pragma GCC unroll 2
        for (int c = 0; c < kChains; ++c) acc[m][g][c] = c ? V::zero() : sum[m][first + g];
    each_step<V>(turn, first, [&](const uint8_t* p, int64_t step) __attribute__((always_inline)) {
      typename V::I w[G];
#pragma GCC unroll 4
      for (int g = 0; g < G; ++g) w[g] = load(p + g * V::kBytes);
      const float* xs = x + step * kColumns;
      column_of<G, kChains, 0>(a, xs, w, acc), column_of<G, kChains, 1>(a, xs, w, acc);
      if constexpr (kColumns >= 4) column_of<G, kChains, 2>(a, xs, w, acc), column_of<G, kChains, 3>(a, xs, w, acc);
      if constexpr (kColumns == 8) {
        column_of<G, kChains, 4>(a, xs, w, acc), column_of<G, kChains, 5>(a, xs, w, acc);
        column_of<G, kChains, 6>(a, xs, w, acc), column_of<G, kChains, 7>(a, xs, w, acc);
      }
    });
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
      for (int g = 0; g < G; ++g) sum[m][first + g] = kChains == 2 ? V::add(acc[m][g][0], acc[m][g][1]) : acc[m][g][0];
  }

  template <int G, int kChains, int c>
  __attribute__((always_inline)) static void column_of(const LinearArgs& a, const float* x, const typename V::I (&w)[G],
                                                      Acc (&acc)[M][G][kChains]) {
    Acc v[G];
#pragma GCC unroll 4
    for (int g = 0; g < G; ++g) v[g] = column<c>(w[g]);
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
      for (int g = 0; g < G; ++g)
        acc[m][g][c % kChains] = V::fma(v[g], V::set1(x[m * a.w.g.columns + c]), acc[m][g][c % kChains]);
  }

  static float x_sum(const LinearArgs& a, int64_t m, int64_t block) {
    const float* x = a.xf + m * a.w.g.columns + block * a.w.g.block_columns;
    Acc total = V::zero();
    for (int64_t k = 0; k < a.w.g.block_columns; k += V::kLanes) total = V::add(total, V::load(x + k));
    return V::sum(total);
  }

  static void end_block(const LinearArgs& a, int64_t tile, int64_t block, const uint8_t* p, const Acc (&sum)[M][V::kTileRegs],
                        Acc (&y)[M][V::kTileRegs]) {
    end_float_block<V, M, FloatPath>(a, tile, block, p, sum, y);
  }
};

// Sums of (code - 8) * x, or of bf16 weights, by vdpbf16ps. A 16-bit lane of int4 codes holds columns b, b + 4, b + 1, b + 5 as
// nibbles; vpermw turns the lowest (it reads 5 bits, so its table is written twice) of both lanes of a row into bf16, and x
// comes in that order (prepare.h).
template <class V, int M, Values values>
struct Bf16Path {
  using Acc = typename V::F;
  static Acc none() { return V::zero(); }
  static constexpr int kColumns = values == Values::int4 ? 8 : 2;
  alignas(64) static constexpr uint16_t kCodes[32] = {
      0xc100, 0xc0e0, 0xc0c0, 0xc0a0, 0xc080, 0xc040, 0xc000, 0xbf80, 0, 0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0,
      0xc100, 0xc0e0, 0xc0c0, 0xc0a0, 0xc080, 0xc040, 0xc000, 0xbf80, 0, 0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0};

  template <int G>
  static void multiply(const LinearArgs& a, const Turn& turn, int first, Acc (&sum)[M][V::kTileRegs]) {
    constexpr int kChains = M == 1 ? 2 : 1;
    const uint16_t* x = a.xb + turn.k;
    const auto codes = V::iload(kCodes);
    Acc acc[M][G][kChains];
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
      for (int g = 0; g < G; ++g)
#pragma GCC unroll 2
        for (int c = 0; c < kChains; ++c) acc[m][g][c] = c ? V::zero() : sum[m][first + g];
    auto pairs = [&](const uint16_t* pair, const typename V::I(&w)[G], int chain) __attribute__((always_inline)) {
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m) {
        const auto v = V::iset1(load32(pair + m * a.w.g.columns));
#pragma GCC unroll 4
        for (int g = 0; g < G; ++g) acc[m][g][chain] = V::dot_bf16(acc[m][g][chain], w[g], v);
      }
    };
    each_step<V>(turn, first, [&](const uint8_t* p, int64_t step) __attribute__((always_inline)) {
      const uint16_t* xs = x + step * kColumns;
      typename V::I w[G], v[G];
#pragma GCC unroll 4
      for (int g = 0; g < G; ++g) w[g] = V::iload(p + g * V::kBytes);
      if constexpr (values == Values::bf16) {
        pairs(xs, w, 0);
      } else {
#pragma GCC unroll 4
        for (int g = 0; g < G; ++g) v[g] = V::lookup32_16(codes, w[g]);
        pairs(xs, v, 0);
#pragma GCC unroll 4
        for (int g = 0; g < G; ++g) v[g] = V::lookup32_16(codes, V::template shr16<4>(w[g]));
        pairs(xs + 2, v, kChains - 1);
#pragma GCC unroll 4
        for (int g = 0; g < G; ++g) v[g] = V::lookup32_16(codes, V::template shr16<8>(w[g]));
        pairs(xs + 4, v, 0);
#pragma GCC unroll 4
        for (int g = 0; g < G; ++g) v[g] = V::lookup32_16(codes, V::template shr16<12>(w[g]));
        pairs(xs + 6, v, kChains - 1);
      }
    });
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
      for (int g = 0; g < G; ++g) sum[m][first + g] = kChains == 2 ? V::add(acc[m][g][0], acc[m][g][1]) : acc[m][g][0];
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

template <class V, int M, Values values, class Path>
void stream(const LinearArgs& a, int64_t tile_begin, int64_t tile_end) {
  using Y = typename V::F[M][V::kTileRegs];
  using Sum = typename Path::Acc[M][V::kTileRegs];
  constexpr int G = group_regs<V, M>();
  constexpr int64_t kStepColumns = values == Values::int4 ? 8 : values == Values::int8 ? 4 : 2;
  const Geometry& g = a.w.g;
  const int64_t block_steps = g.block_columns / kStepColumns, groups = (tile_end - tile_begin + kStreams - 1) / kStreams;
  for (int64_t group = 0, tile = tile_begin; group < groups; ++group) {
    const int64_t tiles = (tile_end - tile + groups - group - 1) / (groups - group);  // even shares: no lone last stream
    const uint8_t* p = a.w.packed + tile * g.tile_bytes;
    Y y[kStreams];
    for (int64_t i = 0; i < tiles; ++i) clear(y[i], V::zero());
    for (int64_t block = 0; block < g.blocks; ++block, p += g.block_bytes) {
      Sum sum[kStreams];
      for (int64_t i = 0; i < tiles; ++i) clear(sum[i], Path::none());
      for (int64_t step = 0; step < block_steps; step += kTurn)
        for (int64_t i = 0; i < tiles; ++i) {
          const Turn turn{p + i * g.tile_bytes + step * kStepBytes, block * g.block_columns + step * kStepColumns};
#pragma GCC unroll 4
          for (int first = 0; first < V::kTileRegs; first += G) Path::template multiply<G>(a, turn, first, sum[i]);
        }
      for (int64_t i = 0; i < tiles; ++i) Path::end_block(a, tile + i, block, p + i * g.tile_bytes, sum[i], y[i]);
    }
    for (int64_t i = 0; i < tiles; ++i) finish_tile<V, M>(a, 0, tile + i, y[i]);
    tile += tiles;
  }
}

template <class V, int M>
void decode_m(const LinearArgs& a, int64_t begin, int64_t end) {
  const Values values = a.w.values;
  if (a.activations == Activations::int8) {
    if (values == Values::int4) return stream<V, M, Values::int4, IntPath<V, M, Values::int4>>(a, begin, end);
    return stream<V, M, Values::int8, IntPath<V, M, Values::int8>>(a, begin, end);
  }
  if constexpr (V::kBf16Dot) {
    if (uses_bf16_dot<V>(a) && values == Values::int4) return stream<V, M, Values::int4, Bf16Path<V, M, Values::int4>>(a, begin, end);
    if (uses_bf16_dot<V>(a)) return stream<V, M, Values::bf16, Bf16Path<V, M, Values::bf16>>(a, begin, end);
  }
  if (values == Values::int4) return stream<V, M, Values::int4, FloatPath<V, M, Values::int4>>(a, begin, end);
  if (values == Values::int8) return stream<V, M, Values::int8, FloatPath<V, M, Values::int8>>(a, begin, end);
  return stream<V, M, Values::bf16, FloatPath<V, M, Values::bf16>>(a, begin, end);
}

template <class V>
void decode_tiles(const LinearArgs& a, int64_t begin, int64_t end) {
  switch (a.m) {
    case 1: return decode_m<V, 1>(a, begin, end);
    case 2: return decode_m<V, 2>(a, begin, end);
    case 3: return decode_m<V, 3>(a, begin, end);
    case 4: return decode_m<V, 4>(a, begin, end);
    case 5: return decode_m<V, 5>(a, begin, end);
    case 6: return decode_m<V, 6>(a, begin, end);
    case 7: return decode_m<V, 7>(a, begin, end);
    default: return decode_m<V, 8>(a, begin, end);
  }
}

}  // namespace
}  // namespace calora
