// AVX-512 with VNNI, VBMI2 and BF16: Zen 4 and later, Sapphire Rapids and later.
#include "simd_avx512.h"

#include "rung.h"

namespace calora {

constinit const Kernels kAvx512Vnni = rung<Simd>("avx512-vnni");

}  // namespace calora
