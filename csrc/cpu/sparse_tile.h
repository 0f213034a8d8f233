// What the sparse kernels share: rows, sums and the end of a tile.
#pragma once
#include "bank.h"

namespace calora {
namespace {

constexpr int64_t kTouchAhead = 1024;  // bytes of a stream that are asked for before they are needed
constexpr int64_t kVisit = 4;         // times 32 columns of a tile, before the next tile has its turn

// always_inline: GCC takes a function that only prefetches for one without effects and deletes the call.
__attribute__((always_inline)) inline void touch(const uint8_t* p) { _mm_prefetch(reinterpret_cast<const char*>(p + kTouchAhead), _MM_HINT_T1); }

// Keeps a vector in a register: GCC folds a load into every use of it, and loads are what these kernels have too many of.
template <class T>
__attribute__((always_inline)) inline void keep_loaded(T& v) { asm("" : "+v"(v)); }

// Keeps a pointer in one register, and what is added to it in the addresses: GCC makes a pointer of every offset, and spills them.
template <class T>
__attribute__((always_inline)) inline void keep_pointer(T*& p) { asm("" : "+r"(p)); }

template <class V, int M>
using TileSums = typename V::F[M][V::kTileRegs];

template <class V, int M>
void zero_sums(TileSums<V, M>& y) {
  for (auto& row : y)
    for (auto& v : row) v = V::zero();
}

// How many of a tile's registers are accumulated together: as many as leave room for weights and temporaries.
template <class V, int M>
constexpr int sparse_regs() {
  constexpr int budget = V::kLanes == 16 ? 16 : 8;  // of 32 and 16 registers
  return M * V::kTileRegs <= budget ? V::kTileRegs : M * 2 <= budget ? 2 : 1;
}

// Bias, bank and y of the rows that exist.
template <class V, int M>
void finish_rows(const LinearArgs& a, int64_t tile, TileSums<V, M>& y) {
  if (a.m == M) {
    if (a.bank.rank) bank_up<V, M>(a, tile, y);
    return finish_tile<V, M>(a, tile, y);
  }
  LinearArgs one = a;
  for (int64_t m = 0; m < a.m; ++m) {
    TileSums<V, 1> row;
    for (int i = 0; i < V::kTileRegs; ++i) row[0][i] = y[m][i];
    one.t = a.bank.rank ? a.t + m * a.bank.rank : nullptr;
    one.y = static_cast<uint8_t*>(a.y) + m * a.w.out_features * (a.x_dtype == DType::f32 ? 4 : 2);
    if (a.bank.rank) bank_up<V, 1>(one, tile, row);
    finish_tile<V, 1>(one, tile, row);
  }
}

template <class V, int M>
void finish_rows(const LinearArgs& a, int64_t tile, const float (&sums)[M * kTileRows]) {
  TileSums<V, M> y;
  for (int m = 0; m < M; ++m)
    for (int i = 0; i < V::kTileRegs; ++i) y[m][i] = V::load(sums + m * kTileRows + i * V::kLanes);
  finish_rows<V, M>(a, tile, y);
}

}  // namespace
}  // namespace calora
