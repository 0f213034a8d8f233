// What the micro-kernels of prefill read: rows of x (or of grad) in panels of R = row_panels(m).rows rows.
//
//   panel  =  step 0: row 0 | row 1 | ... | row R-1,  step 1: row 0 | ...        4 bytes a row and step:
//             4 int8 columns,  or 1 fp32 column,  or 2 bf16 columns
//
// (Of 2:4 by int8, whose products shuffle x: 8 columns of int8 a step, and + 128, see decode_24.h; padding is 128 then.)
// One running pointer then serves all R rows; rows read where they lie, a power of two apart, would fight for one set of
// the L1. x_scale and x_sum, (panel, block, R), here are what an integer sum of a quantised row counts, and where it starts; t stays
// (row, rank). Padding rows and columns are 0.
#pragma once
#include "../kernels.h"
#include "prepare.h"
#include "values.h"

namespace calora {
namespace {

// Whether prefill multiplies bf16 by bf16: x is bf16, and every kind of code is exact in bf16, or rounded as a bf16
// weight is (nf4); scales wait for fp32.
template <class V>
bool prefill_bf16_dot(const LinearArgs& a) {
  return V::kBf16Dot && a.activations == Activations::exact && a.x_dtype == DType::bf16;
}

// steps 4-byte groups of one row -> every R-th group from `to` on.
inline void scatter(const void* row, int64_t steps, int64_t R, void* to) {
  for (int64_t s = 0; s < steps; ++s)
    std::memcpy(static_cast<char*>(to) + 4 * s * R, static_cast<const char*>(row) + 4 * s, 4);
}

// The same by groups of 8 int8 columns, as unsigned bytes: + 128.
inline void scatter_eights(const int8_t* row, int64_t steps, int64_t R, int8_t* to) {
  for (int64_t s = 0; s < steps; ++s) {
    uint64_t eight;
    std::memcpy(&eight, row + 8 * s, 8);
    eight ^= 0x8080808080808080;
    std::memcpy(to + 8 * s * R, &eight, 8);
  }
}

constexpr int64_t kScatterColumns = 256;  // at a time, so that the lines of the panel stay in L1 until all rows wrote theirs

// rows x valid of x (row stride `valid`) -> one panel of R x columns fp32.
template <class V, class X>
void pack_fp32(const X* x, int64_t rows, int64_t valid, int64_t columns, int64_t R, float* panel) {
  alignas(64) float part[kScatterColumns];
  for (int64_t k = 0; k < columns; k += kScatterColumns) {
    const int64_t n = columns - k < kScatterColumns ? columns - k : kScatterColumns;
    for (int64_t r = 0; r < R; ++r) {
      const int64_t left = r < rows ? (valid - k < n ? (valid > k ? valid - k : 0) : n) : 0;
      widen_row<V>(x + r * valid + (left ? k : 0), left, n, part);
      scatter(part, n, R, panel + k * R + r);
    }
  }
}

// The same as pairs of bf16. swap: columns 0 2 1 3 of every four, the order in which codes come out of 16-bit lanes.
inline void pack_bf16(const uint16_t* x, int64_t rows, int64_t valid, int64_t columns, int64_t R, bool swap, void* panel) {
  alignas(64) uint16_t part[kScatterColumns];
  for (int64_t k = 0; k < columns; k += kScatterColumns) {
    const int64_t n = columns - k < kScatterColumns ? columns - k : kScatterColumns;
    for (int64_t r = 0; r < R; ++r) {
      const int64_t left = r < rows ? (valid - k < n ? (valid > k ? valid - k : 0) : n) : 0;
      if (left) std::memcpy(part, x + r * valid + k, 2 * static_cast<std::size_t>(left));
      std::memset(part + left, 0, 2 * static_cast<std::size_t>(n - left));
      if (swap)
        for (int64_t c = 0; c < n; c += 4) {
          const uint16_t second = part[c + 1];
          part[c + 1] = part[c + 2];
          part[c + 2] = second;
        }
      scatter(part, n / 2, R, static_cast<char*>(panel) + 4 * (k / 2 * R + r));
    }
  }
}

// Whether prefill by int8 activations shuffles them to kept weights (gemm_24.h). Without VNNI products of int8 are no faster so.
template <class V>
bool shuffles_x(const Weight& w) {
  return w.pattern == Pattern::two_four && (w.values == Values::int4 || (w.values == Values::int8 && V::kVnni));
}

template <class V, class X>
void pack_int8(const LinearArgs& a, const X* x, int64_t rows, int64_t panel, int64_t R) {
  const Geometry& g = a.w.g;
  constexpr int64_t kLongestBlock = 131072;  // what the op accepts
  alignas(64) int8_t codes[kLongestBlock];
  for (int64_t b = 0, k = 0; b < g.blocks; ++b, k += g.block_columns) {
    int8_t* to = a.xq + (panel * g.columns + k) * R;
    float* scale = a.x_scale + (panel * g.blocks + b) * R;
    int32_t* sum = a.x_sum + (panel * g.blocks + b) * R;
    const int64_t left = a.w.in_features - k, valid = left < g.block_columns ? left : g.block_columns;
    for (int64_t r = 0; r < R; ++r) {
      if (r < rows) {
        quantise_block<V>(x + r * a.w.in_features + k, valid, g.block_columns, codes, scale + r, sum + r);
        scale[r] *= unit_of(a.w.values), sum[r] = sum_start<V>(a.w.values, a.w.zeros, sum[r]);
      } else {
        std::memset(codes, 0, static_cast<std::size_t>(g.block_columns));
        scale[r] = 0, sum[r] = 0;
      }
      if (shuffles_x<V>(a.w)) scatter_eights(codes, g.block_columns / 8, R, to + 8 * r);
      else scatter(codes, g.block_columns / 4, R, to + 4 * r);
    }
  }
}

// x of the panels that hold rows [row_begin, row_end) -> xq, x_scale and x_sum, or xf (fp32, or bf16 pairs).
template <class V, class X>
void prefill_prepare(const LinearArgs& a, const X* x, int64_t row_begin, int64_t row_end) {
  const int64_t R = row_panels(a.m).rows, in = a.w.in_features, columns = a.w.g.columns;
  for (int64_t m = row_begin; m < row_end; m += R) {
    const int64_t panel = m / R, rows = row_end - m < R ? row_end - m : R;
    if (a.activations == Activations::int8) {
      pack_int8<V>(a, x + m * in, rows, panel, R);
      continue;
    }
    float* to = a.xf + panel * columns * R;
    if constexpr (sizeof(X) == 2)
      if (prefill_bf16_dot<V>(a)) {
        pack_bf16(x + m * in, rows, in, columns, R, a.w.values != Values::bf16, a.xf + panel * columns / 2 * R);
        continue;
      }
    pack_fp32<V>(x + m * in, rows, in, columns, R, to);
  }
  const int64_t padded = row_panels(a.m).padded_rows();
  if (row_end == a.m && a.bank.rank) std::memset(a.t + a.m * a.bank.rank, 0, sizeof(float) * (padded - a.m) * a.bank.rank);
}

template <class V>
void prefill_prepare(const LinearArgs& a, int64_t row_begin, int64_t row_end) {
  if (a.x_dtype == DType::f32) prefill_prepare<V>(a, static_cast<const float*>(a.x), row_begin, row_end);
  else prefill_prepare<V>(a, static_cast<const uint16_t*>(a.x), row_begin, row_end);
}

// grad of the panels that hold rows [row_begin, row_end) -> a.panels, fp32 or, for vdpbf16ps, pairs of bf16.
template <class V>
void prepare_grad(const BackwardArgs& a, int64_t row_begin, int64_t row_end) {
  const int64_t R = row_panels(a.m).rows, out = a.w.out_features, columns = a.w.g.tiles * kTileRows;
  const auto* g32 = static_cast<const float*>(a.grad);
  const auto* g16 = static_cast<const uint16_t*>(a.grad);
  for (int64_t m = row_begin; m < row_end; m += R) {
    const int64_t rows = row_end - m < R ? row_end - m : R;
    if (a.dtype == DType::f32) pack_fp32<V>(g32 + m * out, rows, out, columns, R, a.panels + m * columns);
    else if (!V::kBf16Dot) pack_fp32<V>(g16 + m * out, rows, out, columns, R, a.panels + m * columns);
    else pack_bf16(g16 + m * out, rows, out, columns, R, false, a.panels + m * columns / 2);
  }
}

}  // namespace
}  // namespace calora
