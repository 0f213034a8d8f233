// AVX2 + FMA + F16C: any x86 since 2013 (Haswell, Zen).
#include "simd_avx2.h"

#include "rung.h"

namespace calora {

constinit const Kernels kAvx2 = rung<Simd>("avx2");

}  // namespace calora
