// Runs CUDA kernels on a CPU, for tests of their arithmetic: layouts, fragments, copy rings, reductions, bounds. One fiber per
// thread, scheduled cooperatively; barriers and shuffles are real meetings, the tensor core is computed from the fragment maps
// of the PTX manual. It knows no time, no caches, and no race that fibers cannot have.
//
// Two switches (emulate_options) look for what a GPU might do: bit 0 lets asynchronous copies arrive as late as the code
// allows instead of at once, bit 1 runs the threads in reverse order. Shared memory starts as NaN in every block.
//
// What the kernel before one that is launched early writes (emulate_pending) is NaN in every block of it until a thread waits.
#pragma once
#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <deque>
#include <functional>
#include <memory>
#include <type_traits>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
struct alignas(8) uint2 { uint32_t x, y; };
struct alignas(16) uint4 { uint32_t x, y, z, w; };
struct alignas(8) float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };

namespace emulator {

struct Copy { uint8_t* to; const uint8_t* from; int bytes, used; };
struct Fiber {
  ucontext_t context;  // entered once; every later switch is a _longjmp, which makes no system call
  jmp_buf at;
  bool started = false;
  std::unique_ptr<char[]> stack{new char[kStack]};
  bool done = false, waited = false;
  dim3 thread;
  std::deque<std::vector<Copy>> groups;  // committed, not yet arrived
  std::vector<Copy> open;
  static constexpr std::size_t kStack = 128 * 1024;
};

inline std::vector<Fiber> fibers;
inline std::vector<uint8_t> shared_memory;
inline std::function<void()> body;
inline jmp_buf scheduler;
inline ucontext_t nowhere;
inline dim3 block_index, block_size, grid_size;
inline int current, options;
inline long progress;        // meetings entered or left, threads ended: stands still in a deadlock
inline const char* failure;  // the first thing that went wrong
inline uint8_t* pending;     // what the next launch may find unwritten, and what is written there in the end
inline std::vector<uint8_t> written;

inline void to_scheduler();

inline void fail(const char* what) {
  if (!failure) failure = what;
}

// A meeting of `size` fibers, of the block or of a warp.
struct Meeting {
  int size = 0, arrived = 0;
  long generation = 0;
  void open_if_full() {
    if (size && arrived == size) arrived = 0, ++generation, ++progress;
  }
  void wait() {
    const long mine = generation;
    ++arrived, ++progress;
    open_if_full();
    while (generation == mine) to_scheduler();
  }
  void leave() {
    --size;
    open_if_full();
  }
};
inline Meeting block_meeting, warp_meeting[32];
inline uint32_t box[32][32][9];  // what the lanes of a warp show each other

inline int warp() { return current / 32; }
inline int lane() { return current % 32; }

inline void arrive(const Copy& c) {
  std::memcpy(c.to, c.from, c.used);
  std::memset(c.to + c.used, 0, c.bytes - c.used);
}
inline void copy(void* to, const void* from, int bytes, int used) {
  if (reinterpret_cast<uintptr_t>(to) % bytes || (used && reinterpret_cast<uintptr_t>(from) % bytes)) return fail("a misaligned asynchronous copy");
  auto* const t = static_cast<uint8_t*>(to);
  if (t < shared_memory.data() || t + bytes > shared_memory.data() + shared_memory.size()) return fail("a copy beyond shared memory");
  const Copy c{t, static_cast<const uint8_t*>(from), bytes, used};
  if (options & 1) fibers[current].open.push_back(c);
  else arrive(c);
}
inline void commit() {
  Fiber& f = fibers[current];
  f.groups.push_back(std::move(f.open));
  f.open.clear();
}
inline void wait(std::size_t pending) {
  Fiber& f = fibers[current];
  for (; f.groups.size() > pending; f.groups.pop_front())
    for (const Copy& c : f.groups.front()) arrive(c);
}

inline void arrive_pending() {
  if (!written.empty()) std::memcpy(pending, written.data(), written.size());
}
inline void wait_for_previous() {
  fibers[current].waited = true;
  arrive_pending();
}
inline void release_next() {
  if (!fibers[current].waited) fail("the next kernel is released before this one has waited");
}

inline void to_scheduler() {
  if (!_setjmp(fibers[current].at)) _longjmp(scheduler, 1);
}
inline void to_fiber() {
  Fiber& f = fibers[current];
  if (_setjmp(scheduler)) return;
  if (f.started) _longjmp(f.at, 1);
  f.started = true;
  setcontext(&f.context);
}

inline void run_thread() {
  body();
  Fiber& f = fibers[current];
  if (!f.waited) fail("a thread ends that has not waited for the kernel before it");
  f.done = true;
  ++progress;
  block_meeting.leave();
  warp_meeting[warp()].leave();
  _longjmp(scheduler, 1);
}

inline void run_block(int threads) {
  block_meeting = Meeting{threads};
  for (int w = 0; w < 32; ++w) warp_meeting[w] = Meeting{std::max(0, std::min(32, threads - 32 * w))};
  std::fill(shared_memory.begin(), shared_memory.end(), 0xff);
  if (!written.empty()) std::memset(pending, 0xff, written.size());
  for (int i = 0; i < threads; ++i) {
    Fiber& f = fibers[i];
    f.done = f.started = f.waited = false, f.thread = dim3(i), f.groups.clear(), f.open.clear();
    getcontext(&f.context);
    f.context.uc_stack.ss_sp = f.stack.get(), f.context.uc_stack.ss_size = Fiber::kStack, f.context.uc_link = &nowhere;
    makecontext(&f.context, run_thread, 0);
  }
  for (bool alive = true; alive && !failure;) {
    alive = false;
    const long before = progress;
    for (int i = 0; i < threads; ++i) {
      current = options & 2 ? threads - 1 - i : i;
      if (fibers[current].done) continue;
      alive = true;
      to_fiber();
    }
    if (alive && progress == before) fail("a deadlock: not every thread reached a barrier");
  }
}

inline float bf16(uint32_t v) {
  v <<= 16;
  float f;
  std::memcpy(&f, &v, 4);
  return f;
}
inline float f16(uint32_t v) {
  const auto half = static_cast<uint16_t>(v);
  _Float16 f;
  std::memcpy(&f, &half, 2);
  return static_cast<float>(f);
}

// d (16 x 8) += a (16 x 16) b (16 x 8). PTX ISA, fragments of mma.m16n8k16: with g = lane / 4 and c = lane % 4, register i of a
// holds row g + 8 (i % 2), columns 2 c + 8 (i / 2) and the next; b0 and b1 hold rows 2 c and 2 c + 8 and the next, column g;
// d0 d1 d2 d3 hold rows g, g, g + 8, g + 8, columns 2 c, 2 c + 1, 2 c, 2 c + 1.
template <float (*Value)(uint32_t)>
void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  uint32_t(&mine)[9] = box[warp()][lane()];
  std::memcpy(mine, a, 16), mine[4] = b0, mine[5] = b1;
  warp_meeting[warp()].wait();
  for (int i = 0; i < 4; ++i) {
    const int row = lane() / 4 + 8 * (i / 2), column = lane() % 4 * 2 + i % 2;
    for (int k = 0; k < 16; ++k) {
      const uint32_t va = box[warp()][row % 8 * 4 + k % 8 / 2][row / 8 + 2 * (k / 8)], vb = box[warp()][column * 4 + k % 8 / 2][4 + k / 8];
      d[i] += Value(k % 2 ? va >> 16 : va & 0xffff) * Value(k % 2 ? vb >> 16 : vb & 0xffff);
    }
  }
  warp_meeting[warp()].wait();
}

// d (16 x 8) += a (16 x 32, two of four kept) b (32 x 8). PTX ISA, mma.sp.m16n8k32: register i of a holds the kept pair of row
// g + 8 (i % 2) and columns 4 (c + 4 (i / 2)) to + 3; b[i] holds rows 8 i + 2 c and the next, column g. Of the lanes
// c = 2 half + k, the low 16 bits of the metadata are row g, the high ones row g + 8; two bits an element, columns 16 k to + 15.
template <float (*Value)(uint32_t)>
void mma_sparse(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[4], uint32_t places, int half) {
  uint32_t(&mine)[9] = box[warp()][lane()];
  std::memcpy(mine, a, 16), std::memcpy(mine + 4, b, 16), mine[8] = places;
  warp_meeting[warp()].wait();
  const auto& warps = box[warp()];
  for (int i = 0; i < 4; ++i) {
    const int row = lane() / 4 + 8 * (i / 2), column = lane() % 4 * 2 + i % 2;
    for (int q = 0; q < 8; ++q) {
      const uint32_t va = warps[row % 8 * 4 + q % 4][row / 8 + 2 * (q / 4)];
      const uint32_t at = warps[row % 8 * 4 + 2 * half + q / 4][8] >> (row / 8 * 16 + q % 4 * 4), first = at & 3, second = at >> 2 & 3;
      if (first >= second) fail("places of a sparse operand that are not in order");
      for (int e = 0; e < 2; ++e) {
        const int k = 4 * q + static_cast<int>(e ? second : first);
        const uint32_t vb = warps[column * 4 + k % 8 / 2][4 + k / 8];
        d[i] += Value(e ? va >> 16 : va & 0xffff) * Value(k % 2 ? vb >> 16 : vb & 0xffff);
      }
    }
  }
  warp_meeting[warp()].wait();
}

}  // namespace emulator

#define threadIdx (emulator::fibers[emulator::current].thread)
#define blockIdx emulator::block_index
#define blockDim emulator::block_size
#define gridDim emulator::grid_size
#define CALORA_SHARED(name) uint8_t* const name = emulator::shared_memory.data()

inline void __syncthreads() { emulator::block_meeting.wait(); }
inline void __syncwarp() { emulator::warp_meeting[emulator::warp()].wait(); }
template <class T>
T show(T v, int from) {  // v of lane `from`
  using namespace emulator;
  std::memcpy(box[warp()][lane()], &v, sizeof v);
  warp_meeting[warp()].wait();
  std::memcpy(&v, box[warp()][from], sizeof v);
  warp_meeting[warp()].wait();
  return v;
}
template <class T>
T __shfl_xor_sync(unsigned, T v, int mask) { return show(v, emulator::lane() ^ mask); }
template <class T>
T __shfl_up_sync(unsigned, T v, int by) { return show(v, emulator::lane() < by ? emulator::lane() : emulator::lane() - by); }
template <class T>
T __shfl_sync(unsigned, T v, int from) { return show(v, from); }
inline int __popc(uint32_t v) { return __builtin_popcount(v); }
inline uint32_t __float_as_uint(float f) {
  uint32_t v;
  std::memcpy(&v, &f, 4);
  return v;
}
inline float __uint_as_float(uint32_t v) {
  float f;
  std::memcpy(&f, &v, 4);
  return f;
}

namespace calora::cuda {

struct Bf16;
struct F16;
template <class T>
void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  if constexpr (std::is_same_v<T, Bf16>) emulator::mma<emulator::bf16>(d, a, b0, b1);
  else emulator::mma<emulator::f16>(d, a, b0, b1);
}
template <class T, int Half>
void mma_sparse(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[4], uint32_t places) {
  if constexpr (std::is_same_v<T, Bf16>) emulator::mma_sparse<emulator::bf16>(d, a, b, places, Half);
  else emulator::mma_sparse<emulator::f16>(d, a, b, places, Half);
}
using Shared = uint8_t*;
inline Shared shared_at(uint8_t* p) { return p; }
inline Shared keep(Shared p) { return p; }
inline bool within_shared(Shared p, std::size_t bytes) {
  using emulator::shared_memory;
  const bool within = p >= shared_memory.data() && p + bytes <= shared_memory.data() + shared_memory.size() && reinterpret_cast<uintptr_t>(p) % bytes == 0;
  if (!within) emulator::fail("an access outside shared memory, or a misaligned one");
  return within;
}
template <class V>
V load_shared(Shared p) {
  V v{};
  if (within_shared(p, sizeof v)) std::memcpy(&v, p, sizeof v);
  return v;
}
inline void store_shared(Shared p, uint32_t v) {
  if (within_shared(p, sizeof v)) std::memcpy(p, &v, sizeof v);
}
// PTX ldmatrix.m8n8.x4: lane 8 i + r names row r of matrix i, register i of lane (g, c) is elements 2 c, 2 c + 1 of its row g.
inline void load_matrices(Shared row, uint32_t (&v)[4]) {
  using namespace emulator;
  if (within_shared(row, 16)) std::memcpy(box[warp()][lane()], row, 16);  // what is there when this lane arrives: the instruction waits for nobody's copies
  warp_meeting[warp()].wait();
  for (int i = 0; i < 4; ++i) v[i] = box[warp()][8 * i + lane() / 4][lane() % 4];
  warp_meeting[warp()].wait();
}
inline void load_matrices_transposed(Shared row, uint32_t (&v)[4]) {
  using namespace emulator;
  if (within_shared(row, 16)) std::memcpy(box[warp()][lane()], row, 16);
  warp_meeting[warp()].wait();
  const auto element = [&](int matrix, int r, int column) { return box[warp()][8 * matrix + r][column / 2] >> (column % 2 * 16) & 0xffff; };
  for (int i = 0; i < 4; ++i) v[i] = element(i, lane() % 4 * 2, lane() / 4) | element(i, lane() % 4 * 2 + 1, lane() / 4) << 16;
  warp_meeting[warp()].wait();
}
inline void copy16(Shared shared, const void* global) { emulator::copy(shared, global, 16, 16); }
inline void copy16_if(bool there, Shared shared, const void* global) { emulator::copy(shared, global, 16, there ? 16 : 0); }
template <int Bytes>
void copy_small(Shared shared, const void* global) { emulator::copy(shared, global, Bytes, Bytes); }
inline void copy_commit() { emulator::commit(); }
template <int Pending>
void copy_wait() { emulator::wait(Pending); }
inline uint4 load_cached(const void* global) {
  if (reinterpret_cast<uintptr_t>(global) % 16) emulator::fail("a misaligned load");
  uint4 v;
  std::memcpy(&v, global, 16);
  return v;
}
inline void prefetch(const void*) {}

inline void wait_for_previous() { emulator::wait_for_previous(); }
inline void release_next() { emulator::release_next(); }

inline uint32_t and_or(uint32_t q, uint32_t mask, uint32_t bits) { return (q & mask) | bits; }
inline uint32_t and_xor(uint32_t q, uint32_t mask, uint32_t bits) { return (q & mask) ^ bits; }
inline uint32_t funnel_right(uint32_t low, uint32_t high, uint32_t bits) {
  return bits >= 32 ? high : static_cast<uint32_t>((static_cast<uint64_t>(high) << 32 | low) >> bits);
}
// PTX prmt, default mode: nibble i of the selector picks byte i of the result out of the 8 bytes of (a, b); from 8 on its sign.
inline uint32_t byte_permute(uint32_t a, uint32_t b, uint32_t selector) {
  const uint64_t bytes = static_cast<uint64_t>(b) << 32 | a;
  uint32_t r = 0;
  for (int i = 0; i < 4; ++i) {
    const uint32_t digit = selector >> (4 * i) & 15, byte = bytes >> (8 * (digit & 7)) & 255;
    r |= (digit < 8 ? byte : byte & 128 ? 255u : 0u) << (8 * i);
  }
  return r;
}
inline float f16_to_float(uint16_t v) { return emulator::f16(v); }
inline uint16_t float_to_f16(float v) {
  const auto f = static_cast<_Float16>(v);
  uint16_t r;
  std::memcpy(&r, &f, 2);
  return r;
}
inline uint16_t float_to_bf16(float v) {  // half to even; NaN stays NaN
  const uint32_t u = __float_as_uint(v);
  return static_cast<uint16_t>(v != v ? 0x7fff : (u + 0x7fff + (u >> 16 & 1)) >> 16);
}
template <float (*Read)(uint32_t), uint16_t (*Write)(float)>
uint32_t subtract2(uint32_t a, uint32_t b) {
  return Write(Read(a & 0xffff) - Read(b & 0xffff)) | static_cast<uint32_t>(Write(Read(a >> 16) - Read(b >> 16))) << 16;
}
inline uint32_t subtract_bf16x2(uint32_t a, uint32_t b) { return subtract2<emulator::bf16, float_to_bf16>(a, b); }
inline uint32_t subtract_f16x2(uint32_t a, uint32_t b) { return subtract2<emulator::f16, float_to_f16>(a, b); }

template <class... Parameters, class... Arguments>
int launch(void (*kernel)(Parameters...), dim3 grid, int threads, int shared, void*, Arguments... arguments) {
  using namespace emulator;
  failure = nullptr;
  if (shared > 99 * 1024) fail("more shared memory than every architecture has");
  if (fibers.size() < static_cast<std::size_t>(threads)) fibers.resize(threads);
  shared_memory.assign(shared, 0);
  block_size = dim3(threads), grid_size = grid;
  body = [&] { kernel(arguments...); };
  for (unsigned z = 0; z < grid.z; ++z)
    for (unsigned y = 0; y < grid.y; ++y)
      for (unsigned x = 0; x < grid.x && !failure; ++x) {
        block_index = dim3(x, y, z);
        run_block(threads);
      }
  arrive_pending();
  written.clear();
  if (failure) std::fprintf(stderr, "emulated kernel: %s\n", failure);
  return failure ? 700 : 0;
}

}  // namespace calora::cuda

extern "C" inline __attribute__((used)) void emulate_options(int options) { emulator::options = options; }
extern "C" inline __attribute__((used)) void emulate_pending(void* pending, int64_t bytes) {
  emulator::pending = static_cast<uint8_t*>(pending);
  emulator::written.assign(emulator::pending, emulator::pending + bytes);
}
