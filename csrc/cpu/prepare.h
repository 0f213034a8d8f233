// Step 1 of every call: x -> what the base streams against. int8: per row and block, scale = amax / 127, round half to even,
// bit for bit as the reference does it. exact: x widened to fp32 (xf) or, for vdpbf16ps, as bf16 (xb). Padding columns are 0.
#pragma once
#include "../kernels.h"

namespace calora {
namespace {

// Whether the exact path multiplies bf16 by bf16 (both exact, fp32 accumulation). Codes of int8 would have to be converted
// one column at a time, so they take the fp32 path; so do sparse codes of four bits, which are expanded first.
template <class V>
bool uses_bf16_dot(const LinearArgs& a) { return V::kBf16Dot && a.xb && (a.w.values == Values::bf16 || (has_groups(a.w.values) && a.w.pattern == Pattern::dense)); }

template <class V, class X>
void quantise_block(const X* x, int64_t valid, int64_t columns, int8_t* q, float* scale, int32_t* sum) {
  constexpr int64_t L = V::kLanes;
  const int64_t full = valid / L * L;
  auto at = [&](int64_t k) { return k < full ? V::load(x + k) : V::load_part(x + k, valid - k); };
  auto amax = V::zero(), poison = V::zero();  // 0 * x is NaN where x is not finite
  for (int64_t k = 0; k < valid; k += L) {
    const auto v = at(k);
    amax = V::max(amax, V::abs(v));
    poison = V::fma(V::zero(), v, poison);
  }
  const float largest = V::max_of(amax);
  const bool finite = V::sum(poison) == 0.0f, tiny = largest < 1e-30f;  // 127 / tiny would overflow
  int64_t k = 0;
  auto total = V::izero();
  if (finite) {
    const auto inverse = V::set1(tiny ? 0.0f : 127.0f / largest);
    for (; k < valid; k += L) {
      const auto code = V::to_int(V::mul(at(k), inverse));
      V::store_i8(q + k, code);
      total = V::iadd(total, code);
    }
  }
  if (k < columns) std::memset(q + k, 0, static_cast<std::size_t>(columns - k));
  *scale = !finite ? __builtin_nanf("") : tiny ? 0.0f : largest / 127.0f;
  *sum = V::isum(total);
}

template <class V, class X>
void widen_row(const X* x, int64_t valid, int64_t columns, float* out) {
  constexpr int64_t L = V::kLanes;
  const int64_t full = valid / L * L;
  for (int64_t k = 0; k < full; k += L) V::store(out + k, V::load(x + k));
  for (int64_t k = full; k < columns; k += L) V::store(out + k, k < valid ? V::load_part(x + k, valid - k) : V::zero());
}

// Whether exact activations meet dense codes where they lie, decoding.
template <class V>
constexpr bool multiplies_in_place(Values values) { return V::kLanes == 8 && values == Values::int4; }

// x for that (decode.h): a nibble whose lowest bit is bit b of a 32-bit lane is its code times 2^b, and meets x times 2^-b; both are
// exact, but for x below 2^-102. (The last nibble of a lane is shifted instead: where it lies it would be signed.) And what the
// middle adds to each eight columns, to be taken off.
inline void scale_eights(int64_t columns, float* x, float* eights) {
  const __m256 scales = _mm256_setr_ps(0x1p0f, 0x1p-8f, 0x1p-16f, 0x1p-24f, 0x1p-4f, 0x1p-12f, 0x1p-20f, 0x1p0f);
  for (int64_t k = 0; k < columns; k += 8, x += 8) {
    const __m256 v = _mm256_loadu_ps(x);
    __m128 sum = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    sum = _mm_add_ps(sum, _mm_movehl_ps(sum, sum));
    sum = _mm_add_ss(sum, _mm_shuffle_ps(sum, sum, 1));
    eights[k / 8] = -kInt4Zero * _mm_cvtss_f32(sum);
    _mm256_storeu_ps(x, _mm256_mul_ps(v, scales));
  }
}

// bf16 x in the order in which decoding multiplies it: columns 0 2 4 6 1 3 5 7 of every eight for 4-bit codes, whose even and
// odd columns come out of a 16-bit lane together (decode.h); unchanged otherwise.
void copy_bf16(const uint16_t* x, int64_t valid, int64_t columns, bool pairs, uint16_t* out) {
  std::memcpy(out, x, 2 * static_cast<std::size_t>(valid));
  std::memset(out + valid, 0, 2 * static_cast<std::size_t>(columns - valid));
  if (!pairs) return;
  for (int64_t k = 0; k < columns; k += 8) {
    const uint16_t c1 = out[k + 1], c2 = out[k + 2], c3 = out[k + 3], c4 = out[k + 4], c5 = out[k + 5], c6 = out[k + 6];
    out[k + 1] = c2, out[k + 2] = c4, out[k + 3] = c6, out[k + 4] = c1, out[k + 5] = c3, out[k + 6] = c5;
  }
}

template <class V, class X>
void prepare_rows(const LinearArgs& a, const X* x, int64_t row_begin, int64_t row_end) {
  const Geometry& g = a.w.g;
  const int64_t in = a.w.in_features;
  for (int64_t m = row_begin; m < row_end; ++m) {
    const X* row = x + m * in;
    if (a.activations == Activations::int8) {
      for (int64_t b = 0, k = 0; b < g.blocks; ++b, k += g.block_columns)
        quantise_block<V>(row + k, in - k < g.block_columns ? in - k : g.block_columns, g.block_columns, a.xq + m * g.columns + k,
                          a.x_scale + m * g.blocks + b, a.x_sum + m * g.blocks + b);
      continue;
    }
    const bool bf16 = uses_bf16_dot<V>(a);
    if (!bf16) widen_row<V>(row, in, g.columns, a.xf + m * g.columns);
    if (!bf16 && a.x_eights && multiplies_in_place<V>(a.w.values)) scale_eights(g.columns, a.xf + m * g.columns, a.x_eights + m * g.columns / 8);
    if constexpr (sizeof(X) == 2) {
      if (bf16) copy_bf16(row, in, g.columns, has_groups(a.w.values), a.xb + m * g.columns);
    }
  }
}

template <class V>
void prepare(const LinearArgs& a, int64_t row_begin, int64_t row_end) {
  if (a.x_dtype == DType::f32) prepare_rows<V>(a, static_cast<const float*>(a.x), row_begin, row_end);
  else prepare_rows<V>(a, static_cast<const uint16_t*>(a.x), row_begin, row_end);
}

}  // namespace
}  // namespace calora
