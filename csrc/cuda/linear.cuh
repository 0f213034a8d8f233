// The fused layer for few rows of x, in any sparsity pattern:
//
//   y = x W^T + bias + t U^T          t = phi(x D^T), from bank.cu
//
// One block owns a tile of 32 rows of W and streams it once; its warps split the columns. W is the m16 operand of the mma and
// the rows of x its n8 operand, so that up to 8 rows of x cost one mma. Lanes copy operands through a ring in shared memory,
// many columns ahead of the arithmetic; a warp has a ring of its own, so that inside the loop no warp waits for another. The
// warps' sums meet in shared memory at the end and are added in one fixed order.
//
// A pattern P says what lies in a stage of the ring and how it is multiplied:
//   Value, kZeros      the value type (values.cuh); whether there may be zero points
//   kOffset            what multiply() adds to every weight; kSums: sum(x) may be needed to take it off again
//   kTurns             chunks of 32 columns in a unit, which fills a stage; where a block's chunks are odd, its last unit is one chunk
//   kUnitBytes, kRoom  bytes of a whole unit inside `packed`, and what it needs of a stage
//   kShared            lanes read what other lanes copied
//   P(args, geo, tile, lane, first, last)     for the units first..last of a tile
//   copy(stage, from, turns, lane)            starts the copies of the next unit, whose bytes begin at `from`
//   multiply(stage, x, turns, lane, needs_sum, sum_x, d)
//                      d += the unit's weights times x, sum_x += sum(x); turn t of rows 8 n.. of x is the piece 512 (t NB + n) bytes on
#pragma once
#include "bank.cuh"
#include "values.cuh"

namespace calora::cuda {
namespace {

// Where lane (g, c) keeps columns 8 c .. 8 c + 7 of row g of x, of a 512-byte piece. Turned so that neither reading them all
// as they were written nor reading one c of all rows (load_matrices) meets a bank twice.
__device__ __forceinline__ int x_slot(int g, int c) { return g * 64 + (c ^ (g >> 1 & 3)) * 16; }

// All of 32 lanes of a stage: the unit | x | scales (8 or 4 bytes a lane) | zero points (4 bytes a lane).
template <class P, int NB>
struct Ring {
  static constexpr int kX = P::kRoom, kScale = kX + 512 * NB * P::kTurns, kZero = kScale + 32 * P::Value::kScaleWord;
  static constexpr int kStage = kZero + (P::kZeros ? 128 : 0);
  static constexpr int kBudget = 96 * 1024;  // what a block may have on every architecture since sm_80
  // Large stages: fewer warps, because three stages are what keeps copies under way.
  static constexpr int kWarps = NB < 8 && 3 * 8 * kStage <= kBudget ? 8 : 3 * 4 * kStage <= kBudget ? 4 : 2;
  static constexpr int kFit = kBudget / (kWarps * kStage), kStages = kFit < 8 ? kFit : 8;
  static constexpr int kBytes = kWarps * kStages * kStage;
  static_assert(kStages >= 3 && kStage % 16 == 0, "too few units in flight");
};

constexpr int kSumStride = 36;  // floats from one row of x to the next where the warps' sums meet; 36: no bank conflicts

// Blocks of few rows of x that a multiprocessor holds at once: two rings where it has the shared memory. Asking for two where one fits
// (100 KB: sm_86, sm_89, sm_120) would only halve the registers; on sm_120 28 kernels spilled.
#if defined(__CUDA_ARCH__) && (__CUDA_ARCH__ == 860 || __CUDA_ARCH__ == 890 || __CUDA_ARCH__ >= 1200)
constexpr int kBlocks = 1;
#else
constexpr int kBlocks = 2;
#endif

template <class P, class T, int NB>
__global__ void __launch_bounds__(Ring<P, NB>::kWarps * 32, NB <= 2 ? kBlocks : 1) linear(const LinearArgs a, const Geometry geo) {
  using R = Ring<P, NB>;
  using V = typename P::Value;
  CALORA_SHARED(shared);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, c = lane % 4;
  // Blocks that share a tile are neighbours: its bytes come from memory once.
  const int64_t row_blocks = (a.m + 8 * NB - 1) / (8 * NB), tile = blockIdx.x / row_blocks, m0 = blockIdx.x % row_blocks * (8 * NB);
  const int chunks = static_cast<int>(geo.block_columns / kChunkColumns), per_block = (chunks + P::kTurns - 1) / P::kTurns;
  const bool odd = P::kTurns == 2 && chunks % 2;
  // This warp's share: any range, whole blocks or not, because a block's scale may be applied to parts of its sum.
  const int units = static_cast<int>(geo.blocks) * per_block;
  const int first = units * warp / R::kWarps, last = units * (warp + 1) / R::kWarps;

  // The ring: `next` is the unit that is copied next, `to` its stage, `from` its bytes, `rest` the units of its block from it on.
  uint8_t* const ring = shared + warp * (R::kStages * R::kStage);
  int next = first, to = 0, block = first / per_block, rest = per_block - first % per_block;
  int column = static_cast<int>(block * geo.block_columns) + (per_block - rest) * P::kTurns * static_cast<int>(kChunkColumns) + 8 * c;
  const int rows = static_cast<int>(a.m - m0) - g, x_step = static_cast<int>(16 * a.x_stride);  // rows of x from this lane's on; 8 rows, in bytes
  const uint8_t* x_from = static_cast<const uint8_t*>(a.x) + 2 * ((m0 + g) * a.x_stride + column);
  const uint8_t* from = a.w.packed + tile * geo.tile_bytes + block * geo.block_bytes;
  const uint8_t *end = from + geo.block_bytes, *scales = scales_of<V>(a.w, geo, tile, block);
  from += (per_block - rest) * P::kUnitBytes;
  P pattern(a, geo, tile, lane, first, last);
  const auto fetch = [&] {
    if (next < last) {
      uint8_t* const stage = ring + to;
      const int turns = odd && rest == 1 ? 1 : P::kTurns;
      pattern.copy(stage, from, turns, lane);
#pragma unroll
      for (int t = 0; t < P::kTurns; ++t) {
        if (t >= turns) break;
        const bool inside = column < a.w.in_features;  // x_stride is a multiple of 8: all 8 columns are
#pragma unroll
        for (int n = 0; n < NB; ++n) copy16_if(inside && 8 * n < rows, stage + R::kX + (t * NB + n) * 512 + x_slot(g, c), x_from + n * x_step);
        x_from += 2 * kChunkColumns;
        column += kChunkColumns;
      }
      if (V::kScaleWord && (rest == 1 || next + 1 == last)) {
        copy_small<V::kScaleWord ? V::kScaleWord : 4>(stage + R::kScale + lane * V::kScaleWord, scales + g * V::kScaleWord);
        if (P::kZeros && a.w.zeros) copy_small<4>(stage + R::kZero + lane * 4, a.w.zeros + (tile * geo.blocks + block) * kZeroBytes + g / 2 * 4);
      }
      from += P::kUnitBytes;
      if (--rest == 0) rest = per_block, ++block, from = end, end += geo.block_bytes, scales += V::kOuter ? kTileRows : geo.block_bytes;
      ++next;
      to = to + R::kStage == R::kStages * R::kStage ? 0 : to + R::kStage;
    }
    copy_commit();  // an empty group too: the number of groups tells what has arrived
  };

#pragma unroll
  for (int i = 0; i < R::kStages - 1; ++i) fetch();

  float y[2][NB][4] = {};  // [rt][n][2 j + e]: row 16 rt + 8 j + g of the tile, row m0 + 8 n + 2 c + e of x
  wait_for_previous();  // for t; weights and x were complete before bank_down released this kernel
  add_low_rank<NB>(y, a.bank, a.w.out_features, tile, m0, a.m, warp, R::kWarps, g, c);

  float d[2][NB][4] = {}, sum_x[NB][4] = {};  // of the current block, not yet scaled
  const float outer = outer_scale<V>(a.w, geo, tile) * V::kUnit;
  const bool needs_sum = P::kOffset != 0 || (P::kZeros && a.w.zeros);
  int in_block = first % per_block, at = 0;
  for (int unit = first; unit < last; ++unit) {
    copy_wait<R::kStages - 2>();
    if (P::kShared) __syncwarp();
    fetch();  // into the stage that was read one turn ago
    const uint8_t* const stage = ring + at;
    at = at + R::kStage == R::kStages * R::kStage ? 0 : at + R::kStage;
    const int turns = odd && in_block == per_block - 1 ? 1 : P::kTurns;
    pattern.multiply(stage, stage + R::kX, turns, lane, P::kSums && needs_sum, sum_x, d);
    if (++in_block != per_block && unit + 1 != last) continue;
    in_block = 0;
    const uint2 scale = load_scales<V>(stage + R::kScale + lane * V::kScaleWord);
    float offset[2][2] = {{P::kOffset, P::kOffset}, {P::kOffset, P::kOffset}};
    if (P::kZeros && a.w.zeros) {
      const uint32_t zero = *reinterpret_cast<const uint32_t*>(stage + R::kZero + lane * 4) >> (g % 2 * 16);
#pragma unroll
      for (int i = 0; i < 4; ++i) offset[i / 2][i % 2] += static_cast<float>(static_cast<int>(zero >> (4 * i) & 15) - kInt4Zero);
    }
#pragma unroll
    for (int rt = 0; rt < 2; ++rt)
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const float factor = V::scale(scale, 2 * rt + j) * outer;
#pragma unroll
        for (int n = 0; n < NB; ++n)
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            float& sum = d[rt][n][2 * j + e];
            y[rt][n][2 * j + e] += factor * (P::kSums ? sum - offset[rt][j] * sum_x[n][e] : sum);
            sum = 0;
          }
      }
    if (P::kSums)
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

// The four registers that lane (g, c) multiplies with: columns 8 c .. 8 c + 7 of row g of x.
__device__ __forceinline__ void load_x(const uint8_t* piece, int lane, uint32_t (&x)[4]) {
  const uint4 word = *reinterpret_cast<const uint4*>(piece + x_slot(lane / 4, lane % 4));
  x[0] = word.x, x[1] = word.y, x[2] = word.z, x[3] = word.w;
}

template <class P, class T, int NB>
int launch_linear(const LinearArgs& a, void* stream) {
  const int64_t row_blocks = round_up(a.m, 8 * NB) / (8 * NB), tiles = round_up(a.w.out_features, kTileRows) / kTileRows;
  return launch(linear<P, T, NB>, a.bank.rank != 0, dim3(static_cast<unsigned>(tiles * row_blocks)), Ring<P, NB>::kWarps * 32, Ring<P, NB>::kBytes, stream, a,
                geometry_of(a.w));
}

// P: a pattern of (type of x, value type, mma columns / 8), the last at most `Most`.
template <template <class, template <class, int> class, int> class P, int Most, class T, template <class, int> class V>
int by_rows(const LinearArgs& a, void* stream) {
  if (a.m <= 8) return launch_linear<P<T, V, 1>, T, 1>(a, stream);
  if (a.m <= 16) return launch_linear<P<T, V, 2>, T, 2>(a, stream);
  if (a.m <= 32 || Most == 4) return launch_linear<P<T, V, 4>, T, 4>(a, stream);
  return launch_linear<P<T, V, Most>, T, Most>(a, stream);
}

template <template <class, template <class, int> class, int> class P, int Most, class T>
int by_values(const LinearArgs& a, void* stream) {
  switch (static_cast<Values>(a.w.values)) {
    case Values::bf16: return by_rows<P, Most, T, Dense16>(a, stream);
    case Values::int8: return by_rows<P, Most, T, Int8>(a, stream);
    case Values::int4: return by_rows<P, Most, T, Int4>(a, stream);
    case Values::nf4: return by_rows<P, Most, T, Nf4>(a, stream);
  }
  return kInvalidValue;
}

template <template <class, template <class, int> class, int> class P, int Most>
int by_dtype(const LinearArgs& a, void* stream) {
  switch (static_cast<Dtype>(a.x_dtype)) {
    case Dtype::bf16: return by_values<P, Most, Bf16>(a, stream);
    case Dtype::f16: return by_values<P, Most, F16>(a, stream);
    default: return kInvalidValue;
  }
}

}  // namespace
}  // namespace calora::cuda
