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

// Up to how many rows are decoded. Of sparse weights more than kDecodeRows, eight at a time, where a tile is faster multiplied again, from L2,
// than taken apart or expanded once for all rows (benchmarks/NOTES.md).
template <class V>
int64_t most_decoded_rows(const LinearArgs& a) {
  const Values values = a.w.values;
  const bool int8 = a.activations == Activations::int8;
  if (a.w.pattern == Pattern::dense) return most_dense_rows<V>(values, a.activations);
  if (a.w.pattern == Pattern::two_four && int8) return most_two_four_rows<V>(values);
#ifdef __AVX512VBMI2__
  if (has_kept(a.w.pattern) && int8) return kKeptRows;
#endif
#if defined(__AVX512VBMI2__) && defined(__AVX512BF16__)
  if (a.activations == Activations::exact && a.x_dtype == DType::bf16 && values == Values::bf16) {
    if (a.w.pattern == Pattern::two_four) return kMaxRows;
    if (a.w.pattern == Pattern::bitmask) return 16;
  }
#endif
  return kDecodeRows;
}

template <class V>
bool decodes(const LinearArgs& a) { return a.m <= most_decoded_rows<V>(a); }

template <class V>
void prepare_x(const LinearArgs& a, int64_t row_begin, int64_t row_end) {
  if (!decodes<V>(a)) return prefill_prepare<V>(a, row_begin, row_end);
  prepare<V>(a, row_begin, row_end);
  if (a.w.pattern == Pattern::two_four && a.activations == Activations::int8 && a.w.values != Values::nf4) offset_x(a, row_begin, row_end);
}

template <class V>
void decode(const LinearArgs& a, int64_t begin, int64_t end) {
  if (a.w.pattern == Pattern::dense) return decode_tiles<V>(a, begin, end);
  decode_sparse<V>(a, begin, end);
}

// Rows [row, row + kDecodeRows) of a call, those that there are.
LinearArgs rows_from(const LinearArgs& a, int64_t row) {
  const Geometry& g = a.w.g;
  const int64_t y_bytes = (a.x_dtype == DType::f32 ? 4 : 2) * a.w.out_features;
  LinearArgs part = a;
  part.m = a.m - row < kDecodeRows ? a.m - row : kDecodeRows;
  part.y = static_cast<uint8_t*>(a.y) + row * y_bytes;
  if (a.xq) part.xq += row * g.columns, part.x_scale += row * g.blocks, part.x_sum += row * g.blocks;
  if (a.xf) part.xf += row * g.columns;
  if (a.xb) part.xb += row * g.columns;
  if (a.bank.rank) part.t += row * a.bank.rank, part.sums += row * g.tiles * kTileRows;
  return part;
}

template <class V>
void units(const LinearArgs& a, int64_t unit_begin, int64_t unit_end) {
  if (!decodes<V>(a)) return gemm_units<V>(a, unit_begin, unit_end);
  if (a.m <= kDecodeRows) decode<V>(a, unit_begin, unit_end);
  for (int64_t tile = unit_begin; a.m > kDecodeRows && tile < unit_end; ++tile)
    for (int64_t row = 0; row < a.m; row += kDecodeRows) decode<V>(rows_from(a, row), tile, tile + 1);
  for (int64_t row = 0; row < a.m; row += kDecodeRows) bank_pass<V>(rows_from(a, row), unit_begin, unit_end);
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
  return {isa, decodes<V>, kForkBytes, prepare_x<V>, bank_down<V>, units<V>, decode_rows<V>, prepare_grad<V>, backward_units<V>, read<V>};
}

}  // namespace
}  // namespace calora
