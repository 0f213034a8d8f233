// A rung: the templates over the vectors of one instruction set. Included by one translation unit per rung, after simd_*.h.
// Everything here has internal linkage and nothing from std:: is instantiated: an inline function compiled with a rung's
// flags could otherwise be the one copy that the linker keeps for baseline code.
#pragma once
#include "bank.h"
#include "decode.h"
#include "decode_sparse.h"
#include "gemm.h"
#include "prepare.h"

namespace calora {
namespace {

template <class V>
void prepare_x(const LinearArgs& a, int64_t row_begin, int64_t row_end) {
  if (a.m > kDecodeRows) return prefill_prepare<V>(a, row_begin, row_end);
  prepare<V>(a, row_begin, row_end);
  if (a.w.pattern == Pattern::two_four && a.activations == Activations::int8 && a.w.values != Values::nf4) offset_x(a, row_begin, row_end);
}

template <class V>
void units(const LinearArgs& a, int64_t unit_begin, int64_t unit_end) {
  if (a.m > kDecodeRows) gemm_units<V>(a, unit_begin, unit_end);
  else if (a.w.pattern == Pattern::dense) decode_tiles<V>(a, unit_begin, unit_end);
  else decode_sparse<V>(a, unit_begin, unit_end);
  if (a.m <= kDecodeRows) bank_pass<V>(a, unit_begin, unit_end);
}

// Sparse weights are expanded a piece of a tile at a time: element by element, the reference counts the bits before each.
template <class V>
void decode_rows(const Weight& w, int64_t begin, int64_t end, float* out) {
  if (w.pattern == Pattern::dense) return kReference.decode_rows(w, begin, end, out);
  const Geometry& g = w.g;
  alignas(64) float panel[kChunkColumns * kTileRows];
  for (int64_t tile = begin / kTileRows; tile * kTileRows < end; ++tile)
    for (int64_t k = 0; k < w.in_features;) {
      const int64_t block = k / g.block_columns, left = (block + 1) * g.block_columns - k;
      const int64_t columns = left < kChunkColumns ? left : kChunkColumns;
      const Block b = block_of<V>(w, tile, block, k % g.block_columns, columns);
      decode_fp32<V>(w.values, b, 0, columns, panel);
      for (int64_t r = 0; r < kTileRows; ++r) {
        const int64_t n = tile * kTileRows + r;
        if (n < begin || n >= end) continue;
        for (int64_t c = 0; c < columns && k + c < w.in_features; ++c)
          out[(n - begin) * w.in_features + k + c] = panel[c * kTileRows + r] * b.scale[r];
      }
      k += columns;
    }
}

// Twelve streams, 256 bytes of each in turn, asked for 768 bytes ahead into L2: of what was tried the fastest way for one thread to
// read memory in 4 KB pages (benchmarks/NOTES.md).
template <class V>
uint64_t read(const uint8_t* data, int64_t bytes) {
  constexpr int kStreams = 12, kChunk = 256, kAhead = 768;
  const int64_t part = bytes / kStreams / kChunk * kChunk;
  typename V::I all[4] = {V::izero(), V::izero(), V::izero(), V::izero()};
  for (int64_t at = 0; at < part; at += kChunk)
    for (int s = 0; s < kStreams; ++s) {
      const uint8_t* p = data + s * part + at;
      for (int i = 0; i < kChunk; i += 64) prefetch(p + kAhead + i);
#pragma GCC unroll 8
      for (int i = 0; i < kChunk / V::kBytes; ++i) all[i % 4] = V::ixor(all[i % 4], V::iload(p + i * V::kBytes));
    }
  uint64_t words[V::kBytes / 8], result = 0;
  V::istore(words, V::ixor(V::ixor(all[0], all[1]), V::ixor(all[2], all[3])));
  for (const uint64_t w : words) result ^= w;
  return result ^ kReference.read(data + kStreams * part, bytes - kStreams * part);
}

// Where one row takes as long with two threads as with one (int4, in L2 and in L3; benchmarks/NOTES.md).
constexpr int64_t kForkBytes = 416 * 1024;

// consteval: a table built at load would run code of this instruction set on processors that lack it.
template <class V>
consteval Kernels rung(const char* isa) {
  return {isa, kForkBytes, prepare_x<V>, bank_down<V>, units<V>, decode_rows<V>, prepare_grad<V>, backward_units<V>, read<V>};
}

}  // namespace
}  // namespace calora
