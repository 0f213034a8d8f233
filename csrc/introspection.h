// What libcalora.so tells _native: plain C++ types, default visibility.
#pragma once
#include <cstdint>

#define CALORA_EXPORT __attribute__((visibility("default")))

namespace calora {

CALORA_EXPORT const char* isa_name();
CALORA_EXPORT bool set_isa(const char* isa);
CALORA_EXPORT int isa_available(const char** names, int capacity);
CALORA_EXPORT int cpu_features(const char** names, int capacity);
CALORA_EXPORT const char* build_info();
CALORA_EXPORT const char* cuda_architectures();
CALORA_EXPORT int64_t fused_rows(int architecture, int format);

constexpr int kLayoutConstants = 7;
CALORA_EXPORT const char* layout_constant_name(int i);
CALORA_EXPORT int64_t layout_constant(int i);
CALORA_EXPORT void packed_bytes(int format, int64_t in_features, int64_t out_features, int64_t group_size, int64_t* packed,
                                int64_t* zeros, int64_t* offsets, int64_t* scales);

}  // namespace calora
