// The dense pattern (no sparsity): a unit is one chunk, each lane copies its own operands and reads nothing else.
#include "decode.cuh"
#include "linear.cuh"

namespace calora::cuda {
namespace {

template <class T, template <class, int> class V, int NB>
struct Dense {
  using Value = V<T, NB>;
  static constexpr int kTurns = 1, kUnitBytes = 512 * Value::kWords, kRoom = kUnitBytes;
  static constexpr bool kZeros = Value::kZeros, kSums = kZeros, kShared = false;
  static constexpr float kOffset = Value::kOffset;

  __device__ Dense(const LinearArgs&, const Geometry&, int64_t, int, int, int) {}

  __device__ __forceinline__ void copy(uint8_t* stage, const uint8_t* from, int, int lane) {
#pragma unroll
    for (int v = 0; v < Value::kWords; ++v) copy16(stage + v * 512 + lane * 16, from + v * 512 + lane * 16);
  }

  __device__ __forceinline__ void multiply(const uint8_t* stage, const uint8_t* rows, int, int lane, bool needs_sum, float (&sum_x)[NB][4],
                                           float (&d)[2][NB][4]) {
    uint32_t words[4 * Value::kWords], x[NB][4];
#pragma unroll
    for (int v = 0; v < Value::kWords; ++v) {
      const uint4 word = *reinterpret_cast<const uint4*>(stage + v * 512 + lane * 16);
      words[4 * v] = word.x, words[4 * v + 1] = word.y, words[4 * v + 2] = word.z, words[4 * v + 3] = word.w;
    }
#pragma unroll
    for (int n = 0; n < NB; ++n) load_x(rows + n * 512, lane, x[n]);
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
  return calora::cuda::by_dtype<calora::cuda::Dense, 8>(*args, stream);
}

extern "C" int calora_cuda_decode_dense(const calora::cuda::PackedWeight* w, int64_t row_begin, int64_t row_end, void* out,
                                        int64_t out_dtype, void* stream) {
  return calora::cuda::launch_decode<calora::cuda::DenseWords>(*w, row_begin, row_end, out, out_dtype, stream);
}
