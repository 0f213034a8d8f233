// Dense patterns (no sparsity): the fused layer for few rows of x, and decoding to a dense matrix.
//
//   y = x W^T + bias + t U^T          t = phi(x D^T), from bank.cu
//
// One block owns a tile of 32 rows of W and streams it once; its warps split the columns. W is the m16 operand of the mma and
// the rows of x its n8 operand, so that up to 8 rows of x cost one mma. Each lane copies its own operands through a ring in
// shared memory, many chunks ahead of the arithmetic, and reads nothing that another lane copied: inside the loop no lane
// waits for another. The warps' sums meet in shared memory at the end and are added in one fixed order.
#include "bank.cuh"
#include "values.cuh"

namespace calora::cuda {
namespace {

// All of 32 lanes of a stage: W words | x words | scales (8 bytes a lane) | zero points (4 bytes a lane).
template <class V, int NB>
struct Ring {
  static constexpr int kWarps = NB < 8 ? 8 : 4;  // many rows of x: more shared memory a warp, fewer warps
  static constexpr int kX = 512 * V::kWords, kScale = kX + 512 * NB, kZero = kScale + (V::kScaled ? 256 : 0);
  static constexpr int kStage = kZero + (V::kZeros ? 128 : 0);
  static constexpr int kBudget = 96 * 1024;      // what a block may have on every architecture since sm_80
  static constexpr int kFit = kBudget / (kWarps * kStage), kStages = kFit < 8 ? kFit : 8;
  static constexpr int kBytes = kWarps * kStages * kStage;
  static_assert(kStages >= 3, "too few chunks in flight");
};

constexpr int kSumStride = 36;  // floats from one row of x to the next where the warps' sums meet; 36: no bank conflicts

template <class V, class T, int NB>
__global__ void __launch_bounds__(Ring<V, NB>::kWarps * 32, NB <= 2 ? 2 : 1) linear_dense(const LinearArgs a, const Geometry geo) {
  using R = Ring<V, NB>;
  CALORA_SHARED(shared);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, c = lane % 4;
  const int64_t tile = blockIdx.x, m0 = static_cast<int64_t>(blockIdx.y) * 8 * NB;
  const int chunks = static_cast<int>(geo.columns / kChunkColumns), per_block = static_cast<int>(geo.block_columns / kChunkColumns);
  // This warp's share: any range, whole blocks or not, because a block's scale may be applied to parts of its sum.
  const int first = chunks * warp / R::kWarps, last = chunks * (warp + 1) / R::kWarps;

  // The ring: `next` is the chunk that is copied next, `from` this lane's words of it, `rest` the chunks of its block from it on.
  uint8_t* const ring = shared + warp * (R::kStages * R::kStage);
  int next = first, next_stage = 0, block = first / per_block, rest = per_block - first % per_block;
  const uint8_t* from = a.w.packed + tile * geo.tile_bytes + block * geo.block_bytes + (per_block - rest) * (V::kWords * 512) + lane * 16;
  const auto fetch = [&] {
    if (next < last) {
      uint8_t* const stage = ring + next_stage * R::kStage;
#pragma unroll
      for (int v = 0; v < V::kWords; ++v) copy16(stage + v * 512 + lane * 16, from + v * 512);
      const int column = next * static_cast<int>(kChunkColumns) + 8 * c, left = 2 * (static_cast<int>(a.w.in_features) - column);
      const int bytes = left >= 16 ? 16 : left > 0 ? left : 0;
#pragma unroll
      for (int n = 0; n < NB; ++n) {
        const int64_t row = m0 + 8 * n + g;
        const bool there = row < a.m && bytes > 0;
        copy16(stage + R::kX + n * 512 + lane * 16, static_cast<const uint16_t*>(a.x) + (there ? row * a.x_stride + column : 0), there ? bytes : 0);
      }
      if (V::kScaled && (rest == 1 || next + 1 == last)) {
        copy_small<8>(stage + R::kScale + lane * 8, from - lane * 16 + rest * (V::kWords * 512) + g * 8);
        if (V::kZeros && a.w.zeros) copy_small<4>(stage + R::kZero + lane * 4, a.w.zeros + (tile * geo.blocks + block) * kZeroBytes + g / 2 * 4);
      }
      from += V::kWords * 512;
      if (--rest == 0) rest = per_block, ++block, from += V::kScaled ? kScaleBytes : 0;
      ++next;
      if (++next_stage == R::kStages) next_stage = 0;
    }
    copy_commit();  // an empty group too: the number of groups tells what has arrived
  };

#pragma unroll
  for (int i = 0; i < R::kStages - 1; ++i) fetch();

  float y[2][NB][4] = {};  // [rt][n][2 j + e]: row 16 rt + 8 j + g of the tile, row m0 + 8 n + 2 c + e of x
  add_low_rank<NB>(y, a.bank, a.w.out_features, tile, m0, padded_rows(a.m), warp, R::kWarps, g, c);

  float d[2][NB][4] = {}, sum_x[NB][4] = {};  // of the current block, not yet scaled
  const bool needs_sum = V::kOffset != 0 || (V::kZeros && a.w.zeros);
  int in_block = first % per_block, this_stage = 0;
  for (int chunk = first; chunk < last; ++chunk) {
    copy_wait<R::kStages - 2>();
    fetch();  // into the stage that was read one turn ago
    const uint8_t* const stage = ring + this_stage * R::kStage;
    if (++this_stage == R::kStages) this_stage = 0;
    uint32_t words[4 * V::kWords];
#pragma unroll
    for (int v = 0; v < V::kWords; ++v) {
      const uint4 word = *reinterpret_cast<const uint4*>(stage + v * 512 + lane * 16);
      words[4 * v] = word.x, words[4 * v + 1] = word.y, words[4 * v + 2] = word.z, words[4 * v + 3] = word.w;
    }
    uint32_t x[NB][4];
#pragma unroll
    for (int n = 0; n < NB; ++n) {
      const uint4 word = *reinterpret_cast<const uint4*>(stage + R::kX + n * 512 + lane * 16);
      x[n][0] = word.x, x[n][1] = word.y, x[n][2] = word.z, x[n][3] = word.w;
    }
#pragma unroll
    for (int s = 0; s < 2; ++s) {
#pragma unroll
      for (int rt = 0; rt < 2; ++rt) {
        uint32_t fragment[4];
        V::fragment(words, rt, s, fragment);
#pragma unroll
        for (int n = 0; n < NB; ++n) mma<T>(d[rt][n], fragment, x[n][2 * s], x[n][2 * s + 1]);
      }
      if (V::kZeros && needs_sum) {
        const uint32_t ones[4] = {T::kOnes, T::kOnes, T::kOnes, T::kOnes};
#pragma unroll
        for (int n = 0; n < NB; ++n) mma<T>(sum_x[n], ones, x[n][2 * s], x[n][2 * s + 1]);
      }
    }
    if (++in_block != per_block && chunk + 1 != last) continue;
    in_block = 0;
    const uint2 scale = V::kScaled ? *reinterpret_cast<const uint2*>(stage + R::kScale + lane * 8) : uint2{};
    const uint32_t zero = V::kZeros && a.w.zeros ? *reinterpret_cast<const uint32_t*>(stage + R::kZero + lane * 4) >> (g % 2 * 16) : 0x8888;
#pragma unroll
    for (int rt = 0; rt < 2; ++rt)
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const uint32_t both = rt ? scale.y : scale.x;
        const float factor = V::kScaled ? f16_to_float(static_cast<uint16_t>(j ? both >> 16 : both)) : 1.f;
        const float offset = V::kOffset + static_cast<float>(static_cast<int>(zero >> (4 * (2 * rt + j)) & 15) - kInt4Zero);
#pragma unroll
        for (int n = 0; n < NB; ++n)
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            float& sum = d[rt][n][2 * j + e];
            y[rt][n][2 * j + e] += factor * (V::kZeros ? sum - offset * sum_x[n][e] : sum);
            sum = 0;
          }
      }
    if (V::kZeros)
#pragma unroll
      for (int n = 0; n < NB; ++n) sum_x[n][0] = sum_x[n][1] = sum_x[n][2] = sum_x[n][3] = 0;
  }

  // The warps' sums, 8 rows of x at a time, where the ring was.
  copy_wait<0>();
  float* const sums = reinterpret_cast<float*>(shared);
#pragma unroll
  for (int n = 0; n < NB; ++n) {
    __syncthreads();
#pragma unroll
    for (int rt = 0; rt < 2; ++rt)
#pragma unroll
      for (int i = 0; i < 4; ++i) sums[(warp * 8 + 2 * c + (i & 1)) * kSumStride + 16 * rt + 8 * (i >> 1) + g] = y[rt][n][i];
    __syncthreads();
    const int64_t out = tile * kTileRows + lane;
    for (int row = warp; row < 8; row += R::kWarps) {
      const int64_t m = m0 + 8 * n + row;
      float sum = 0;
#pragma unroll
      for (int w = 0; w < R::kWarps; ++w) sum += sums[(w * 8 + row) * kSumStride + lane];
      if (m >= a.m || out >= a.w.out_features) continue;
      if (a.bias) sum += load(a.bias, out, static_cast<Dtype>(a.bias_dtype));
      static_cast<uint16_t*>(a.y)[m * a.w.out_features + out] = T::from_float(sum);
    }
  }
}

// Dense weight: one warp per chunk; a lane writes 8 consecutive columns of its 4 rows.
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

template <class V>
__global__ void __launch_bounds__(kDecodeWarps * 32) decode_dense(const Decode a, const Geometry geo) {
  const int lane = threadIdx.x % 32, g = lane / 4, c = lane % 4;
  const int64_t chunk = static_cast<int64_t>(blockIdx.y) * kDecodeWarps + threadIdx.x / 32, tile = a.row_begin / kTileRows + blockIdx.x;
  if (chunk >= geo.columns / kChunkColumns) return;
  const int64_t per_block = geo.block_columns / kChunkColumns, block = chunk / per_block;
  const uint8_t* const data = a.w.packed + tile * geo.tile_bytes + block * geo.block_bytes;
  uint32_t words[4 * V::kWords];
#pragma unroll
  for (int v = 0; v < V::kWords; ++v) {
    const uint4 word = *reinterpret_cast<const uint4*>(data + (chunk % per_block * V::kWords + v) * 512 + lane * 16);
    words[4 * v] = word.x, words[4 * v + 1] = word.y, words[4 * v + 2] = word.z, words[4 * v + 3] = word.w;
  }
  const uint16_t* const scales = reinterpret_cast<const uint16_t*>(data + per_block * V::kWords * 512);
  const uint16_t zero = a.w.zeros ? reinterpret_cast<const uint16_t*>(a.w.zeros)[(tile * geo.blocks + block) * 8 + g] : 0x8888;
#pragma unroll
  for (int rt = 0; rt < 2; ++rt)
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const int64_t row = tile * kTileRows + 16 * rt + 8 * j + g;
      if (row < a.row_begin || row >= a.row_end) continue;
      const float factor = V::kScaled ? f16_to_float(scales[4 * g + 2 * rt + j]) : 1.f;
      const float offset = static_cast<float>(static_cast<int>(zero >> (4 * (2 * rt + j)) & 15) - kInt4Zero);
      float v[8];
#pragma unroll
      for (int i = 0; i < 8; ++i) v[i] = factor * (V::weight(words, rt, j, i >> 2, i >> 1 & 1, i & 1) - offset);
      store8(a, row, chunk * kChunkColumns + 8 * c, v);
    }
}

Geometry geometry_of(const PackedWeight& w) { return geometry(Pattern::dense, static_cast<Values>(w.values), w.in_features, w.out_features, w.group_size); }

template <class V, class T, int NB>
int launch_linear(const LinearArgs& a, void* stream) {
  const dim3 grid(static_cast<unsigned>(round_up(a.w.out_features, kTileRows) / kTileRows), static_cast<unsigned>(round_up(a.m, 8 * NB) / (8 * NB)));
  return launch(linear_dense<V, T, NB>, grid, Ring<V, NB>::kWarps * 32, Ring<V, NB>::kBytes, stream, a, geometry_of(a.w));
}

template <class T, template <class, int> class V>
int by_rows(const LinearArgs& a, void* stream) {
  return a.m <= 8 ? launch_linear<V<T, 1>, T, 1>(a, stream) : a.m <= 16 ? launch_linear<V<T, 2>, T, 2>(a, stream)
       : a.m <= 32 ? launch_linear<V<T, 4>, T, 4>(a, stream) : launch_linear<V<T, 8>, T, 8>(a, stream);
}

template <class T>
int by_values(const LinearArgs& a, void* stream) {
  switch (static_cast<Values>(a.w.values)) {
    case Values::bf16: return by_rows<T, Dense16>(a, stream);
    case Values::int8: return by_rows<T, Int8>(a, stream);
    case Values::int4: return by_rows<T, Int4>(a, stream);
  }
  return kInvalidValue;
}

}  // namespace
}  // namespace calora::cuda

extern "C" int calora_cuda_linear_dense(const calora::cuda::LinearArgs* args, void* stream) {
  using namespace calora::cuda;
  switch (static_cast<Dtype>(args->x_dtype)) {
    case Dtype::bf16: return by_values<Bf16>(*args, stream);
    case Dtype::f16: return by_values<F16>(*args, stream);
    default: return kInvalidValue;
  }
}

extern "C" int calora_cuda_decode_dense(const calora::cuda::PackedWeight* w, int64_t row_begin, int64_t row_end, void* out,
                                        int64_t out_dtype, void* stream) {
  using namespace calora;
  using namespace calora::cuda;
  const Geometry geo = geometry_of(*w);
  const int64_t chunks = geo.columns / kChunkColumns;
  const dim3 grid(static_cast<unsigned>(round_up(row_end, kTileRows) / kTileRows - row_begin / kTileRows),
                  static_cast<unsigned>(round_up(chunks, kDecodeWarps) / kDecodeWarps));
  const Decode args{*w, out, row_begin, row_end, static_cast<Dtype>(out_dtype)};
  switch (static_cast<Values>(w->values)) {
    case Values::bf16: return launch(decode_dense<Dense16<Bf16, 1>>, grid, kDecodeWarps * 32, 0, stream, args, geo);
    case Values::int8: return launch(decode_dense<Int8<Bf16, 1>>, grid, kDecodeWarps * 32, 0, stream, args, geo);
    case Values::int4: return launch(decode_dense<Int4<Bf16, 1>>, grid, kDecodeWarps * 32, 0, stream, args, geo);
  }
  return kInvalidValue;
}
