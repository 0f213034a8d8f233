// Decode (M <= kDecodeRows): the packed weight streams by once and is multiplied as it comes.
//
//   tile -> blocks (one scale per row) -> segments that stay in L1 -> groups of registers -> steps of 128 bytes
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
constexpr int64_t kSegmentBytes = 8192;  // re-read per group of registers where M needs several; stays in L1

// Four steps at a time: what the stream brings next, and one line far ahead whose only purpose is to have that page's
// translation ready. Weights are mapped files with 4 KB pages; in a virtual machine a missed translation costs two nested page
// walks, and one stream stalls on each (0.72 -> 0.89 of the bandwidth of four streams; with huge pages nothing changes).
// Tried and lost: prefetching every line 4 KB ahead, or into L1 (both evict line fill buffers that the stream needs);
// 2, 4 and 8 tiles in turn (0.80, 0.83, 0.91 without the far line, but slower than one stream on huge pages).
constexpr int64_t kUnroll = 4, kNear = 1024, kFar = 32768;  // steps; bytes ahead
void prefetch(const uint8_t* p) {
  const auto* at = reinterpret_cast<const char*>(p);
#pragma GCC unroll 8
  for (int64_t i = 0; i < kUnroll * kStepBytes; i += 64) _mm_prefetch(at + kNear + i, _MM_HINT_T1);
  _mm_prefetch(at + kFar, _MM_HINT_T1);
}

int load32(const void* p) {
  int v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

// Where x lies for each of M rows, and the segment to multiply it with.
struct Segment {
  const uint8_t* codes;
  int64_t steps;
  int64_t k;  // first column
};

// body(step) for every step of a segment, prefetching on the first pass over it.
template <class Body>
__attribute__((always_inline)) inline void each_step(const Segment& s, int first, Body body) {
  for (int64_t step = 0; step < s.steps; step += kUnroll) {
    if (first == 0) prefetch(s.codes + step * kStepBytes);
#pragma GCC unroll 4
    for (int64_t j = 0; j < kUnroll; ++j) body(step + j);
  }
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
  static void segment(const LinearArgs& a, const Segment& s, int first, Acc (&sum)[M][V::kTileRegs]) {
    constexpr int kChains = M == 1 ? 2 : 1;  // of dependent vpdpbusd (4 cycles each)
    const int8_t* x = a.xq + s.k;
    Acc acc[M][G][kChains];
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
      for (int g = 0; g < G; ++g)
#pragma GCC unroll 2
        for (int c = 0; c < kChains; ++c) acc[m][g][c] = c ? V::izero() : sum[m][first + g];

    if constexpr (values == Values::int8) {
      each_step(s, first, [&](int64_t step) __attribute__((always_inline)) {
        const uint8_t* p = s.codes + step * kStepBytes + first * V::kBytes;
        if constexpr (V::kVnni) {
          Acc w[G];
#pragma GCC unroll 4
          for (int g = 0; g < G; ++g) w[g] = V::iload(p + g * V::kBytes);
#pragma GCC unroll 8
          for (int m = 0; m < M; ++m) {
            const Acc v = V::iset1(load32(x + m * a.w.g.columns + 4 * step));
#pragma GCC unroll 4
            for (int g = 0; g < G; ++g) acc[m][g][0] = V::dot(acc[m][g][0], w[g], v);
          }
        } else {
          // vpmaddubsw saturates at 255 * 127 * 2. Even and odd columns as 16-bit halves do not, and need no horizontal sum.
          const Acc low = V::iset1_16(0xff);
          Acc even[G], odd[G];
#pragma GCC unroll 4
          for (int g = 0; g < G; ++g) {
            const Acc w = V::iload(p + g * V::kBytes);
            even[g] = V::iand(w, low), odd[g] = V::template shr16<8>(w);
          }
#pragma GCC unroll 8
          for (int m = 0; m < M; ++m) {
            const Acc v = V::iset1(load32(x + m * a.w.g.columns + 4 * step));
            const Acc ve = V::template sar16<8>(V::template shl16<8>(v)), vo = V::template sar16<8>(v);
#pragma GCC unroll 4
            for (int g = 0; g < G; ++g)
              acc[m][g][0] = V::iadd(acc[m][g][0], V::iadd(V::madd(even[g], ve), V::madd(odd[g], vo)));
          }
        }
      });
    } else if constexpr (V::kVnni) {
      const Acc low = V::iset1_8(15);
      each_step(s, first, [&](int64_t step) __attribute__((always_inline)) {
        const uint8_t* p = s.codes + step * kStepBytes + first * V::kBytes;
        Acc lo[G], hi[G];
#pragma GCC unroll 4
        for (int g = 0; g < G; ++g) {
          const Acc w = V::iload(p + g * V::kBytes);
          lo[g] = V::iand(w, low), hi[g] = V::iand(V::template shr16<4>(w), low);
        }
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m) {
          const Acc v0 = V::iset1(load32(x + m * a.w.g.columns + 8 * step));
          const Acc v1 = V::iset1(load32(x + m * a.w.g.columns + 8 * step + 4));
#pragma GCC unroll 4
          for (int g = 0; g < G; ++g) {
            acc[m][g][0] = V::dot(acc[m][g][0], lo[g], v0);
            acc[m][g][kChains - 1] = V::dot(acc[m][g][kChains - 1], hi[g], v1);
          }
        }
      });
    } else {
      // 8 results of vpmaddubsw (<= 15 * 127 * 2 each) fit 16 bits: 4 steps, which is why columns come in 32s.
      const Acc low = V::iset1_8(15), ones = V::iset1_16(1);
      for (int64_t step = 0; step < s.steps; step += kUnroll) {
        Acc part[M][G];
        if (first == 0) prefetch(s.codes + step * kStepBytes);
#pragma GCC unroll 4
        for (int j = 0; j < kUnroll; ++j) {
          const uint8_t* p = s.codes + (step + j) * kStepBytes + first * V::kBytes;
          Acc lo[G], hi[G];
#pragma GCC unroll 4
          for (int g = 0; g < G; ++g) {
            const Acc w = V::iload(p + g * V::kBytes);
            lo[g] = V::iand(w, low), hi[g] = V::iand(V::template shr16<4>(w), low);
          }
#pragma GCC unroll 8
          for (int m = 0; m < M; ++m) {
            const Acc v0 = V::iset1(load32(x + m * a.w.g.columns + 8 * (step + j)));
            const Acc v1 = V::iset1(load32(x + m * a.w.g.columns + 8 * (step + j) + 4));
#pragma GCC unroll 4
            for (int g = 0; g < G; ++g) {
              const Acc both = V::iadd16(V::maddubs(lo[g], v0), V::maddubs(hi[g], v1));
              part[m][g] = j ? V::iadd16(part[m][g], both) : both;
            }
          }
        }
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
          for (int g = 0; g < G; ++g) acc[m][g][0] = V::iadd(acc[m][g][0], V::madd(part[m][g], ones));
      }
    }

#pragma GCC unroll 8
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
      for (int g = 0; g < G; ++g) sum[m][first + g] = kChains == 2 ? V::iadd(acc[m][g][0], acc[m][g][1]) : acc[m][g][0];
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
  static void segment(const LinearArgs& a, const Segment& s, int first, Acc (&sum)[M][V::kTileRegs]) {
    constexpr int kChains = M * G <= 4 ? 2 : 1;  // of dependent multiply-adds
    const float* x = a.xf + s.k;
    Acc acc[M][G][kChains];
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
      for (int g = 0; g < G; ++g)
#pragma GCC unroll 2
        for (int c = 0; c < kChains; ++c) acc[m][g][c] = c ? V::zero() : sum[m][first + g];
    each_step(s, first, [&](int64_t step) __attribute__((always_inline)) {
      const uint8_t* p = s.codes + step * kStepBytes + first * V::kBytes;
      typename V::I w[G];
#pragma GCC unroll 4
      for (int g = 0; g < G; ++g) w[g] = load(p + g * V::kBytes);
      const float* xs = x + step * kColumns;
      multiply<G, kChains, 0>(a, xs, w, acc), multiply<G, kChains, 1>(a, xs, w, acc);
      if constexpr (kColumns >= 4) multiply<G, kChains, 2>(a, xs, w, acc), multiply<G, kChains, 3>(a, xs, w, acc);
      if constexpr (kColumns == 8) {
        multiply<G, kChains, 4>(a, xs, w, acc), multiply<G, kChains, 5>(a, xs, w, acc);
        multiply<G, kChains, 6>(a, xs, w, acc), multiply<G, kChains, 7>(a, xs, w, acc);
      }
    });
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
      for (int g = 0; g < G; ++g) sum[m][first + g] = kChains == 2 ? V::add(acc[m][g][0], acc[m][g][1]) : acc[m][g][0];
  }

  template <int G, int kChains, int c>
  __attribute__((always_inline)) static void multiply(const LinearArgs& a, const float* x, const typename V::I (&w)[G],
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
  static void segment(const LinearArgs& a, const Segment& s, int first, Acc (&sum)[M][V::kTileRegs]) {
    constexpr int kChains = M == 1 ? 2 : 1;
    const uint16_t* x = a.xb + s.k;
    const auto codes = V::iload(kCodes);
    Acc acc[M][G][kChains];
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
      for (int g = 0; g < G; ++g)
#pragma GCC unroll 2
        for (int c = 0; c < kChains; ++c) acc[m][g][c] = c ? V::zero() : sum[m][first + g];
    auto multiply = [&](const uint16_t* pair, const typename V::I(&w)[G], int chain) __attribute__((always_inline)) {
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m) {
        const auto v = V::iset1(load32(pair + m * a.w.g.columns));
#pragma GCC unroll 4
        for (int g = 0; g < G; ++g) acc[m][g][chain] = V::dot_bf16(acc[m][g][chain], w[g], v);
      }
    };
    each_step(s, first, [&](int64_t step) __attribute__((always_inline)) {
      const uint8_t* p = s.codes + step * kStepBytes + first * V::kBytes;
      const uint16_t* xs = x + step * kColumns;
      typename V::I w[G], v[G];
#pragma GCC unroll 4
      for (int g = 0; g < G; ++g) w[g] = V::iload(p + g * V::kBytes);
      if constexpr (values == Values::bf16) {
        multiply(xs, w, 0);
      } else {
#pragma GCC unroll 4
        for (int g = 0; g < G; ++g) v[g] = V::lookup32_16(codes, w[g]);
        multiply(xs, v, 0);
#pragma GCC unroll 4
        for (int g = 0; g < G; ++g) v[g] = V::lookup32_16(codes, V::template shr16<4>(w[g]));
        multiply(xs + 2, v, kChains - 1);
#pragma GCC unroll 4
        for (int g = 0; g < G; ++g) v[g] = V::lookup32_16(codes, V::template shr16<8>(w[g]));
        multiply(xs + 4, v, 0);
#pragma GCC unroll 4
        for (int g = 0; g < G; ++g) v[g] = V::lookup32_16(codes, V::template shr16<12>(w[g]));
        multiply(xs + 6, v, kChains - 1);
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
  constexpr int G = group_regs<V, M>();
  constexpr int64_t kStepColumns = values == Values::int4 ? 8 : values == Values::int8 ? 4 : 2;
  constexpr int64_t kSegmentSteps = kSegmentBytes / kStepBytes;
  const Geometry& g = a.w.g;
  const int64_t block_steps = g.block_columns / kStepColumns;
  const uint8_t* p = a.w.packed + tile_begin * g.tile_bytes;
  for (int64_t tile = tile_begin; tile < tile_end; ++tile) {
    typename V::F y[M][V::kTileRegs];
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
      for (int i = 0; i < V::kTileRegs; ++i) y[m][i] = V::zero();
    for (int64_t block = 0; block < g.blocks; ++block, p += g.block_bytes) {
      typename Path::Acc sum[M][V::kTileRegs];
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
        for (int i = 0; i < V::kTileRegs; ++i) sum[m][i] = Path::none();
      for (int64_t step = 0; step < block_steps; step += kSegmentSteps) {
        const int64_t left = block_steps - step;
        const Segment s{p + step * kStepBytes, left < kSegmentSteps ? left : kSegmentSteps,
                        block * g.block_columns + step * kStepColumns};
#pragma GCC unroll 4
        for (int first = 0; first < V::kTileRegs; first += G) Path::template segment<G>(a, s, first, sum);
      }
      Path::end_block(a, tile, block, p, sum, y);
    }
    finish_tile<V, M>(a, 0, tile, y);
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
