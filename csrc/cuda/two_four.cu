// The 2:4 pattern: the tensor core multiplies the kept weights alone, guided by their places (order: api.h). A pair of turns, 64
// columns, is what packed bytes come in; each turn is one sparse mma of 16 x 32 for each half of the tile.
#include "decode.cuh"
#include "linear.cuh"

namespace calora::cuda {
namespace {

// The places of 8 groups as the tensor core wants them, first < second, from their numbers. Found by trying all functions of two
// shifts and two logical operations: this one reaches each of the six pairs, and again one for each place that is kept alone.
// (Making them of the canonical places took 12 operations, a third of what a turn of int4 takes.)
__device__ __forceinline__ uint32_t guide_of(uint32_t numbers) {
  const uint32_t t = (~numbers | numbers << 1) & 0x66666666;
  return (numbers & (t | t << 1)) | (~numbers & ~t);
}

template <class T, template <class, int> class V, int NB, int Turns>
struct TwoFourUnits {
  using Value = V<T, kNoFold>;
  using Half = std::conditional_t<Turns == 4, TwoFourUnits<T, V, NB, 2>, void>;
  static constexpr int kPlaces = 512 * Value::kWords, kPair = kPlaces + 256;
  static constexpr int kTurns = Turns, kUnitBytes = kPair * kTurns / 2, kRoom = kUnitBytes;
  static constexpr bool kZeros = false, kSums = false, kDirect = false, kWhole = NB == 1 && Value::kBits == 4;
  static constexpr int kLaneBytes = 16, kBlocks = NB <= 2 ? kTwo : 1, kMost = 4;
  static constexpr float kOffset = 0;
  static_assert(Value::kOffset == 0);

  __device__ TwoFourUnits(const LinearArgs&, const Geometry&, int64_t, int, int, int) {}

  __device__ __forceinline__ void copy(Shared stage, const uint8_t* from, int turns, int lane) {
    if (kUnitBytes % 512 == 0 && turns == kTurns) {
#pragma unroll
      for (int v = 0; v < kUnitBytes / 512; ++v) copy16(stage + (v * 512 + lane * 16), from + v * 512);
      return;
    }
#pragma unroll
    for (int pair = 0; pair < kTurns / 2; ++pair)
      if (turns > 2 * pair) copy_pair(stage + pair * kPair, from + pair * kPair, turns == 2 * pair + 1, lane);
  }

  static __device__ __forceinline__ void copy_pair(Shared stage, const uint8_t* from, bool half, int lane) {
    if (!half) {
#pragma unroll
      for (int v = 0; v < Value::kWords; ++v) copy16(stage + (v * 512 + lane * 16), from + v * 512);
      copy_small<8>(stage + (kPlaces + lane * 8), from + (kPlaces - lane * 8));
    } else {  // half of everything
      if constexpr (Value::kWords == 1) copy_small<8>(stage + lane * 16, from - lane * 8);
#pragma unroll
      for (int v = 0; v < Value::kWords / 2; ++v) copy16(stage + (v * 512 + lane * 16), from + v * 512);
      copy_small<4>(stage + (kPlaces + lane * 8), from + (kPlaces / 2 - lane * 12));
    }
  }

  __device__ __forceinline__ void multiply(Shared stage, Shared rows, int turns, int lane, bool, float (&)[NB][4],
                                           float (&d)[2][NB][4]) {
    const Shared x_of_lane = rows + x_slot(lane % 8, lane / 8);
#pragma unroll
    for (int pair = 0; pair < kTurns / 2; ++pair) {
      if (turns <= 2 * pair) break;
      uint32_t words[4 * Value::kWords];
#pragma unroll
      for (int v = 0; v < Value::kWords; ++v) {
        const uint4 word = load_shared<uint4>(stage + (pair * kPair + v * 512 + lane * 16));
        words[4 * v] = word.x, words[4 * v + 1] = word.y, words[4 * v + 2] = word.z, words[4 * v + 3] = word.w;
      }
      const uint2 numbers = load_shared<uint2>(stage + (pair * kPair + kPlaces + lane * 8));
#pragma unroll
      for (int t = 0; t < 2; ++t) {
        if (turns <= 2 * pair + t) break;
        const uint32_t guide = guide_of(t ? numbers.y : numbers.x);
        uint32_t low[4], high[4];
        Value::fragment(words, 0, t, low);
        Value::fragment(words, 1, t, high);
#pragma unroll
        for (int n = 0; n < NB; ++n) {
          uint32_t x[4];
          load_matrices(x_of_lane + ((2 * pair + t) * NB + n) * 512, x);
          mma_sparse<T, 0>(d[0][n], low, x, guide);
          mma_sparse<T, 1>(d[1][n], high, x, guide);
        }
      }
    }
  }
};

// For few rows of x a group of 128 columns of int4, else one pair.
template <class T, template <class, int> class V, int NB>
constexpr int kTwoFourTurns = NB == 1 && V<T, NB>::kWords == 1 && !V<T, NB>::kOuter ? 4 : 2;
template <class T, template <class, int> class V, int NB>
struct TwoFour : TwoFourUnits<T, V, NB, kTwoFourTurns<T, V, NB>> {
  using TwoFourUnits<T, V, NB, kTwoFourTurns<T, V, NB>>::TwoFourUnits;
};

struct TwoFourWords {
  // A lane decodes groups 2 c and 2 c + 1 of its rows (its halves s); lanes c % 2 * 2 and c % 2 * 2 + 1 of the quad hold them.
  template <class V>
  static __device__ __forceinline__ void words(const PackedWeight& w, const Geometry& geo, int64_t tile, int64_t chunk, int lane, uint32_t (&words)[4 * V::kWords]) {
    constexpr int kPlaces = 512 * V::kWords;
    constexpr uint32_t kMask = (1u << V::kBits) - 1;
    const int64_t per_block = geo.block_columns / kChunkColumns, at = chunk % per_block;
    const int g = lane / 4, c = lane % 4, t = at % 2;
    const bool half = per_block % 2 && at + 1 == per_block;  // a unit of one turn
    const uint8_t* const unit = w.packed + tile * geo.tile_bytes + chunk / per_block * geo.block_bytes + at / 2 * (kPlaces + 256);
#pragma unroll
    for (int i = 0; i < 4 * V::kWords; ++i) words[i] = V::kNothing;
#pragma unroll
    for (int rt = 0; rt < 2; ++rt)
#pragma unroll
      for (int s = 0; s < 2; ++s) {
        const int group = 2 * c + s, holder = 4 * g + group % 4, side = group / 4, guide = 4 * g + 2 * rt + side;
        const uint32_t places = guide_of(*reinterpret_cast<const uint32_t*>(unit + (half ? kPlaces / 2 + guide * 4 : kPlaces + guide * 8 + t * 4)));
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const uint32_t first = places >> (16 * j + 4 * (group % 4)) & 3, second = places >> (16 * j + 4 * (group % 4) + 2) & 3;
          const int word = V::word(rt, j, t, side);
          const uint32_t q = *reinterpret_cast<const uint32_t*>(unit + (half && V::kWords == 1 ? holder * 8 + word * 4 : word / 4 * 512 + holder * 16 + word % 4 * 4));
          const uint32_t codes[2] = {q >> V::bit(j, side, 0) & kMask, q >> V::bit(j, side, 1) & kMask};
#pragma unroll
          for (int place = 0; place < 4; ++place) {
            if (first != place && second != place) continue;
            const uint32_t code = second == place ? codes[1] : codes[0];
            uint32_t& target = words[V::word(rt, j, s, place >> 1)];
            const int bit = V::bit(j, place >> 1, place & 1);
            target = (target & ~(kMask << bit)) | code << bit;
          }
        }
      }
  }
};

}  // namespace
}  // namespace calora::cuda

extern "C" int calora_cuda_linear_two_four(const calora::cuda::LinearArgs* args, void* stream) {
  return calora::cuda::by_dtype<calora::cuda::TwoFour>(*args, stream);
}

extern "C" int calora_cuda_decode_two_four(const calora::cuda::PackedWeight* w, int64_t row_begin, int64_t row_end, void* out,
                                           int64_t out_dtype, void* stream) {
  return calora::cuda::launch_decode<calora::cuda::TwoFourWords>(*w, row_begin, row_end, out, out_dtype, stream);
}
