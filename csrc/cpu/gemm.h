// Prefill (more rows than a rung decodes) and backward: blocked GEMMs on panels of x (gemm_panels.h) and register-blocked micro-kernels
// (gemm_micro.h). A unit of work is one tile of 32 outputs for one block of up to 22 panels (264 rows):
//
//   sums of the unit, fp32 (<= 33 KB)         =  bias
//   for each chunk of ranks:    += t U^T
//   for each block of columns:  for each panel:  += x W^T         the block's codes stay in L1 for all panels
//   y = sums, rounded once
//
// The order of every sum is fixed by the shape alone, never by how units are spread over threads.
#pragma once
#include "../kernels.h"
#include "gemm_24.h"
#include "gemm_decode.h"
#include "gemm_kept.h"
#include "gemm_micro.h"
#include "gemm_panels.h"

namespace calora {
namespace {

constexpr int64_t kCodesAhead = 4096;     // bytes, on the way of int8 activations
constexpr int64_t kExactAhead = 16384;    // of decoded int8 and bf16: two chunks of bf16
constexpr int64_t kPrefetchBytes = 8192;  // of a block; longer ones are streams of their own

template <int n> struct PanelRows { static constexpr int value = n; };

// f(PanelRows<rows>), so that the height of a panel is a constant inside.
template <class F>
void with_panel_rows(int64_t rows, F f) {
  static_assert(kMinPanelRows == 7 && kMaxPanelRows == 12);
  switch (rows) {
    case 7: return f(PanelRows<7>());
    case 8: return f(PanelRows<8>());
    case 9: return f(PanelRows<9>());
    case 10: return f(PanelRows<10>());
    case 11: return f(PanelRows<11>());
    default: return f(PanelRows<12>());
  }
}

alignas(64) constexpr float kOnes[kTileRows] = {1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1,
                                                1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1};

// The sums of a unit: rows x 32, of the panels [first, first + count).
template <int R>
struct Unit {
  int64_t first, count;
  alignas(64) float sums[kMaxBlockPanels * R * kTileRows];

  Unit(const RowPanels& p, int64_t block) : first(block * p.block_panels) {
    count = p.panels - first < p.block_panels ? p.panels - first : p.block_panels;
  }
  float* panel(int64_t i) { return sums + i * R * kTileRows; }
};

template <class V, int R>
void start_with(Unit<R>& u, const float* bias) {
  for (int n = 0; n < kTileRows; n += V::kLanes) {
    const auto b = V::load(bias + n);
    for (int64_t r = 0; r < u.count * R; ++r) V::store(u.sums + r * kTileRows + n, b);
  }
}

// sums -> rows [first * R, m) and columns [n, columns) of y, at most 32 of them.
template <class V, int R, class Y>
void store_sums(Unit<R>& u, int64_t m, int64_t n, int64_t columns, Y* y) {
  const int64_t row = u.first * R, rows = m - row < u.count * R ? m - row : u.count * R;
  for (int i = 0; i < kTileRows && n + i < columns; i += V::kLanes) {
    const int64_t left = columns - n - i;
    for (int64_t r = 0; r < rows; ++r) {
      Y* to = y + (row + r) * columns + n + i;
      const auto v = V::load(u.sums + r * kTileRows + i);
      if (left >= V::kLanes) V::store(to, v);
      else V::store_part(to, v, left);
    }
  }
}

// ---- forward ------------------------------------------------------------------------------------------------------------

template <class T>
void widen(const T* from, int64_t count, float* to);
template <>
void widen<float>(const float* from, int64_t count, float* to) { std::memcpy(to, from, sizeof(float) * static_cast<std::size_t>(count)); }
template <>
void widen<uint16_t>(const uint16_t* from, int64_t count, float* to) {
  for (int64_t i = 0; i < count; ++i) {
    const uint32_t bits = static_cast<uint32_t>(from[i]) << 16;
    std::memcpy(to + i, &bits, sizeof bits);
  }
}

template <class V, int R>
void add_bias(const LinearArgs& a, int64_t tile, Unit<R>& u) {
  alignas(64) float bias[kTileRows] = {};
  const int64_t n = tile * kTileRows, rows = a.w.out_features - n < kTileRows ? a.w.out_features - n : kTileRows;
  if (a.bias && a.bias_dtype == DType::f32) widen(static_cast<const float*>(a.bias) + n, rows, bias);
  else if (a.bias) widen(static_cast<const uint16_t*>(a.bias) + n, rows, bias);
  start_with<V>(u, bias);
}

// Ranks [begin, begin + count) of U for a tile, as (count, 32) fp32.
template <class U>
void turn_up(const Bank& bank, int64_t out, int64_t tile, int64_t begin, int64_t count, float* to) {
  const auto* up = static_cast<const U*>(bank.up);
  if (bank.tiled) return widen(up + (tile * bank.rank + begin) * kTileRows, count * kTileRows, to);
  std::memset(to, 0, sizeof(float) * static_cast<std::size_t>(count * kTileRows));
  for (int64_t i = 0; i < kTileRows && tile * kTileRows + i < out; ++i)
    for (int64_t r = 0; r < count; ++r) widen(up + (tile * kTileRows + i) * bank.rank + begin + r, 1, to + r * kTileRows + i);
}

template <class V, int R>
void add_bank(const LinearArgs& a, int64_t tile, Unit<R>& u) {
  constexpr int64_t kRanks = 32;
  alignas(64) float up[kRanks * kTileRows];
  for (int64_t r = 0; r < a.bank.rank; r += kRanks) {
    const int64_t count = a.bank.rank - r < kRanks ? a.bank.rank - r : kRanks;
    if (a.bank.dtype == DType::f32) turn_up<float>(a.bank, a.w.out_features, tile, r, count, up);
    else turn_up<uint16_t>(a.bank, a.w.out_features, tile, r, count, up);
    for (int64_t i = 0; i < u.count; ++i)
      up_panel<V, R>(up, kOnes, count, a.t + (u.first + i) * R * a.bank.rank + r, a.bank.rank, u.panel(i));
  }
}

// Asks for the block after the next: where M is small the codes come from memory, and hardware prefetch stops at each page.
// The last tile asks for a little beyond the end, which a prefetch may.
inline void prefetch_block(const Geometry& g, const Block& w) {
  if (g.block_bytes > kPrefetchBytes) return;
  for (int64_t i = 0; i < g.block_bytes; i += 64) _mm_prefetch(reinterpret_cast<const char*>(w.codes + 2 * g.block_bytes + i), _MM_HINT_T0);
}

template <class V, Values values, bool zeros, int R>
void add_int8(const LinearArgs& a, int64_t tile, Unit<R>& u) {
  const Geometry& g = a.w.g;
  for (int64_t b = 0; b < g.blocks; ++b) {
    Block w = block_of<V>(a.w, tile, b);
    w.ahead = a.w.pattern == Pattern::dense ? kCodesAhead : 0;
    for (int64_t i = 0; i < u.count; ++i, w.ahead = 0) {  // later panels find the codes in L1
      const int64_t panel = u.first + i, at = (panel * g.blocks + b) * R;
      int_panel<V, values, zeros, R>(w, a.xq + (panel * g.columns + b * g.block_columns) * R, a.x_scale + at, a.x_sum + at, u.panel(i));
    }
  }
}

template <class V, bool bf16, int R>
void add_exact(const LinearArgs& a, int64_t tile, Unit<R>& u) {
  constexpr int64_t kPerStep = bf16 ? 2 : 1;  // columns
  const Geometry& g = a.w.g;
  alignas(64) float panel[kChunkColumns / kPerStep * kTileRows];
  for (int64_t b = 0; b < g.blocks; ++b)
    for (int64_t k = 0; k < g.block_columns; k += kChunkColumns) {
      const int64_t columns = g.block_columns - k < kChunkColumns ? g.block_columns - k : kChunkColumns;
      Block w = block_of<V>(a.w, tile, b, k, columns);  // not the block at once: expanded rows of int8 or bf16 would leave L1
      if (k == 0 && a.w.pattern == Pattern::dense) prefetch_block(g, w);
      if (a.w.pattern == Pattern::dense) w.ahead = kExactAhead;
      const float* decoded = panel;
      if constexpr (!bf16) decode_fp32<V>(a.w.values, w, 0, columns, panel);
      else if (a.w.values == Values::bf16) decoded = reinterpret_cast<const float*>(w.codes);  // as it lies
      else decode_bf16<V>(a.w.values, w, 0, columns, panel);
      for (int64_t i = 0; i < u.count; ++i)
        float_panel<V, bf16, R>(decoded, w.scale, columns / kPerStep,
                                a.xf + ((u.first + i) * g.columns + b * g.block_columns + k) / kPerStep * R, u.panel(i));
    }
}

template <class V, int R>
void add_base(const LinearArgs& a, int64_t tile, Unit<R>& u) {
  if (a.activations == Activations::int8) {
    if (shuffles_x<V>(a.w)) {
      if constexpr (V::kVnni)
        if (a.w.values == Values::int8) return add_two_four<V, Values::int8, R>(a, tile, u);
      return add_two_four<V, Values::int4, R>(a, tile, u);
    }
#ifdef __AVX512VBMI2__
    if (a.w.pattern == Pattern::paired) return add_pairs<V, R>(a, tile, u);
    if (a.w.pattern == Pattern::bitmask && a.w.values == Values::int8) return add_kept_bytes<V, R>(a, tile, u);
#endif
    if (a.w.values == Values::int8) add_int8<V, Values::int8, false>(a, tile, u);
    else if (a.w.values == Values::nf4) add_int8<V, Values::nf4, false>(a, tile, u);
    else if (a.w.zeros) add_int8<V, Values::int4, true>(a, tile, u);
    else add_int8<V, Values::int4, false>(a, tile, u);
    return;
  }
  if constexpr (V::kBf16Dot)
    if (prefill_bf16_dot<V>(a)) return add_exact<V, true>(a, tile, u);
  add_exact<V, false>(a, tile, u);
}

// y of whole units, bias and bank included; unit = block * tiles + tile.
template <class V>
void gemm_units(const LinearArgs& a, int64_t unit_begin, int64_t unit_end) {
  const RowPanels p = row_panels(a.m);
  with_panel_rows(p.rows, [&](auto rows) {
    constexpr int R = decltype(rows)::value;
    for (int64_t unit = unit_begin; unit < unit_end; ++unit) {
      const int64_t tile = unit % a.w.g.tiles;
      Unit<R> u(p, unit / a.w.g.tiles);
      add_bias<V>(a, tile, u);
      if (a.bank.rank) add_bank<V>(a, tile, u);
      add_base<V>(a, tile, u);
      if (a.x_dtype == DType::f32) store_sums<V>(u, a.m, tile * kTileRows, a.w.out_features, static_cast<float*>(a.y));
      else store_sums<V>(u, a.m, tile * kTileRows, a.w.out_features, static_cast<uint16_t*>(a.y));
    }
  });
}

// ---- backward -----------------------------------------------------------------------------------------------------------

// One unit: dx of one block of panels and one chunk of 32 columns. The sum runs over the rows of W, four tiles at a time.
template <class V, bool bf16, int R>
void backward_unit(const BackwardArgs& a, int64_t k, Unit<R>& u) {
  constexpr int64_t kTiles = 4, kPerStep = bf16 ? 2 : 1;  // rows of W
  constexpr int64_t kTileSteps = kTileRows / kPerStep;
  const int64_t tiles = a.w.g.tiles;
  alignas(64) float panel[kTiles * kTileSteps * kColumnAlign];
  alignas(64) constexpr float kNothing[kTileRows] = {};
  start_with<V>(u, kNothing);
  for (int64_t tile = 0; tile < tiles; tile += kTiles) {
    const int64_t count = tiles - tile < kTiles ? tiles - tile : kTiles;
    for (int64_t t = 0; t < count; ++t) decode_transposed<V, bf16>(a.w, tile + t, k, panel + t * kTileSteps * kColumnAlign);
    for (int64_t i = 0; i < u.count; ++i)
      float_panel<V, bf16, R>(panel, kOnes, count * kTileSteps, a.panels + ((u.first + i) * tiles + tile) * kTileSteps * R, u.panel(i));
  }
  if (a.dtype == DType::f32) store_sums<V>(u, a.m, k, a.w.in_features, static_cast<float*>(a.dx));
  else store_sums<V>(u, a.m, k, a.w.in_features, static_cast<uint16_t*>(a.dx));
}

// dx of whole units; unit = block * chunks + chunk.
template <class V>
void backward_units(const BackwardArgs& a, int64_t unit_begin, int64_t unit_end) {
  const RowPanels p = row_panels(a.m);
  const int64_t chunks = round_up(a.w.in_features, kColumnAlign) / kColumnAlign;
  with_panel_rows(p.rows, [&](auto rows) {
    for (int64_t unit = unit_begin; unit < unit_end; ++unit) {
      const int64_t k = unit % chunks * kColumnAlign;
      Unit<decltype(rows)::value> u(p, unit / chunks);
      if constexpr (V::kBf16Dot)
        if (a.dtype == DType::bf16) {
          backward_unit<V, true>(a, k, u);
          continue;
        }
      backward_unit<V, false>(a, k, u);
    }
  });
}

}  // namespace
}  // namespace calora
