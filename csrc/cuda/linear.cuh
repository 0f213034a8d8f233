// The fused layer for few rows of x, in any sparsity pattern:
//
//   y = x W^T + bias + t U^T          t = phi(x D^T), from bank.cu
//
// One block owns a tile of 32 rows of W and streams it once; its warps split the columns. W is the m16 operand of the mma and
// the rows of x its n8 operand, so that up to 8 rows of x cost one mma. Lanes copy weights through a ring in shared memory,
// many columns ahead of the arithmetic; a warp has a ring of its own, so that inside the loop no warp waits for another. The
// warps' sums meet in shared memory at the end and are added in one fixed order.
//
// A pattern P says what lies in a stage of the ring and how it is multiplied:
//   Value, kZeros      the value type (values.cuh); whether there may be zero points
//   kOffset            what multiply() adds to every weight; kSums: sum(x) may be needed to take it off again
//   kTurns             chunks of 32 columns in a unit, which fills a stage; the last unit of a block has those that are left
//   kUnitBytes, kRoom  bytes of a whole unit inside `packed`, and what it needs of a stage
//   kLaneBytes         copy() is given where this lane's bytes begin, so many behind those of the lane before
//   kBlocks            blocks of the most warps that a multiprocessor is to hold
//   kMost              mma columns / 8 that it is compiled for at most
//   kWhole             whether it is compiled once more for weights of whole units, see linear()
//   Half               the same pattern in units of half the size, for weights of such blocks; void where there is none
//   kDirect            lanes multiply with 8 neighbouring columns of x as they are in memory: they load them to registers, a unit
//                      ahead, instead of copying them to the ring
//   P(args, geo, tile, lane, first, last)     for the units first..last of a tile
//   copy(stage, from, turns, lane)            starts the copies of the next unit, whose bytes begin at `from`
//   multiply(stage, x, turns, lane, needs_sum, sum_x, d)
//                      d += the unit's weights times x, sum_x += sum(x); turn t of rows 8 n.. of x is the piece 512 (t NB + n) bytes on.
//                      kDirect: x is x[t][n]
#pragma once
#include <type_traits>

#include "bank.cuh"
#include "values.cuh"

namespace calora::cuda {
namespace {

// Where lane (g, c) keeps columns 8 c .. 8 c + 7 of row g of x, of a 512-byte piece. Turned so that neither reading them all
// as they were written nor reading one c of all rows (load_matrices) meets a bank twice.
__device__ __forceinline__ int x_slot(int g, int c) { return g * 64 + (c ^ (g >> 1 & 3)) * 16; }

constexpr int kSumStride = 36;  // floats from one row of x to the next where the warps' sums meet; 36: no bank conflicts

// A stage: the unit | x | scales of the 32 rows | zero points.
template <class P, int NB>
struct Ring {
  static constexpr int kX = round_up(P::kRoom, 128), kScale = kX + (P::kDirect ? 0 : 512 * NB * P::kTurns), kZero = kScale + 8 * P::Value::kScaleWord;
  // Whole lines of 128 bytes: where stages began anywhere, copying took 1.6 times as long.
  static constexpr int kStage = round_up(kZero + (P::kZeros ? kZeroBytes : 0), 128);
  static constexpr int kBudget = 88 * 1024;  // with kUpRoom what a block may have on every architecture since sm_80
  static constexpr int kAtMost = kBudget + 2 * 1024;  // where 8 warps would not fit otherwise
  // Large stages: fewer warps, because three stages are what keeps copies under way.
  static constexpr int kWarps = 3 * 8 * kStage <= kAtMost ? 8 : 3 * 4 * kStage <= kBudget ? 4 : 2;
  static constexpr int kFit = kBudget / (kWarps * kStage), kStages = kFit < 3 ? 3 : kFit < 8 ? kFit : 8;
  static constexpr int kBytes = kStages * kStage, kAll = kWarps * kBytes;  // of a warp, of all of them
  static_assert(kAll <= kAtMost && kStage % 16 == 0, "too few units in flight");
  static constexpr int kSums = 8 * kSumStride * 4;  // of a warp, where the rings were
  static_assert(2 * kSums <= kBytes);               // and for the bank of each row once more
};

// Bytes behind the rings for U of the tile: (rank, 32) as it is in memory.
constexpr int kUpRoom = 9 * 1024;
inline int64_t up_bytes(const LowRank& bank) {
  const bool tiled = bank.up_row == 1 && bank.dtype != static_cast<int64_t>(Dtype::f32) && !bank.row_adapter;
  const int64_t bytes = tiled ? bank.rank * 2 * kTileRows : 0;
  return bytes <= kUpRoom && reinterpret_cast<uintptr_t>(bank.up) % 16 == 0 ? bytes : 0;
}

// Blocks of few rows of x that a multiprocessor is to hold: two where it has the shared memory. Asking for two where one fits
// (100 KB: sm_86, sm_89, sm_120) would only halve the registers; on sm_120 28 kernels spilled.
#if defined(__CUDA_ARCH__) && (__CUDA_ARCH__ == 860 || __CUDA_ARCH__ == 890 || __CUDA_ARCH__ >= 1200)
constexpr int kTwo = 1;
#else
constexpr int kTwo = 2;
#endif

// One block: a tile. up_shared: U is to be copied behind the rings. Whole: every unit is a whole block and there are
// no zero points, which most weights have been packed to: a third of the instructions around the arithmetic go.
template <class P, class T, int NB, bool Whole>
__global__ void __launch_bounds__(Ring<P, NB>::kWarps * 32, P::kBlocks) linear(const LinearArgs a, const Geometry geo, const bool up_shared) {
  using R = Ring<P, NB>;
  using V = typename P::Value;
  CALORA_SHARED(shared);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, c = lane % 4;
  // Blocks that share a tile are neighbours: its bytes come from memory once.
  const int tile = static_cast<int>(blockIdx.y), m0 = static_cast<int>(blockIdx.x) * (8 * NB);
  const int chunks = static_cast<int>(geo.block_columns / kChunkColumns), per_block = Whole ? 1 : (chunks + P::kTurns - 1) / P::kTurns;
  // Of the last unit of a block:
  const int odd_turns = Whole ? P::kTurns : chunks - (per_block - 1) * P::kTurns;
  const int odd_bytes = Whole ? P::kUnitBytes + (V::kScaleWord == 8 ? kScaleBytes : 0) : static_cast<int>(geo.block_bytes) - (per_block - 1) * P::kUnitBytes;
  // This warp's share: any range, whole blocks or not, because a block's scale may be applied to parts of its sum.
  const int units = static_cast<int>(geo.blocks) * per_block, first = units * warp / R::kWarps, last = units * (warp + 1) / R::kWarps;
  const int block = Whole ? first : first / per_block, in_block = first - block * per_block;
  const bool zeros = P::kZeros && !Whole && a.w.zeros;

  // The ring: `left` units are still to be copied, of the next one `to` is the stage, `from` the bytes, `rest` the units of its block from it on.
  const Shared ring = keep(shared_at(shared + warp * R::kBytes));
  int left = last - first, to = 0, rest = per_block - in_block;
  const int64_t block_of_all = static_cast<int64_t>(tile) * geo.blocks + block;
  const uint8_t* from = a.w.packed + block_of_all * geo.block_bytes + in_block * P::kUnitBytes + P::kLaneBytes * lane;
  // What the first lanes copy, 16 bytes each, with the unit that ends a block: its scales, from its end or apart, and zero points.
  const int scales_at = odd_bytes - static_cast<int>(kScaleBytes) + (16 - P::kLaneBytes) * lane;
  const uint8_t* scales = V::kOuter ? a.w.scales + block_of_all * kTileRows + 16 * lane : nullptr;
  int64_t zeros_at = block_of_all * kZeroBytes;
  // This lane's rows of x; where there is none, the last row again, whose products are not used.
  const uint8_t* x_from[NB];
#pragma unroll
  for (int n = 0; n < NB; ++n) {
    const int row = m0 + 8 * n + g, column = block * static_cast<int>(geo.block_columns) + in_block * P::kTurns * static_cast<int>(kChunkColumns) + 8 * c;
    x_from[n] = static_cast<const uint8_t*>(a.x) + 2 * ((row < a.m ? row : a.m - 1) * a.x_stride + column);
  }
  const int rows = static_cast<int>(a.m) - m0;
  P pattern(a, geo, tile, lane, first, last);
  const auto fetch = [&] {
    if (left > 0) {
      --left;
      const bool ends = Whole || --rest == 0;
      const Shared stage = ring + to;
      const int turns = ends ? odd_turns : P::kTurns;
      pattern.copy(stage, from, turns, lane);
      if constexpr (!P::kDirect) {
#pragma unroll
        for (int t = 0; t < P::kTurns; ++t) {
          if (t >= turns) break;
#pragma unroll
          for (int n = 0; n < NB; ++n) {
            const Shared to_x = stage + (R::kX + (t * NB + n) * 512 + x_slot(g, c));
            const uint8_t* const x = x_from[n] + t * 2 * static_cast<int>(kChunkColumns);
            if (rows >= 8 * NB) copy16(to_x, x);
            else copy16_if(8 * n + g < rows, to_x, x);  // zeros where there is no row: reading one row eight times takes longer
          }
        }
#pragma unroll
        for (int n = 0; n < NB; ++n) x_from[n] += turns * 2 * static_cast<int>(kChunkColumns);
      }
      if (V::kScaleWord && (ends || left == 0)) {
        if (lane < V::kScaleWord / 2) copy16(stage + (R::kScale + lane * 16), V::kOuter ? scales : from + (scales_at + (Whole ? 0 : rest * P::kUnitBytes)));
        if (zeros && lane == 0) copy16(stage + R::kZero, a.w.zeros + zeros_at);
      }
      from += ends ? odd_bytes : P::kUnitBytes;
      if (ends) {
        if (!Whole) rest = per_block;
        if (V::kOuter) scales += kTileRows;
        if (P::kZeros) zeros_at += kZeroBytes;
      }
      to = to + R::kStage == R::kStages * R::kStage ? 0 : to + R::kStage;
    }
    copy_commit();  // an empty group too: the number of groups tells what has arrived
  };

  // Behind a bank weights and x are there: bank_down has waited for them. What it writes itself is waited for in the end.
  if (!a.bank.rank) {
    wait_for_previous();
    release_next();
  }
#pragma unroll 1
  for (int i = 0; i < R::kStages - 2; ++i) fetch();
  if (up_shared) {
    const uint8_t* const up = static_cast<const uint8_t*>(a.bank.up) + tile * a.bank.up_tile * 2;
    for (int at = 16 * static_cast<int>(threadIdx.x); at < a.bank.up_tile * 2; at += 16 * 32 * R::kWarps) copy16(shared_at(shared + R::kAll) + at, up + at);
  } else if (a.bank.row_adapter) {
    prefetch_up(a.bank, tile, m0, 8 * NB, a.m);
  }
  fetch();

  // x of two units in turn: of the one that is multiplied, and of the next.
  using X = uint32_t[P::kDirect ? P::kTurns : 1][NB][4];
  X x_now, x_next;
  const auto load_x = [&](X& x, int turns) {
#pragma unroll
    for (int n = 0; n < NB; ++n) {
      const auto load_turn = [&](int t, int from) {
        const uint4 word = load_cached(x_from[n] + 2 * static_cast<int>(kChunkColumns) * from);
        x[t][n][0] = word.x, x[t][n][1] = word.y, x[t][n][2] = word.z, x[t][n][3] = word.w;
      };
      if (turns == P::kTurns) {
#pragma unroll
        for (int t = 0; t < P::kTurns; ++t) load_turn(t, t);
      } else {  // beyond the unit, where there may be no more columns, its last ones again
#pragma unroll
        for (int t = 0; t < P::kTurns; ++t) load_turn(t, t < turns ? t : turns - 1);
      }
    }
  };
  int in_rest = per_block - in_block;
  if constexpr (P::kDirect)
    if (first < last) load_x(x_now, in_rest == 1 ? odd_turns : P::kTurns);

  float y[2][NB][4] = {};                     // [rt][n][2 j + e]: row 16 rt + 8 j + g of the tile, row m0 + 8 n + 2 c + e of x
  float d[2][NB][4] = {}, sum_x[NB][4] = {};  // of the current block, not yet scaled
  const float outer = V::kUnit * (V::kOuter && first < last ? outer_scale<V>(a.w, geo, tile) : 1.f);
  const bool needs_sum = P::kOffset != 0 || zeros;
  int at = 0, todo = last - first;
  const auto step = [&](X& x, X& following) {
    --todo;
    copy_wait<R::kStages - 2>();
    __syncwarp();
    fetch();  // into the stage that was read one turn ago
    const Shared stage = ring + at;
    at = at + R::kStage == R::kStages * R::kStage ? 0 : at + R::kStage;
    const bool ends = Whole || --in_rest == 0;
    if (ends) in_rest = per_block;
    const int turns = ends ? odd_turns : P::kTurns;
    if constexpr (P::kDirect) {
      if (todo > 0) {
#pragma unroll
        for (int n = 0; n < NB; ++n) x_from[n] += 2 * static_cast<int>(kChunkColumns) * turns;
        load_x(following, in_rest == 1 ? odd_turns : P::kTurns);
      }
      pattern.multiply(stage, x, turns, lane, P::kSums && needs_sum, sum_x, d);
    } else {
      pattern.multiply(stage, stage + R::kX, turns, lane, P::kSums && needs_sum, sum_x, d);
    }
    if (!ends && todo > 0) return;
    const Shared own = stage + (R::kScale + g * V::kScaleWord);
    const uint2 scale = V::kScaleWord == 8 ? load_shared<uint2>(own) : uint2{V::kScaleWord ? load_shared<uint32_t>(own) : 0, 0};
    float offset[2][2] = {{P::kOffset, P::kOffset}, {P::kOffset, P::kOffset}};
    if (zeros) {
      const uint32_t zero = load_shared<uint32_t>(stage + (R::kZero + g / 2 * 4)) >> (g % 2 * 16);
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
  };
  if constexpr (P::kDirect) {
    while (todo > 0) {
      step(x_now, x_next);
      if (todo > 0) step(x_next, x_now);
    }
  } else {
    while (todo > 0) step(x_now, x_next);
  }
  copy_wait<0>();
  if (a.bank.rank) {
    wait_for_previous();  // for t
    release_next();
    if (up_shared) __syncthreads();
    if (!a.bank.row_adapter) add_low_rank<NB>(y, a.bank, a.w.out_features, tile, up_shared, shared_at(shared + R::kAll), m0, a.m, warp, R::kWarps, lane);
  }

  // The warps' sums, 8 rows of x at a time, where the rings were; as those of one warp more what a bank of each row adds.
  float* const sums = reinterpret_cast<float*>(shared);
#pragma unroll
  for (int n = 0; n < NB; ++n) {
    __syncthreads();
#pragma unroll
    for (int rt = 0; rt < 2; ++rt)
#pragma unroll
      for (int i = 0; i < 4; ++i) sums[(warp * 8 + 2 * c + (i & 1)) * kSumStride + 16 * rt + 8 * (i >> 1) + g] = y[rt][n][i];
    if (a.bank.row_adapter)
      for (int row = warp; row < 8; row += R::kWarps)
        if (m0 + 8 * n + row < a.m) low_rank_of_row(sums + (8 * R::kWarps + row) * kSumStride, a.bank, a.w.out_features, tile, lane, m0 + 8 * n + row, a.m);
    __syncthreads();
    const int64_t out = static_cast<int64_t>(tile) * kTileRows + lane;
    for (int row = warp; row < 8; row += R::kWarps) {
      const int64_t m = m0 + 8 * n + row;
      float sum = 0;
      for (int w = 0; w < R::kWarps + (a.bank.row_adapter ? 1 : 0); ++w) sum += sums[(w * 8 + row) * kSumStride + lane];
      if (m >= a.m || out >= a.w.out_features) continue;
      if (a.bias) sum += load(a.bias, out, static_cast<Dtype>(a.bias_dtype));
      static_cast<uint16_t*>(a.y)[m * a.w.out_features + out] = T::from_float(sum);
    }
  }
}

// The four registers that lane (g, c) multiplies with: columns 8 c .. 8 c + 7 of row g of x.
__device__ __forceinline__ void load_x(Shared piece, int lane, uint32_t (&x)[4]) {
  const uint4 word = load_shared<uint4>(piece + x_slot(lane / 4, lane % 4));
  x[0] = word.x, x[1] = word.y, x[2] = word.z, x[3] = word.w;
}

template <class P, class T, int NB, bool Whole>
int start(const LinearArgs& a, const Geometry& geo, void* stream) {
  using R = Ring<P, NB>;
  const int64_t row_blocks = round_up(a.m, 8 * NB) / (8 * NB), up = up_bytes(a.bank);
  const dim3 grid(static_cast<unsigned>(row_blocks), static_cast<unsigned>(geo.tiles));
  return launch(linear<P, T, NB, Whole>, grid, 32 * R::kWarps, static_cast<int>(R::kAll + up), stream, a, geo, up != 0);
}

template <class P, class T, int NB>
int launch_linear(const LinearArgs& a, void* stream) {
  static_assert(NB <= P::kMost);
  const Geometry geo = geometry_of(a.w);
  const int64_t turns = a.w.zeros ? 0 : geo.block_columns / kChunkColumns;
  if constexpr (P::kWhole)
    if (turns == P::kTurns) return start<P, T, NB, true>(a, geo, stream);
  if constexpr (!std::is_void_v<typename P::Half>)
    if (turns == P::Half::kTurns) return start<typename P::Half, T, NB, true>(a, geo, stream);
  return start<P, T, NB, false>(a, geo, stream);
}

// P: a pattern of (type of x, value type, mma columns / 8).
template <template <class, template <class, int> class, int> class P, class T, template <class, int> class V>
int by_rows(const LinearArgs& a, void* stream) {
  if (a.m <= 8) return launch_linear<P<T, V, 1>, T, 1>(a, stream);
  if (a.m <= 16) return launch_linear<P<T, V, 2>, T, 2>(a, stream);
  if (a.m <= 32 || P<T, V, 1>::kMost == 4) return launch_linear<P<T, V, 4>, T, 4>(a, stream);
  return launch_linear<P<T, V, P<T, V, 1>::kMost>, T, P<T, V, 1>::kMost>(a, stream);
}

template <template <class, template <class, int> class, int> class P, class T>
int by_values(const LinearArgs& a, void* stream) {
  switch (static_cast<Values>(a.w.values)) {
    case Values::bf16: return by_rows<P, T, Dense16>(a, stream);
    case Values::int8: return by_rows<P, T, Int8>(a, stream);
    case Values::int4: return by_rows<P, T, Int4>(a, stream);
    case Values::nf4: return by_rows<P, T, Nf4>(a, stream);
  }
  return kInvalidValue;
}

template <template <class, template <class, int> class, int> class P>
int by_dtype(const LinearArgs& a, void* stream) {
  switch (static_cast<Dtype>(a.x_dtype)) {
    case Dtype::bf16: return by_values<P, Bf16>(a, stream);
    case Dtype::f16: return by_values<P, F16>(a, stream);
    default: return kInvalidValue;
  }
}

}  // namespace
}  // namespace calora::cuda
