// The dense pattern (no sparsity): a unit is one chunk, each lane copies its own operands and reads nothing else.
#include "decode.cuh"
#include "linear.cuh"

namespace calora::cuda {
namespace {

// Measured on an H200: int8 and more rows of x are faster with x in the ring, but nf4, whose table takes the time, only from 17 rows on.
template <class Value, int NB>
constexpr bool kDenseDirect = Value::kOuter ? NB <= 2 : NB == 1 && Value::kBits != 8;
// A group of 128 columns of int4, the usual 64 of nf4.
template <class Value, int NB>
constexpr int kDenseTurns = !kDenseDirect<Value, NB> || Value::kBits == 16 ? 1 : Value::kOuter ? 2 : 4;

template <class T, template <class, int> class V, int NB, int Turns>
struct DenseUnits {
  using Value = V<T, NB>;
  using Half = std::conditional_t<Turns == 4, DenseUnits<T, V, NB, 2>, void>;
  static constexpr bool kDirect = kDenseDirect<Value, NB>;
  static constexpr int kTurns = Turns;
  static constexpr int kChunk = 512 * Value::kWords, kUnitBytes = kChunk * kTurns, kRoom = kUnitBytes, kLaneBytes = 16;
  static constexpr int kBlocks = NB == 1 || (NB == 2 && !kDirect) ? kTwo : 1, kMost = 8;
  static constexpr bool kZeros = Value::kZeros, kSums = kZeros, kWhole = kDirect && Value::kBits == 4;
  static constexpr float kOffset = Value::kOffset;

  __device__ DenseUnits(const LinearArgs&, const Geometry&, int64_t, int, int, int) {}

  __device__ __forceinline__ void copy(Shared stage, const uint8_t* from, int turns, int lane) {
    stage = stage + lane * 16;
    if (turns == kTurns) {
#pragma unroll
      for (int v = 0; v < Value::kWords * kTurns; ++v) copy16(stage + v * 512, from + v * 512);
    } else {
#pragma unroll 1
      for (int v = 0; v < turns * Value::kWords; ++v) copy16(stage + v * 512, from + v * 512);
    }
  }

  // chunk: this lane's word of it.
  static __device__ __forceinline__ void turn(Shared chunk, const uint32_t (&x)[NB][4], bool needs_sum, float (&sum_x)[NB][4], float (&d)[2][NB][4]) {
    uint32_t words[4 * Value::kWords];
#pragma unroll
    for (int v = 0; v < Value::kWords; ++v) {
      const uint4 word = load_shared<uint4>(chunk + v * 512);
      words[4 * v] = word.x, words[4 * v + 1] = word.y, words[4 * v + 2] = word.z, words[4 * v + 3] = word.w;
    }
#pragma unroll
    for (int s = 0; s < 2; ++s) {
#pragma unroll
      for (int rt = 0; rt < 2; ++rt) {
        uint32_t fragment[4];
        Value::fragment(words, rt, s, fragment);
#pragma unroll
        for (int n = 0; n < NB; ++n) mma<T>(d[rt][n], fragment, x[n][2 * s], x[n][2 * s + 1]);
      }
      if (kSums && needs_sum) {
        const uint32_t ones[4] = {T::kOnes, T::kOnes, T::kOnes, T::kOnes};
#pragma unroll
        for (int n = 0; n < NB; ++n) mma<T>(sum_x[n], ones, x[n][2 * s], x[n][2 * s + 1]);
      }
    }
  }

  __device__ __forceinline__ void multiply(Shared stage, const uint32_t (&x)[kTurns][NB][4], int turns, int lane, bool needs_sum, float (&sum_x)[NB][4],
                                           float (&d)[2][NB][4]) {
    stage = stage + lane * 16;
    if (turns == kTurns) {  // without a branch between the turns, so that they overlap
#pragma unroll
      for (int t = 0; t < kTurns; ++t) turn(stage + t * kChunk, x[t], needs_sum, sum_x, d);
      return;
    }
#pragma unroll
    for (int t = 0; t < kTurns - 1; ++t)
      if (t < turns) turn(stage + t * kChunk, x[t], needs_sum, sum_x, d);
  }
  __device__ __forceinline__ void multiply(Shared stage, Shared rows, int, int lane, bool needs_sum, float (&sum_x)[NB][4], float (&d)[2][NB][4]) {
    uint32_t x[NB][4];
#pragma unroll
    for (int n = 0; n < NB; ++n) load_x(rows + n * 512, lane, x[n]);
    turn(stage + lane * 16, x, needs_sum, sum_x, d);
  }
};

template <class T, template <class, int> class V, int NB>
struct Dense : DenseUnits<T, V, NB, kDenseTurns<V<T, NB>, NB>> {
  using DenseUnits<T, V, NB, kDenseTurns<V<T, NB>, NB>>::DenseUnits;
};

struct DenseWords {
  template <class V>
  static __device__ __forceinline__ void words(const PackedWeight& w, const Geometry& geo, int64_t tile, int64_t chunk, int lane, uint32_t (&words)[4 * V::kWords]) {
    const int64_t per_block = geo.block_columns / kChunkColumns;
    const uint8_t* const data = w.packed + tile * geo.tile_bytes + chunk / per_block * geo.block_bytes;
#pragma unroll
    for (int v = 0; v < V::kWords; ++v) {
      const uint4 word = *reinterpret_cast<const uint4*>(data + (chunk % per_block * V::kWords + v) * 512 + lane * 16);
      words[4 * v] = word.x, words[4 * v + 1] = word.y, words[4 * v + 2] = word.z, words[4 * v + 3] = word.w;
    }
  }
};

}  // namespace
}  // namespace calora::cuda

extern "C" int calora_cuda_linear_dense(const calora::cuda::LinearArgs* args, void* stream) {
  return calora::cuda::by_dtype<calora::cuda::Dense>(*args, stream);
}

extern "C" int calora_cuda_decode_dense(const calora::cuda::PackedWeight* w, int64_t row_begin, int64_t row_end, void* out,
                                        int64_t out_dtype, void* stream) {
  return calora::cuda::launch_decode<calora::cuda::DenseWords>(*w, row_begin, row_end, out, out_dtype, stream);
}
