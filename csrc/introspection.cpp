#include "introspection.h"

#include "cuda/thresholds.h"
#include "kernels.h"

namespace calora {
namespace {
struct Constant { const char* name; int64_t value; };
constexpr Constant kConstants[kLayoutConstants] = {
    {"layout_version", kLayoutVersion}, {"tile_rows", kTileRows},     {"column_align", kColumnAlign}, {"tile_align", kTileAlign},
    {"scale_bytes", kScaleBytes},       {"zero_bytes", kZeroBytes},   {"int4_zero", kInt4Zero},
};
}  // namespace

const char* isa_name() { return kernels().isa; }
bool set_isa(const char* isa) { return select_rung(isa); }

int isa_available(const char** names, int capacity) {
  const Kernels* rungs[8];
  const int n = available_rungs(rungs, capacity < 8 ? capacity : 8);
  for (int i = 0; i < n; ++i) names[i] = rungs[i]->isa;
  return n;
}

int cpu_features(const char** names, int capacity) {
  int n = 0;
#if defined(__x86_64__)
  __builtin_cpu_init();
#define CALORA_FEATURE(name) \
  if (n < capacity && __builtin_cpu_supports(name)) names[n++] = name;
  CALORA_FEATURE("avx2") CALORA_FEATURE("fma") CALORA_FEATURE("avxvnni") CALORA_FEATURE("avx512f") CALORA_FEATURE("avx512bw")
  CALORA_FEATURE("avx512vl") CALORA_FEATURE("avx512dq") CALORA_FEATURE("avx512vnni") CALORA_FEATURE("avx512vbmi2")
  CALORA_FEATURE("avx512bf16")
#undef CALORA_FEATURE
#endif
  (void)names, (void)capacity;
  return n;
}

const char* build_info() {
#if defined(__clang__)
  return "clang " __clang_version__;
#else
  return "gcc " __VERSION__;
#endif
}

const char* cuda_architectures() {
#ifdef CALORA_CUDA_ARCHS
  return CALORA_CUDA_ARCHS;
#else
  return "";
#endif
}

int64_t fused_rows(int architecture, int format) {
  return cuda::fused_rows(architecture, static_cast<Pattern>(format / 16), static_cast<Values>(format % 16));
}

const char* layout_constant_name(int i) { return kConstants[i].name; }
int64_t layout_constant(int i) { return kConstants[i].value; }

void packed_bytes(int format, int64_t in_features, int64_t out_features, int64_t group_size, int64_t* packed, int64_t* zeros,
                  int64_t* offsets, int64_t* scales) {
  const Geometry g = geometry(static_cast<Pattern>(format / 16), static_cast<Values>(format % 16), in_features, out_features, group_size);
  *packed = g.bytes();
  *zeros = g.zeros_bytes();
  *offsets = g.offsets_bytes();
  *scales = g.scales_bytes();
}

}  // namespace calora
