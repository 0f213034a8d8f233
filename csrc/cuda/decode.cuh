// Any pattern as a dense matrix: one warp per chunk of 32 x 32, a lane writes 8 consecutive columns of its 4 rows. A pattern
// gives each lane its codes as the dense chunk order of api.h has them, with the code of 0 where nothing is kept.
#pragma once
#include "values.cuh"

namespace calora::cuda {
namespace {

struct Decode {
  PackedWeight w;
  void* out;
  int64_t row_begin, row_end;
  Dtype dtype;
};
constexpr int kDecodeWarps = 8;

__device__ __forceinline__ void store8(const Decode& d, int64_t row, int64_t column, const float (&v)[8]) {
  const int64_t at = (row - d.row_begin) * d.w.in_features + column;
  if (column + 8 <= d.w.in_features && d.w.in_features % 8 == 0) {  // whole 16-byte words; `out` is a fresh, aligned tensor
    if (d.dtype == Dtype::f32) {
      auto* const p = reinterpret_cast<float4*>(static_cast<float*>(d.out) + at);
      p[0] = float4{v[0], v[1], v[2], v[3]}, p[1] = float4{v[4], v[5], v[6], v[7]};
      return;
    }
    const auto convert = [&](float f) { return d.dtype == Dtype::bf16 ? float_to_bf16(f) : float_to_f16(f); };
    *reinterpret_cast<uint4*>(static_cast<uint16_t*>(d.out) + at) =
        uint4{pair(convert(v[0]), convert(v[1])), pair(convert(v[2]), convert(v[3])), pair(convert(v[4]), convert(v[5])), pair(convert(v[6]), convert(v[7]))};
    return;
  }
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    if (column + i >= d.w.in_features) break;
    if (d.dtype == Dtype::f32) static_cast<float*>(d.out)[at + i] = v[i];
    else static_cast<uint16_t*>(d.out)[at + i] = d.dtype == Dtype::bf16 ? float_to_bf16(v[i]) : float_to_f16(v[i]);
  }
}

// L: words(weight, geometry, tile, chunk of the tile, lane, words).
template <class V, class L>
__global__ void __launch_bounds__(kDecodeWarps * 32) decode(const Decode a, const Geometry geo) {
  wait_for_previous();
  const int lane = threadIdx.x % 32, g = lane / 4, c = lane % 4;
  const int64_t chunk = static_cast<int64_t>(blockIdx.y) * kDecodeWarps + threadIdx.x / 32, tile = a.row_begin / kTileRows + blockIdx.x;
  if (chunk >= geo.columns / kChunkColumns) return;
  const int64_t block = chunk / (geo.block_columns / kChunkColumns);
  uint32_t words[4 * V::kWords];
  L::template words<V>(a.w, geo, tile, chunk, lane, words);
  const uint2 scale = load_scales<V>(scales_of<V>(a.w, geo, tile, block) + g * V::kScaleWord);
  const float outer = outer_scale<V>(a.w, geo, tile);
  const uint16_t zero = a.w.zeros ? reinterpret_cast<const uint16_t*>(a.w.zeros)[(tile * geo.blocks + block) * 8 + g] : 0x8888;
#pragma unroll
  for (int rt = 0; rt < 2; ++rt)
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const int64_t row = tile * kTileRows + 16 * rt + 8 * j + g;
      if (row < a.row_begin || row >= a.row_end) continue;
      const float factor = V::scale(scale, 2 * rt + j) * outer;
      const float offset = static_cast<float>(static_cast<int>(zero >> (4 * (2 * rt + j)) & 15) - kInt4Zero);
      float v[8];
#pragma unroll
      for (int i = 0; i < 8; ++i) v[i] = factor * (V::weight(words, rt, j, i >> 2, i >> 1 & 1, i & 1) - offset);
      store8(a, row, chunk * kChunkColumns + 8 * c, v);
    }
}

template <class L>
int launch_decode(const PackedWeight& w, int64_t row_begin, int64_t row_end, void* out, int64_t out_dtype, void* stream) {
  const Geometry geo = geometry_of(w);
  const int64_t chunks = geo.columns / kChunkColumns;
  const dim3 grid(static_cast<unsigned>(round_up(row_end, kTileRows) / kTileRows - row_begin / kTileRows),
                  static_cast<unsigned>(round_up(chunks, kDecodeWarps) / kDecodeWarps));
  const Decode args{w, out, row_begin, row_end, static_cast<Dtype>(out_dtype)};
  switch (static_cast<Values>(w.values)) {
    case Values::bf16: return launch(decode<Dense16<Bf16, 1>, L>, grid, kDecodeWarps * 32, 0, stream, args, geo);
    case Values::int8: return launch(decode<Int8<Bf16, 1>, L>, grid, kDecodeWarps * 32, 0, stream, args, geo);
    case Values::int4: return launch(decode<Int4<Bf16, 1>, L>, grid, kDecodeWarps * 32, 0, stream, args, geo);
    case Values::nf4: return launch(decode<Nf4<Bf16, 1>, L>, grid, kDecodeWarps * 32, 0, stream, args, geo);
  }
  return kInvalidValue;
}

}  // namespace
}  // namespace calora::cuda
