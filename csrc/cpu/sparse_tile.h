// What the sparse kernels share.
#pragma once
#include "decode.h"

namespace calora {
namespace {

// Keeps a vector in a register: GCC folds a load into every use of it, and loads are what these kernels have too many of.
template <class T>
__attribute__((always_inline)) inline void keep_loaded(T& v) { asm("" : "+v"(v)); }

// Keeps a pointer in one register, and what is added to it in the addresses: GCC makes a pointer of every offset, and spills them.
template <class T>
__attribute__((always_inline)) inline void keep_pointer(T*& p) { asm("" : "+r"(p)); }

// How many of a tile's registers are accumulated together: as many as leave room for weights and temporaries.
template <class V, int M>
constexpr int sparse_regs() {
  constexpr int budget = V::kLanes == 16 ? 16 : 8;  // of 32 and 16 registers
  return M * V::kTileRegs <= budget ? V::kTileRegs : M * 2 <= budget ? 2 : 1;
}

}  // namespace
}  // namespace calora
