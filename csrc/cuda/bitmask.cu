// Unstructured sparsity: a bit for every weight, and the codes of those that are kept one after the other (order: api.h). Each
// lane counts its own bits, learns from the lanes before it where its codes start, and spreads them in registers to what the
// dense pattern would have loaded: one byte permutation for 32 bits, whose selector is one multiplication of the bits.
//
// Nothing in a file leads outside: where a chunk starts is limited to kept_limit() (layouts.h), how much of it is copied to
// what a stage holds; inside a stage the bits themselves say where to read, at most a full chunk from its start on.
#include "decode.cuh"
#include "linear.cuh"

namespace calora::cuda {
namespace {

// How the kept codes of one 32-bit word are spread: `bits` has one for each element, where api.h says.
// A selector of byte_permute is a digit for each byte of the result. Element k takes the code that as many kept ones precede,
// or nothing; both are linear in the bits, because the digits of bits * 0x1111.. count the ones up to each digit.
template <class V>
struct Spread;

template <class T, int NB>
struct Spread<Int8<T, NB>> {
  static constexpr bool kBytes = false;
  static constexpr int kSteps = 8;
  static constexpr uint32_t kEach = 0x1111;
  static __device__ __forceinline__ int shift(int step) { return step / 4 * 16 + step % 4; }
  static __device__ __forceinline__ int mask_bit(int step, int k) { return shift(step) + 4 * k; }
  static __device__ __forceinline__ int step(int rt, int, int s, int h) { return 4 * s + 2 * rt + h; }
  static __device__ __forceinline__ int element(int j, int, int e) { return 2 * j + e; }
  static __device__ __forceinline__ uint32_t one(uint32_t codes, uint32_t bits) {  // digit k: ones before k; + 4 (a code of 0) where not kept
    return byte_permute(codes, 0x80808080, bits * (0x1111 - 0x1 - 0x4) + 0x4444);
  }
};

template <class T, int NB>
struct Spread<Dense16<T, NB>> {
  static constexpr bool kBytes = false;
  static constexpr int kSteps = 16;
  static constexpr uint32_t kEach = 0x0101;
  static __device__ __forceinline__ int shift(int step) { return step / 8 * 16 + step % 8; }
  static __device__ __forceinline__ int mask_bit(int step, int k) { return shift(step) + 8 * k; }
  static __device__ __forceinline__ int step(int rt, int j, int s, int h) { return 4 * (2 * s + rt) + j + 2 * h; }
  static __device__ __forceinline__ int element(int, int, int e) { return e; }
  static __device__ __forceinline__ uint32_t one(uint32_t codes, uint32_t bits) {  // two digits an element; the second starts at 2 if the first is kept
    return byte_permute(codes, 0, bits * (0x2200 - 0x44) + 0x5454);
  }
};

// Codes of 4 bits.
struct SpreadNibbles {
  static constexpr int kSteps = 4;
  static constexpr uint32_t kEach = 0x11111111;
  static __device__ __forceinline__ int shift(int step) { return step; }
  static __device__ __forceinline__ int mask_bit(int step, int k) { return step + 4 * k; }
  static __device__ __forceinline__ int step(int rt, int, int s, int) { return 2 * s + rt; }
  // Elements 0..3 and 4..7, a byte each: even and odd codes come as bytes. Digits from 8 on give the sign of a byte, which is 0.
  static __device__ __forceinline__ void two(uint32_t even, uint32_t odd, uint32_t bits, uint32_t& low, uint32_t& high) {
    const uint32_t first = byte_permute(even, odd, 0x5140), second = byte_permute(even, odd, 0x7362);
    const uint32_t digits = bits * (0x11111111u - 0x1 - 0x8) + 0x88888888u;
    low = byte_permute(first, second, digits);
    high = byte_permute(first, second, digits >> 16);
  }
};

template <class T, int NB>
struct Spread<Int4<T, NB>> : SpreadNibbles {
  static constexpr bool kBytes = true;  // codes stay bytes, in bits 3..6
  static __device__ __forceinline__ int element(int j, int h, int e) { return j + 2 * e + 4 * h; }
  static __device__ __forceinline__ void bytes(uint32_t codes, uint32_t bits, uint32_t& low, uint32_t& high) {
    two(codes << 3 & 0x78787878, codes >> 1 & 0x78787878, bits, low, high);
  }
};

template <class T, int NB>
struct Spread<Nf4<T, NB>> : SpreadNibbles {
  static constexpr bool kBytes = false;
  static __device__ __forceinline__ int element(int j, int h, int e) { return e + 2 * j + 4 * h; }
  static __device__ __forceinline__ uint32_t one(uint32_t codes, uint32_t bits) {  // element k at bit 4 k
    uint32_t low, high;
    two(codes & 0x0f0f0f0f, codes >> 4 & 0x0f0f0f0f, bits, low, high);
    return byte_permute(low | low >> 4, high | high >> 4, 0x6420);
  }
};

// The codes of a lane from one of them on: what four steps can use at most.
struct Window {
  uint32_t v[4];
  __device__ __forceinline__ Window(Shared codes, uint32_t bit) {
    const Shared p = codes + static_cast<int>(bit / 32 * 4);
    uint32_t q[5];
#pragma unroll
    for (int i = 0; i < 5; ++i) q[i] = load_shared<uint32_t>(p + 4 * i);
#pragma unroll
    for (int i = 0; i < 4; ++i) v[i] = funnel_right(q[i], q[i + 1], bit % 32);
  }
  // Gives up the first `bits` bits, at most 32; step: how many of the four have been taken.
  __device__ __forceinline__ void drop(int bits, int step) {
#pragma unroll
    for (int i = 0; i < 3; ++i)
      if (i + step < 3) v[i] = funnel_right(v[i], v[i + 1], bits);
  }
};

// Lane's share of a sum over the lanes before it.
__device__ __forceinline__ uint32_t sum_before(uint32_t v, int lane) {
  uint32_t sum = v;
#pragma unroll
  for (int offset = 1; offset < 32; offset *= 2) {
    const uint32_t other = __shfl_up_sync(0xffffffffu, sum, offset);
    if (lane >= offset) sum += other;
  }
  return sum - v;
}

// Where the chunk lies in kept, in units of 8 bytes; what is beyond the last chunk begins at the limit.
__device__ __forceinline__ uint32_t start_of(const PackedWeight& w, int64_t chunk, int64_t all) {
  const uint32_t limit = static_cast<uint32_t>(w.kept_limit / kOffsetUnit);
  const uint32_t start = chunk < all ? reinterpret_cast<const uint32_t*>(w.offsets)[chunk] : limit;
  return start < limit ? start : limit;
}

// A stage: bits of two chunks, one word of each a lane | their kept codes, from a whole 16-byte word on | how many words those
// are (15 bits), where in them the first chunk starts (1 bit) and where the second, in units of 8 bytes.
template <class T, template <class, int> class V, int NB>
struct Bitmask {
  using Value = V<T, NB>;
  using Half = void;
  using S = Spread<Value>;
  static constexpr int kBits = Value::kBits, kChunkBytes = 128 * kBits;
  static constexpr int kTurns = 2, kUnitBytes = 256, kPieces = 2 * kChunkBytes / 16 + 1;
  // 32 more: a window of the last lane reads on.
  static constexpr int kCodes = 256, kStarts = kCodes + 16 * kPieces + 32, kRoom = kStarts + 16;
  static constexpr bool kZeros = false, kSums = Value::kOffset != 0, kDirect = false, kWhole = false;
  static constexpr int kLaneBytes = 0, kBlocks = NB <= 2 ? kTwo : 1, kMost = 4;
  static constexpr float kOffset = kSums ? 16 + kInt4Zero : 0;

  // Each lane looks up where one of 32 units lies, a round of them ahead.
  const PackedWeight& w;
  const int64_t chunks, first_chunk;  // of the whole weight; before this tile
  const int turns_of_block, first, last;
  int taken = 0;                   // units
  uint32_t piece = 0, starts = 0;  // of the lane-th unit of this round: the first 16-byte word of its codes; see copy()
  uint32_t ahead[3] = {};          // of the next round: where the unit's chunks start, and where it ends

  __device__ __forceinline__ Bitmask(const LinearArgs& a, const Geometry& geo, int64_t tile, int lane, int first_unit, int last_unit)
      : w(a.w), chunks(geo.tiles * (geo.columns / kChunkColumns)), first_chunk(tile * (geo.columns / kChunkColumns)),
        turns_of_block(static_cast<int>(geo.block_columns / kChunkColumns)), first(first_unit), last(last_unit) {
    look_up(first + lane);
  }

  __device__ __forceinline__ void look_up(int unit) {
    if (unit >= last) return;
    const int per_block = (turns_of_block + 1) / 2, turn = unit % per_block * 2;
    const int64_t chunk = first_chunk + unit / per_block * turns_of_block + turn;
    ahead[0] = start_of(w, chunk, chunks), ahead[1] = start_of(w, chunk + 1, chunks);
    ahead[2] = turn + 1 < turns_of_block ? start_of(w, chunk + 2, chunks) : ahead[1];
  }

  __device__ __forceinline__ void copy(Shared stage, const uint8_t* from, int turns, int lane) {
    if (taken % 32 == 0) {  // what was looked up becomes what is used
      piece = ahead[0] / 2;
      // In units of 8 bytes from that word on. Damaged offsets give nonsense inside the stage: no more words than it holds, and
      // a second chunk that begins at most a full one behind the first.
      const uint32_t end = ahead[2] >= ahead[0] ? ahead[2] - 2 * piece : 0, words = (end < 2 * kPieces ? end + 1 : 2 * kPieces) / 2;
      const uint32_t second = ahead[1] - 2 * piece, most = kChunkBytes / 8 + 1;
      starts = words | (ahead[0] % 2) << 15 | (second < most ? second : most) << 16;
      look_up(first + taken + 32 + lane);
    }
    const uint32_t begin = __shfl_sync(0xffffffffu, piece, taken % 32), info = __shfl_sync(0xffffffffu, starts, taken % 32);
    ++taken;
    if (turns == 2) copy_small<8>(stage + lane * 8, from + lane * 8);
    else copy_small<4>(stage + lane * 8, from + lane * 4);
    const uint8_t* const codes = w.kept + static_cast<int64_t>(begin) * 16;
#pragma unroll
    for (int i = 0; i < (kPieces + 31) / 32; ++i)
      if (i * 32 + lane < static_cast<int>(info & 0x7fff)) copy16(stage + kCodes + (i * 32 + lane) * 16, codes + (i * 32 + lane) * 16);
    if (lane == 0) store_shared(stage + kStarts, info);
  }

  __device__ __forceinline__ void multiply(Shared stage, Shared rows, int turns, int lane, bool needs_sum, float (&sum_x)[NB][4],
                                           float (&d)[2][NB][4]) {
    const uint2 both = load_shared<uint2>(stage + lane * 8);
    const uint32_t info = load_shared<uint32_t>(stage + kStarts);
    const uint32_t before = sum_before(__popc(both.x) | (turns == 2 ? __popc(both.y) : 0) << 16, lane);
#pragma unroll
    for (int t = 0; t < 2; ++t) {
      if (t >= turns) break;
      const uint32_t mask = t ? both.y : both.x;
      const uint32_t start = t ? info >> 16 : info >> 15 & 1, mine = t ? before >> 16 : before & 0xffff;
      uint32_t x[NB][4];
#pragma unroll
      for (int n = 0; n < NB; ++n) load_x(rows + (t * NB + n) * 512, lane, x[n]);
      uint32_t words[S::kBytes ? 8 : 4 * Value::kWords];
#pragma unroll
      for (int quarter = 0; quarter < S::kSteps / 4; ++quarter) {
        uint32_t earlier = 0;  // the bits of steps that windows before this one have used
#pragma unroll
        for (int step = 0; step < 4 * quarter; ++step) earlier |= (S::kEach << S::shift(step));
        Window window(stage + kCodes, start * 64 + (mine + (quarter ? __popc(mask & earlier) : 0)) * kBits);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int step = 4 * quarter + i;
          const uint32_t bits = mask >> S::shift(step) & S::kEach;
          if constexpr (S::kBytes) S::bytes(window.v[0], bits, words[2 * step], words[2 * step + 1]);
          else words[step] = S::one(window.v[0], bits);
          if (i < 3) window.drop(__popc(bits) * kBits, i);
        }
      }
#pragma unroll
      for (int s = 0; s < 2; ++s) {
#pragma unroll
        for (int rt = 0; rt < 2; ++rt) {
          uint32_t fragment[4];
          if constexpr (S::kBytes) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
              const uint32_t q = words[2 * (2 * s + rt) + i / 2];
              constexpr int kUp = T::kCodeShift - 3;  // bytes have their code at bit 3 already
              // Codes are two's complement here, so that what is not kept is 0: turn their highest bit.
              fragment[i] = and_xor(i % 2 ? q >> (8 - kUp) : q << kUp, T::kCodeMask, T::kSixteen | 0x00080008u << T::kCodeShift);
              if (kOffset == 0) fragment[i] = T::subtract(fragment[i], T::kTwentyFour);
            }
          } else {
            Value::fragment(words, rt, s, fragment);
          }
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
  }
};

struct BitmaskWords {
  template <class V>
  static __device__ __forceinline__ void words(const PackedWeight& w, const Geometry& geo, int64_t tile, int64_t chunk, int lane, uint32_t (&words)[4 * V::kWords]) {
    using S = Spread<V>;
    constexpr uint32_t kCode = (1u << V::kBits) - 1, kMiddle = V::kBits == 4 ? V::kNothing & 15 : 0;
    const int64_t per_block = geo.block_columns / kChunkColumns, at = chunk % per_block;
    const uint8_t* const bits = w.packed + tile * geo.tile_bytes + chunk / per_block * geo.block_bytes + at / 2 * 256;
    const bool half = per_block % 2 && at + 1 == per_block;
    const uint32_t mask = *reinterpret_cast<const uint32_t*>(bits + (half ? lane * 4 : lane * 8 + at % 2 * 4));
    const uint32_t before = sum_before(__popc(mask), lane);
    const int64_t all = geo.tiles * (geo.columns / kChunkColumns), start = static_cast<int64_t>(start_of(w, tile * (geo.columns / kChunkColumns) + chunk, all)) * kOffsetUnit;
#pragma unroll
    for (int i = 0; i < 4 * V::kWords; ++i) words[i] = V::kNothing;
    uint32_t earlier = 0;
#pragma unroll
    for (int step = 0; step < S::kSteps; ++step)
#pragma unroll
      for (int k = 0; k < 32 / V::kBits; ++k) {
        const uint32_t bit = 1u << S::mask_bit(step, k);
        if (mask & bit) {
          const uint32_t place = before + __popc(mask & earlier);
          uint32_t code;
          if constexpr (V::kBits == 16) code = reinterpret_cast<const uint16_t*>(w.kept + start)[place];
          else code = w.kept[start + place * V::kBits / 8] >> (V::kBits == 4 ? place % 2 * 4 : 0) & kCode;
#pragma unroll
          for (int position = 0; position < 32; ++position) {  // which of the dense places this is, known when it is compiled
            const int rt = position & 1, j = position >> 1 & 1, s = position >> 2 & 1, h = position >> 3 & 1, e = position >> 4;
            if (S::step(rt, j, s, h) != step || S::element(j, h, e) != k) continue;
            uint32_t& target = words[V::word(rt, j, s, h)];
            target = (target & ~(kCode << V::bit(j, h, e))) | (code ^ kMiddle) << V::bit(j, h, e);
          }
        }
        earlier |= bit;
      }
  }
};

}  // namespace
}  // namespace calora::cuda

extern "C" int calora_cuda_linear_bitmask(const calora::cuda::LinearArgs* args, void* stream) {
  return calora::cuda::by_dtype<calora::cuda::Bitmask>(*args, stream);
}

extern "C" int calora_cuda_decode_bitmask(const calora::cuda::PackedWeight* w, int64_t row_begin, int64_t row_end, void* out,
                                          int64_t out_dtype, void* stream) {
  return calora::cuda::launch_decode<calora::cuda::BitmaskWords>(*w, row_begin, row_end, out, out_dtype, stream);
}
