// The few things of a GPU that C++ has no word for. Compiled with CALORA_EMULATE (g++, no GPU, no nvcc), the same names come
// from python_tests/cuda_emulator.h: kernels are written against this header alone, so that every line of them is tested there.
#pragma once
#include <cstdint>

#include "api.h"

#ifdef CALORA_EMULATE
#include "cuda_emulator.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#define CALORA_SHARED(name) extern __shared__ __align__(128) uint8_t name[]

namespace calora::cuda {

// d (16 x 8, fp32) += a (16 x 16) b (16 x 8), operands of type T: the warp's tensor core.
struct Bf16;
struct F16;
template <class T>
__device__ __forceinline__ void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
#define CALORA_MMA(T, name)                                                                                                  \
  template <>                                                                                                                \
  __device__ __forceinline__ void mma<T>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {                  \
    asm("mma.sync.aligned.m16n8k16.row.col.f32." name "." name ".f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};" \
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                                            \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));                                            \
  }
CALORA_MMA(Bf16, "bf16")
CALORA_MMA(F16, "f16")
#undef CALORA_MMA

// The same with a sparse a (16 x 32 of which 2 of 4 are kept) and b 32 x 8. places: 2 bits for each kept element, in groups of
// two of which the first is the smaller; the lanes c = 2 Half and 2 Half + 1 hold those of the whole warp.
#if __CUDACC_VER_MAJOR__ > 12 || (__CUDACC_VER_MAJOR__ == 12 && __CUDACC_VER_MINOR__ >= 5)
#define CALORA_SPARSE "mma.sp::ordered_metadata"
#else
#define CALORA_SPARSE "mma.sp"
#endif
template <class T, int Half>
__device__ __forceinline__ void mma_sparse(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[4], uint32_t places);
#define CALORA_MMA_SPARSE(T, name, Half)                                                                                     \
  template <>                                                                                                                \
  __device__ __forceinline__ void mma_sparse<T, Half>(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[4], uint32_t places) { \
    asm(CALORA_SPARSE ".sync.aligned.m16n8k32.row.col.f32." name "." name ".f32 {%0,%1,%2,%3},{%4,%5,%6,%7},"       \
                 "{%8,%9,%10,%11},{%0,%1,%2,%3},%12," #Half ";"                                                              \
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                                            \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(b[2]), "r"(b[3]), "r"(places));     \
  }
CALORA_MMA_SPARSE(Bf16, "bf16", 0)
CALORA_MMA_SPARSE(Bf16, "bf16", 1)
CALORA_MMA_SPARSE(F16, "f16", 0)
CALORA_MMA_SPARSE(F16, "f16", 1)
#undef CALORA_MMA_SPARSE
#undef CALORA_SPARSE

// An address in shared memory, 32 bits: with generic pointers every access cost up to eight instructions of address arithmetic.
struct Shared {
  uint32_t at;
  __device__ __forceinline__ Shared operator+(int bytes) const { return {at + static_cast<uint32_t>(bytes)}; }
};
__device__ __forceinline__ Shared shared_at(const void* p) { return {static_cast<uint32_t>(__cvta_generic_to_shared(p))}; }
// Computed once: the compiler does not know what it is and so cannot save the register by computing it again.
__device__ __forceinline__ Shared keep(Shared p) {
  asm volatile("" : "+r"(p.at));
  return p;
}
template <class V>
__device__ __forceinline__ V load_shared(Shared p);
template <>
__device__ __forceinline__ uint32_t load_shared<uint32_t>(Shared p) {
  uint32_t v;
  asm volatile("ld.shared.u32 %0, [%1];" : "=r"(v) : "r"(p.at) : "memory");
  return v;
}
template <>
__device__ __forceinline__ uint2 load_shared<uint2>(Shared p) {
  uint2 v;
  asm volatile("ld.shared.v2.u32 {%0,%1}, [%2];" : "=r"(v.x), "=r"(v.y) : "r"(p.at) : "memory");
  return v;
}
template <>
__device__ __forceinline__ uint4 load_shared<uint4>(Shared p) {
  uint4 v;
  asm volatile("ld.shared.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(p.at) : "memory");
  return v;
}
__device__ __forceinline__ void store_shared(Shared p, uint32_t v) { asm volatile("st.shared.u32 [%0], %1;" ::"r"(p.at), "r"(v) : "memory"); }

// Four 8 x 8 matrices of 16-bit elements: lane 8 i + r says where the 16 bytes of row r of matrix i lie in shared memory; lane
// (g, c) gets the elements 2 c and 2 c + 1 of row g of matrix i in v[i].
__device__ __forceinline__ void load_matrices(Shared row, uint32_t (&v)[4]) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(v[0]), "=r"(v[1]), "=r"(v[2]), "=r"(v[3])
               : "r"(row.at)
               : "memory");
}

// The same with each matrix transposed: elements 2 c and 2 c + 1 of its column g.
__device__ __forceinline__ void load_matrices_transposed(Shared row, uint32_t (&v)[4]) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(v[0]), "=r"(v[1]), "=r"(v[2]), "=r"(v[3])
               : "r"(row.at)
               : "memory");
}

// Copies to shared memory that run beside the warp.
__device__ __forceinline__ void copy16(Shared shared, const void* global) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared.at), "l"(global) : "memory");
}
// Zeros instead, and nothing is read, where there is nothing.
__device__ __forceinline__ void copy16_if(bool there, Shared shared, const void* global) {
  asm volatile("{.reg .pred p; setp.eq.u32 p, %2, 0; cp.async.cg.shared.global [%0], [%1], 16, p;}" ::"r"(shared.at), "l"(global), "r"(static_cast<uint32_t>(there))
               : "memory");
}
template <int Bytes>  // 4 or 8
__device__ __forceinline__ void copy_small(Shared shared, const void* global) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(shared.at), "l"(global), "n"(Bytes) : "memory");
}
// 16 bytes through the L1 cache. Not the non-coherent load: what it reads must not change while the kernel runs, and this one may
// have begun while the kernel before it still wrote.
__device__ __forceinline__ uint4 load_cached(const void* global) {
  uint4 v;
  asm volatile("ld.global.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(global) : "memory");
  return v;
}
// Brings a line to the L2 cache.
__device__ __forceinline__ void prefetch(const void* global) { asm volatile("prefetch.global.L2 [%0];" ::"l"(global)); }
__device__ __forceinline__ void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int Pending>  // all groups of this lane but the last `Pending` have arrived
__device__ __forceinline__ void copy_wait() { asm volatile("cp.async.wait_group %0;" ::"n"(Pending) : "memory"); }

// A kernel that was launched early waits here for all kernels before it in the stream, and sees what they wrote; any other passes.
__device__ __forceinline__ void wait_for_previous() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
// From here on the next kernel may start, if it was launched early. Call wait_for_previous() first: then that kernel, too, may read
// from its first instruction on whatever was complete before this one.
__device__ __forceinline__ void release_next() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// (q & mask) | bits in one instruction.
__device__ __forceinline__ uint32_t and_or(uint32_t q, uint32_t mask, uint32_t bits) {
  uint32_t r;
  asm("lop3.b32 %0, %1, %2, %3, 0xEA;" : "=r"(r) : "r"(q), "r"(mask), "r"(bits));
  return r;
}
// (q & mask) ^ bits likewise.
__device__ __forceinline__ uint32_t and_xor(uint32_t q, uint32_t mask, uint32_t bits) {
  uint32_t r;
  asm("lop3.b32 %0, %1, %2, %3, 0x6A;" : "=r"(r) : "r"(q), "r"(mask), "r"(bits));
  return r;
}
// The lower half of (high, low) >> bits, bits in 0..32.
__device__ __forceinline__ uint32_t funnel_right(uint32_t low, uint32_t high, uint32_t bits) { return __funnelshift_rc(low, high, bits); }
// Digits of the selector from 8 on give the sign of a byte; __byte_perm would ignore that bit.
__device__ __forceinline__ uint32_t byte_permute(uint32_t a, uint32_t b, uint32_t selector) {
  uint32_t r;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(r) : "r"(a), "r"(b), "r"(selector));
  return r;
}

__device__ __forceinline__ float f16_to_float(uint16_t v) { return __half2float(__ushort_as_half(v)); }
__device__ __forceinline__ uint16_t float_to_f16(float v) { return __half_as_ushort(__float2half_rn(v)); }
__device__ __forceinline__ uint16_t float_to_bf16(float v) { return __bfloat16_as_ushort(__float2bfloat16_rn(v)); }
__device__ __forceinline__ uint32_t subtract_bf16x2(uint32_t a, uint32_t b) {
  const __nv_bfloat162 r = __hsub2(*reinterpret_cast<__nv_bfloat162*>(&a), *reinterpret_cast<__nv_bfloat162*>(&b));
  return *reinterpret_cast<const uint32_t*>(&r);
}
__device__ __forceinline__ uint32_t subtract_f16x2(uint32_t a, uint32_t b) {
  const __half2 r = __hsub2(*reinterpret_cast<__half2*>(&a), *reinterpret_cast<__half2*>(&b));
  return *reinterpret_cast<const uint32_t*>(&r);
}

// Launch `kernel` with `shared` bytes of dynamic shared memory, from sm_90 on before the kernel in front of it has ended: every kernel
// calls wait_for_previous() before it touches what that one may have written or may still read.
template <class... Parameters, class... Arguments>
int launch(void (*kernel)(Parameters...), dim3 grid, int threads, int shared, void* stream, Arguments... arguments) {
  if (shared > 48 * 1024) {  // beyond what every launch may use; setting it again costs little and keeps no state here
    const cudaError_t e = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
    if (e != cudaSuccess) return e;
  }
  cudaFuncAttributes compiled;  // only code with the wait in it: PTX of an older architecture runs on this one without
  const cudaError_t e = cudaFuncGetAttributes(&compiled, kernel);
  if (e != cudaSuccess) return e;
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid, config.blockDim = dim3(static_cast<unsigned>(threads)), config.dynamicSmemBytes = static_cast<std::size_t>(shared);
  config.stream = static_cast<cudaStream_t>(stream), config.attrs = &attribute, config.numAttrs = compiled.ptxVersion >= 90;
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}

}  // namespace calora::cuda
#endif

namespace calora::cuda {

inline Geometry geometry_of(const PackedWeight& w) {
  return geometry(static_cast<Pattern>(w.pattern), static_cast<Values>(w.values), w.in_features, w.out_features, w.group_size);
}
// Rows that t is padded to.
__device__ __forceinline__ int64_t padded_rows(int64_t m) { return (m + kBatchAlign - 1) / kBatchAlign * kBatchAlign; }
__device__ __forceinline__ float bits_to_float(uint32_t v) { return __uint_as_float(v); }
__device__ __forceinline__ float bf16_to_float(uint16_t v) { return __uint_as_float(static_cast<uint32_t>(v) << 16); }
__device__ __forceinline__ uint32_t pair(uint16_t low, uint16_t high) { return low | static_cast<uint32_t>(high) << 16; }

// The 16-bit types that x comes in. Codes become "base + code" by setting the bits of a power of two whose last bit counts 1. kCodeMask
// and the like are for codes that bytes have in bits 3..6: "16 + code" there.
struct Bf16 {
  static constexpr Dtype kDtype = Dtype::bf16;
  static constexpr uint32_t kOnes = 0x3f803f80, kSixteen = 0x41804180, kCodeMask = 0x00780078, kTwentyFour = 0x41c041c0;
  static constexpr uint32_t kBaseBits = 0x43004300;
  static constexpr float kBase = 128;
  static constexpr int kCodeShift = 3;  // a nibble at bits 3..6 counts in units of 1 when the exponent is that of 16
  static constexpr int kMantissa = 7, kBias = 127;
  static constexpr double kBookUnit = 1.5245361328125;  // see Nf4
  static __device__ __forceinline__ float to_float(uint16_t v) { return bf16_to_float(v); }
  static __device__ __forceinline__ uint16_t from_float(float v) { return float_to_bf16(v); }
  static __device__ __forceinline__ uint32_t subtract(uint32_t a, uint32_t b) { return subtract_bf16x2(a, b); }
};
struct F16 {
  static constexpr Dtype kDtype = Dtype::f16;
  static constexpr uint32_t kOnes = 0x3c003c00, kSixteen = 0x4c004c00, kCodeMask = 0x03c003c0, kTwentyFour = 0x4e004e00;
  static constexpr uint32_t kBaseBits = 0x64006400;
  static constexpr float kBase = 1024;
  static constexpr int kCodeShift = 6, kMantissa = 10, kBias = 15;
  static constexpr double kBookUnit = 1.8868408203125;
  static __device__ __forceinline__ float to_float(uint16_t v) { return f16_to_float(v); }
  static __device__ __forceinline__ uint16_t from_float(float v) { return float_to_f16(v); }
  static __device__ __forceinline__ uint32_t subtract(uint32_t a, uint32_t b) { return subtract_f16x2(a, b); }
};

// Element i of an array of one of the 16-bit dtypes, or of any of the three.
__device__ __forceinline__ float load16(const void* p, int64_t i, Dtype dtype) {
  const uint16_t v = static_cast<const uint16_t*>(p)[i];
  return dtype == Dtype::bf16 ? bf16_to_float(v) : f16_to_float(v);
}
__device__ __forceinline__ float load(const void* p, int64_t i, Dtype dtype) {
  return dtype == Dtype::f32 ? static_cast<const float*>(p)[i] : load16(p, i, dtype);
}

}  // namespace calora::cuda
