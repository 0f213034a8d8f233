// AVX2 + AVX-VNNI: Intel laptops since 2021 (Alder Lake). Compiled twice: the second object spells the same 256-bit
// instructions in EVEX (AVX512-VNNI + VL) for processors that have VNNI only there (Ice Lake, Zen 4), which also makes this
// rung testable on them.
#include "simd_avx2.h"

#include "rung.h"

namespace calora {

#ifdef CALORA_EVEX
constinit const Kernels kAvx2VnniEvex = rung<Simd>("avx2-vnni");
#else
constinit const Kernels kAvx2Vnni = rung<Simd>("avx2-vnni");
#endif

}  // namespace calora
