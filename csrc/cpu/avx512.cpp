// AVX-512 F/BW/VL/DQ without VNNI: Skylake-X and its servers.
#include "simd_avx512.h"

#include "rung.h"

namespace calora {

constinit const Kernels kAvx512 = rung<Simd>("avx512");

}  // namespace calora
