// Prefill of 2:4 with int8 activations: as in decoding (decode_24.h) activations are shuffled to the kept weights, and nothing is expanded.
// A piece of a tile is taken apart once for all panels of x: its kept weights as signed bytes, beside the shuffles that pick their columns.
//
//   step  =  8 columns of 32 rows:  4 kept weights of each row (128 bytes) | where their columns lie among the 8 (128 bytes)
//
// Per 8 columns of 32 rows and one row of x that is a shuffle and a product for each register, where dense codes take two products: on three
// of a processor's vector units 4/3 cycles for 2 registers instead of 2 on the two units that multiply.
#pragma once
#include "decode_24.h"
#include "gemm_micro.h"

namespace calora {
namespace {

constexpr int64_t kKeptStep = 8, kKeptStepBytes = 2 * 4 * kTileRows;  // columns; bytes
constexpr int64_t kPieceTurns = 16;    // 16 KB, which stay in L1 for all panels
constexpr int64_t kPieceAhead = 8192;  // bytes of packed weights: no stream goes on while a piece is multiplied

// Turns of a tile, taken apart; and the sums of their weights, onto weights (32).
template <class V, Values values>
inline void take_apart(const uint8_t* turn, int64_t turns, uint8_t* step, int32_t* weights) {
  using I = typename V::I;
  using Codes = TwoFourCodes<V, values>;
  const I ones = V::iset1_8(1);
  for (int64_t t = 0; t < turns; ++t, turn += turn_bytes(values), step += kTurnColumns / kKeptStep * kKeptStepBytes) {
    for (int64_t b = 0; b < turn_bytes(values); b += kLine) prefetch(turn + b + kPieceAhead);
#pragma GCC unroll 4
    for (int g = 0; g < V::kTileRegs; ++g) {
      I lines[Codes::kLines];
#pragma GCC unroll 4
      for (int l = 0; l < Codes::kLines; ++l) lines[l] = V::iload(turn + l * 128 + g * V::kBytes);
      const I places = V::iload(turn + Codes::kLines * 128 + g * V::kBytes);
      uint8_t* to = step + g * V::kBytes;
      I sum = V::iload(weights + g * V::kLanes), bytes = V::izero(), two[2];
      auto put = [&](auto substep) __attribute__((always_inline)) {
        constexpr int i = decltype(substep)::value;
        const I w = Codes::template elements<i>(lines);
        V::istore(to + i * kKeptStepBytes, w);
        V::istore(to + i * kKeptStepBytes + 128, Codes::template shuffles<i>(places, two[i % 2]));
        if constexpr (V::kVnni) sum = V::dot(sum, ones, w);
        else bytes = add8(bytes, w);  // of 4 bits
      };
      put(Substep<0>()), put(Substep<1>()), put(Substep<2>()), put(Substep<3>());
      if constexpr (!V::kVnni) sum = V::iadd(sum, V::madd(V::maddubs(ones, bytes), V::iset1_16(1)));
      V::istore(weights + g * V::kLanes, sum);
    }
  }
}

// 8 columns by two registers.
template <class V, int RS>
inline __attribute__((always_inline)) void kept_step(typename V::I w0, typename V::I w1, typename V::I at0, typename V::I at1, const int8_t* x, typename V::I (&sum)[RS][2]) {
#pragma GCC unroll 12
  for (int r = 0; r < RS; ++r) {
    int64_t eight;
    std::memcpy(&eight, x + kKeptStep * r, sizeof eight);
    typename V::I columns;
    repeat8(eight, columns);
    const auto met0 = shuffle8(columns, at0), met1 = shuffle8(columns, at1);
    if constexpr (V::kVnni) sum[r][0] = V::dot(sum[r][0], met0, w0), sum[r][1] = V::dot(sum[r][1], met1, w1);
    else sum[r][0] = V::iadd16(sum[r][0], V::maddubs(met0, w0)), sum[r][1] = V::iadd16(sum[r][1], V::maddubs(met1, w1));
    pin(sum[r][0], sum[r][1]);
  }
}

// `steps` steps of registers `reg` and `reg + 1`: onto the sums of RS rows of a panel of R.
template <class V, int RS, int R>
inline __attribute__((always_inline)) void kept_steps(const uint8_t* step, int64_t steps, const int8_t* x, typename V::I (&sum)[RS][2]) {
  for (int64_t s = 0; s < steps; ++s, step += kKeptStepBytes, x += kKeptStep * R) {
    const auto w0 = V::iload(step), w1 = V::iload(step + V::kBytes), at0 = V::iload(step + 128), at1 = V::iload(step + 128 + V::kBytes);
    kept_step<V, RS>(w0, w1, at0, at1, x, sum);
  }
}

// A piece of a block, taken apart. Integer sums lie in memory between the pieces of a block.
struct KeptPiece {
  const uint8_t* steps;
  int64_t turns;
  bool first, last;        // of its block
  const float* scale;      // (32) of the block
  const int32_t* weights;  // (32) their sums over the block, when it is the last piece
};

// y += scale_x * scale * (sum without the offset of x), of RS rows by two registers. weights: the sums of the block's weights.
template <class V, int RS>
inline __attribute__((always_inline)) void end_block(const typename V::I (&sum)[RS][2], typename V::I weights0, typename V::I weights1, const float* scale,
                                                     const float* x_scale, float* y) {
  const auto offset0 = V::template shl32<7>(weights0), offset1 = V::template shl32<7>(weights1);
  const auto s0 = V::load(scale), s1 = V::load(scale + V::kLanes);
#pragma GCC unroll 12
  for (int r = 0; r < RS; ++r, y += kTileRows) {
    const auto sx = V::set1(x_scale[r]);
    V::store(y, V::fma(V::to_float(V::isub(sum[r][0], offset0)), V::mul(sx, s0), V::load(y)));
    V::store(y + V::kLanes, V::fma(V::to_float(V::isub(sum[r][1], offset1)), V::mul(sx, s1), V::load(y + V::kLanes)));
  }
}

// RS rows of a panel of R by the registers `reg` and `reg + 1` of a piece. x, x_scale, kept and y: of the first of the rows.
template <class V, int RS, int R>
inline __attribute__((always_inline)) void kept_pair(const KeptPiece& p, int reg, const int8_t* x, const float* x_scale, int32_t* kept, float* y) {
  using I = typename V::I;
  constexpr int L = V::kLanes;
  constexpr int64_t kSteps = kTurnColumns / kKeptStep;
  const uint8_t* step = p.steps + reg * V::kBytes;
  const int n = reg * L;
  I sum[RS][2];
  auto start = [&](int r, int v) __attribute__((always_inline)) { return p.first ? V::izero() : V::iload(kept + r * kTileRows + n + v * L); };
  if constexpr (V::kVnni) {
#pragma GCC unroll 12
    for (int r = 0; r < RS; ++r) sum[r][0] = start(r, 0), sum[r][1] = start(r, 1);
    kept_steps<V, RS, R>(step, p.turns * kSteps, x, sum);
  } else {  // sums of 16 bits hold two turns: 2 * 4 * 2 * 255 * 8 < 2^15
    alignas(64) int32_t sums[RS][2 * L];
    for (int r = 0; r < RS; ++r) V::istore(sums[r], start(r, 0)), V::istore(sums[r] + L, start(r, 1));
    const I one = V::iset1_16(1);
    for (int64_t t = 0; t < p.turns; t += 2, step += 2 * kSteps * kKeptStepBytes, x += 2 * kTurnColumns * R) {
      I part[RS][2];
#pragma GCC unroll 12
      for (int r = 0; r < RS; ++r) part[r][0] = part[r][1] = V::izero();
      kept_steps<V, RS, R>(step, (p.turns - t < 2 ? 1 : 2) * kSteps, x, part);
#pragma GCC unroll 12
      for (int r = 0; r < RS; ++r) {
        V::istore(sums[r], V::iadd(V::iload(sums[r]), V::madd(part[r][0], one)));
        V::istore(sums[r] + L, V::iadd(V::iload(sums[r] + L), V::madd(part[r][1], one)));
      }
    }
#pragma GCC unroll 12
    for (int r = 0; r < RS; ++r) sum[r][0] = V::iload(sums[r]), sum[r][1] = V::iload(sums[r] + L);
  }
  if (!p.last) {
#pragma GCC unroll 12
    for (int r = 0; r < RS; ++r) V::istore(kept + r * kTileRows + n, sum[r][0]), V::istore(kept + r * kTileRows + n + L, sum[r][1]);
    return;
  }
  end_block<V>(sum, V::iload(p.weights + n), V::iload(p.weights + n + L), p.scale + n, x_scale, y + n);
}

// A piece of a tile by one panel. With 16 registers up to five rows at a time: two sums each, and weights, shuffles, x, what they meet.
template <class V, int R>
__attribute__((noinline)) void kept_panel(const KeptPiece& p, const int8_t* x, const float* x_scale, int32_t* kept, float* y) {
  if constexpr (V::kTileRegs == 2) {
    kept_pair<V, R, R>(p, 0, x, x_scale, kept, y);
  } else {
    constexpr int kParts = R <= 10 ? 2 : 3, A = (R + kParts - 1) / kParts, B = R - (kParts - 1) * A;
    for (int reg = 0; reg < V::kTileRegs; reg += 2) {
      for (int r = 0; r + A < R; r += A) kept_pair<V, A, R>(p, reg, x + kKeptStep * r, x_scale + r, kept + r * kTileRows, y + r * kTileRows);
      kept_pair<V, B, R>(p, reg, x + kKeptStep * (R - B), x_scale + R - B, kept + (R - B) * kTileRows, y + (R - B) * kTileRows);
    }
  }
}

// A block by a panel that is alone, where two registers are all: taken apart on the way, and not stored (512-bit stores take two cycles each).
template <class V, Values values, int R>
__attribute__((noinline)) void only_panel(const uint8_t* turn, int64_t turns, const float* scale, const int8_t* x, const float* x_scale, float* y) {
  using I = typename V::I;
  using Codes = TwoFourCodes<V, values>;
  const I ones = V::iset1_8(1);
  I sum[R][2], weights[2] = {V::izero(), V::izero()};
#pragma GCC unroll 12
  for (int r = 0; r < R; ++r) sum[r][0] = sum[r][1] = V::izero();
  for (int64_t t = 0; t < turns; ++t, turn += turn_bytes(values), x += kTurnColumns * R) {
    I lines[2][Codes::kLines], places[2], two[2][2];
#pragma GCC unroll 4
    for (int l = 0; l < Codes::kLines; ++l) lines[0][l] = V::iload(turn + l * 128), lines[1][l] = V::iload(turn + l * 128 + V::kBytes);
    places[0] = V::iload(turn + Codes::kLines * 128), places[1] = V::iload(turn + Codes::kLines * 128 + V::kBytes);
    auto step = [&](auto substep) __attribute__((always_inline)) {
      constexpr int i = decltype(substep)::value;
      constexpr int64_t kShare = turn_bytes(values) / 4;
      for (int64_t b = i * kShare / kLine; b < (i + 1) * kShare / kLine; ++b) prefetch(turn + b * kLine + kPieceAhead);
      const I w0 = Codes::template elements<i>(lines[0]), w1 = Codes::template elements<i>(lines[1]);
      const I at0 = Codes::template shuffles<i>(places[0], two[0][i % 2]), at1 = Codes::template shuffles<i>(places[1], two[1][i % 2]);
      weights[0] = V::dot(weights[0], ones, w0), weights[1] = V::dot(weights[1], ones, w1);
      kept_step<V, R>(w0, w1, at0, at1, x + i * kKeptStep * R, sum);
    };
    step(Substep<0>()), step(Substep<1>()), step(Substep<2>()), step(Substep<3>());
  }
  end_block<V>(sum, weights[0], weights[1], scale, x_scale, y);
}

template <class V, Values values, int R, class U>
void add_two_four(const LinearArgs& a, int64_t tile, U& u) {
  using Codes = TwoFourCodes<V, values>;
  const Geometry& g = a.w.g;
  const int64_t turns = g.block_columns / kTurnColumns;
  alignas(64) uint8_t steps[kPieceTurns * kTurnColumns / kKeptStep * kKeptStepBytes];
  alignas(64) int32_t sums[kMaxBlockPanels * R * kTileRows], weights[kTileRows];
  alignas(64) float scale[kTileRows];
  for (int64_t b = 0; b < g.blocks; ++b) {
    const uint8_t* packed = a.w.packed + tile * g.tile_bytes + b * g.block_bytes;
    for (int i = 0; i < V::kTileRegs; ++i) {
      V::store(scale + i * V::kLanes, V::mul(block_scale<V>(a.w, packed, i), V::set1(Codes::kUnit)));
      V::istore(weights + i * V::kLanes, V::izero());
    }
    if constexpr (values == Values::int4 && V::kVnni && V::kTileRegs == 2)
      if (u.count == 1) {
        only_panel<V, values, R>(packed, turns, scale, a.xq + (u.first * g.columns + b * g.block_columns) * R, a.x_scale + (u.first * g.blocks + b) * R, u.panel(0));
        continue;
      }
    for (int64_t t = 0; t < turns; t += kPieceTurns) {
      const int64_t count = turns - t < kPieceTurns ? turns - t : kPieceTurns;
      take_apart<V, values>(packed + t * turn_bytes(values), count, steps, weights);
      const KeptPiece piece{steps, count, t == 0, t + count == turns, scale, weights};
      for (int64_t i = 0; i < u.count; ++i) {
        const int64_t panel = u.first + i;
        kept_panel<V, R>(piece, a.xq + (panel * g.columns + b * g.block_columns + t * kTurnColumns) * R, a.x_scale + (panel * g.blocks + b) * R,
                         sums + i * R * kTileRows, u.panel(i));
      }
    }
  }
}

}  // namespace
}  // namespace calora
