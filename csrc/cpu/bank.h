// The low-rank bank: t = phi(x D^T), and t U^T onto the accumulators of a tile.
#pragma once
#include "../kernels.h"

namespace calora {
namespace {

constexpr int64_t kUpChunk = 16;  // ranks of U that are multiplied at once

// Into L2. always_inline: GCC takes a function that only prefetches for one without effects and deletes the call.
__attribute__((always_inline)) inline void prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T1); }

float gelu(float v) { return 0.5f * v * (1.0f + __builtin_erff(v * 0.70710678f)); }

// MB rows of x times RB rows of D, `apart` rows from each other. Every product has one accumulator that runs along k, so t does
// not depend on how rows and ranks were cut into blocks (and hence on the number of threads).
template <class V, int MB, int RB, class X, class D>
void down_block(const X* x, const D* d, int64_t apart, int64_t in, float* t, int64_t rank) {
  constexpr int64_t L = V::kLanes, kLineColumns = 64 / sizeof(D), kAhead = 1024 / sizeof(D);
  typename V::F acc[MB][RB];
  for (auto& row : acc)
    for (auto& v : row) v = V::zero();
  auto step = [&](int64_t k, auto load) __attribute__((always_inline)) {
    typename V::F w[RB];
#pragma GCC unroll 8
    for (int r = 0; r < RB; ++r) w[r] = load(d + r * apart * in + k);
#pragma GCC unroll 8
    for (int m = 0; m < MB; ++m) {
      const auto v = load(x + m * in + k);
#pragma GCC unroll 8
      for (int r = 0; r < RB; ++r) acc[m][r] = V::fma(v, w[r], acc[m][r]);
    }
  };
  int64_t k = 0;
  for (; k + kLineColumns <= in; k += kLineColumns) {
#pragma GCC unroll 8
    for (int r = 0; r < RB; ++r) prefetch(d + r * apart * in + k + kAhead);
    if constexpr (V::kBf16Dot && sizeof(X) == 2 && sizeof(D) == 2) {
      typename V::I w[RB];
#pragma GCC unroll 8
      for (int r = 0; r < RB; ++r) w[r] = V::iload(d + r * apart * in + k);
#pragma GCC unroll 8
      for (int m = 0; m < MB; ++m) {
        const auto v = V::iload(x + m * in + k);
#pragma GCC unroll 8
        for (int r = 0; r < RB; ++r) acc[m][r] = V::dot_bf16(acc[m][r], w[r], v);
      }
    } else {
#pragma GCC unroll 8
      for (int64_t i = 0; i < kLineColumns; i += L) step(k + i, [](auto* p) { return V::load(p); });
    }
  }
  for (; k + L <= in; k += L) step(k, [](auto* p) { return V::load(p); });
  if (k < in) step(k, [&](auto* p) { return V::load_part(p, in - k); });
  for (int m = 0; m < MB; ++m)
    for (int r = 0; r < RB; ++r) t[m * rank + r * apart] = V::sum(acc[m][r]);
}

// M rows of x times ranks [begin, end): several runs of D side by side, as decode.h streams the base.
template <class V, int M, class X, class D>
void down_ranks(const X* x, const D* d, int64_t in, float* t, int64_t rank, int64_t begin, int64_t end) {
  constexpr int kWide = M == 1 ? 8 : V::kLanes == 16 ? 4 : 2;
  const int64_t run = (end - begin) / kWide;
  int64_t r = begin;
  for (; r < begin + run; ++r) down_block<V, M, kWide>(x, d + r * in, run, in, t + r, rank);
  for (r = begin + run * kWide; r < end; ++r) down_block<V, M, 1>(x, d + r * in, 0, in, t + r, rank);
}

template <class V, class X, class D>
void down(const LinearArgs& a, int64_t row_begin, int64_t row_end, int64_t rank_begin, int64_t rank_end) {
  const int64_t in = a.w.in_features, rank = a.bank.rank;
  const auto* d = static_cast<const D*>(a.bank.down);
  for (int64_t m = row_begin; m < row_end;) {
    const X* x = static_cast<const X*>(a.x) + m * in;
    float* t = a.t + m * rank;
    if (row_end - m >= 4) down_ranks<V, 4>(x, d, in, t, rank, rank_begin, rank_end), m += 4;
    else down_ranks<V, 1>(x, d, in, t, rank, rank_begin, rank_end), m += 1;
  }
  for (int64_t m = row_begin; m < row_end; ++m)
    for (int64_t r = rank_begin > a.bank.identity_rank ? rank_begin : a.bank.identity_rank; r < rank_end; ++r)
      a.t[m * rank + r] = gelu(a.t[m * rank + r]);
}

template <class V>
void bank_down(const LinearArgs& a, int64_t row_begin, int64_t row_end, int64_t rank_begin, int64_t rank_end) {
  const bool x32 = a.x_dtype == DType::f32, d32 = a.bank.dtype == DType::f32;
  if (x32 && d32) down<V, float, float>(a, row_begin, row_end, rank_begin, rank_end);
  else if (x32) down<V, float, uint16_t>(a, row_begin, row_end, rank_begin, rank_end);
  else if (d32) down<V, uint16_t, float>(a, row_begin, row_end, rank_begin, rank_end);
  else down<V, uint16_t, uint16_t>(a, row_begin, row_end, rank_begin, rank_end);
}

// A row of U for 32 outputs. bf16 comes as even and odd lanes, which takes no shuffle; in_order() puts sums right.
template <class V>
void load_up(const float* p, typename V::F (&u)[V::kTileRegs]) {
#pragma GCC unroll 4
  for (int i = 0; i < V::kTileRegs; ++i) u[i] = V::load(p + i * V::kLanes);
}
template <class V>
void load_up(const uint16_t* p, typename V::F (&u)[V::kTileRegs]) {
#pragma GCC unroll 4
  for (int i = 0; i < V::kTileRegs; i += 2) {
    const auto w = V::iload(p + i * V::kLanes);
    u[i] = V::as_float(V::template shl32<16>(w)), u[i + 1] = V::as_float(V::iand(w, V::iset1(static_cast<int>(0xffff0000))));
  }
}
template <class V>
void in_order(const float*, typename V::F (&)[V::kTileRegs]) {}
template <class V>
void in_order(const uint16_t*, typename V::F (&sum)[V::kTileRegs]) {
#pragma GCC unroll 4
  for (int i = 0; i < V::kTileRegs; i += 2) V::interleave(sum[i], sum[i + 1]);
}

// acc += t[m, begin..end) * rows of up, (end - begin, 32). Asks for the tiles that follow.
template <class V, int M, class U>
void up_ranks(const LinearArgs& a, const U* up, int64_t begin, int64_t end, typename V::F (&acc)[M][V::kTileRegs]) {
  typename V::F sum[M][V::kTileRegs];
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
    for (int i = 0; i < V::kTileRegs; ++i) sum[m][i] = V::zero();
  for (int64_t r = begin; r < end; ++r, up += kTileRows) {
    typename V::F u[V::kTileRegs];
    for (int64_t i = 0; i < kTileRows; i += 64 / static_cast<int64_t>(sizeof(U))) prefetch(up + i + 1024 / sizeof(U));
    load_up<V>(up, u);
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
      const auto v = V::set1(a.t[m * a.bank.rank + r]);
#pragma GCC unroll 4
      for (int i = 0; i < V::kTileRegs; ++i) sum[m][i] = V::fma(v, u[i], sum[m][i]);
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m) {
    in_order<V>(up, sum[m]);
#pragma GCC unroll 4
    for (int i = 0; i < V::kTileRegs; ++i) acc[m][i] = V::add(acc[m][i], sum[m][i]);
  }
}

template <class V, int M, class U>
void up_tile(const LinearArgs& a, int64_t tile, int64_t begin, int64_t end, typename V::F (&acc)[M][V::kTileRegs]) {
  const auto* up = static_cast<const U*>(a.bank.up);
  const int64_t rank = a.bank.rank;
  if (a.bank.tiled) return up_ranks<V, M>(a, up + (tile * rank + begin) * kTileRows, begin, end, acc);
  // Row-major is what training holds; turning it costs a scalar load per element, which inference avoids by tiling once.
  const int64_t rows = a.w.out_features - tile * kTileRows < kTileRows ? a.w.out_features - tile * kTileRows : kTileRows;
  alignas(64) U turned[kUpChunk * kTileRows] = {};
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t r = begin; r < end; ++r) turned[(r - begin) * kTileRows + i] = up[(tile * kTileRows + i) * rank + r];
  up_ranks<V, M>(a, turned, begin, end, acc);
}

// acc += t U^T for the 32 rows of a tile, ranks [begin, end): kUpChunk at most.
template <class V, int M>
void bank_up(const LinearArgs& a, int64_t tile, int64_t begin, int64_t end, typename V::F (&acc)[M][V::kTileRegs]) {
  if (a.bank.dtype == DType::f32) up_tile<V, M, float>(a, tile, begin, end, acc);
  else up_tile<V, M, uint16_t>(a, tile, begin, end, acc);
}

// The end of every tile: acc + bias -> y, rounded once. Of M rows, those that exist.
template <class V, int M, class Y, class B>
void store_rows(const LinearArgs& a, int64_t tile, const typename V::F (&acc)[M][V::kTileRegs]) {
  const int64_t out = a.w.out_features;
#pragma GCC unroll 4
  for (int i = 0; i < V::kTileRegs; ++i) {
    const int64_t n = tile * kTileRows + i * V::kLanes, left = out - n;
    if (left <= 0) return;
    const bool whole = left >= V::kLanes;
    const B* bias = static_cast<const B*>(a.bias) + n;
    const auto b = !a.bias ? V::zero() : whole ? V::load(bias) : V::load_part(bias, left);
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
      if (m == a.m) break;
      Y* y = static_cast<Y*>(a.y) + m * out + n;
      const auto v = V::add(acc[m][i], b);
      if (whole) V::store(y, v);
      else V::store_part(y, v, left);
    }
  }
}

template <class V, int M>
void store_tile(const LinearArgs& a, int64_t tile, const typename V::F (&acc)[M][V::kTileRegs]) {
  const bool b32 = a.bias_dtype == DType::f32;
  if (a.x_dtype == DType::f32) {
    if (b32) store_rows<V, M, float, float>(a, tile, acc);
    else store_rows<V, M, float, uint16_t>(a, tile, acc);
  } else {
    if (b32) store_rows<V, M, uint16_t, float>(a, tile, acc);
    else store_rows<V, M, uint16_t, uint16_t>(a, tile, acc);
  }
}

}  // namespace
}  // namespace calora
