// Which rungs this processor runs, and which one is in use. CALORA_ISA caps the choice when the library is loaded.
#include <cstdlib>
#include <cstring>

#include "../kernels.h"

namespace calora {
namespace {

struct Rung { const Kernels* kernels; bool runnable; };

constexpr int kMaxRungs = 5;

// Slowest first. __builtin_cpu_supports also asks the operating system whether it saves the wide registers.
int rungs(Rung (&out)[kMaxRungs]) {
  int n = 0;
  out[n++] = {&kReference, true};
#ifdef CALORA_X86
  __builtin_cpu_init();
#define HAS(feature) (__builtin_cpu_supports(feature) != 0)
  const bool avx2 = HAS("avx2") && HAS("fma") && HAS("f16c"), avx_vnni = avx2 && HAS("avxvnni");
  const bool avx512 = avx2 && HAS("avx512f") && HAS("avx512bw") && HAS("avx512vl") && HAS("avx512dq");
  const bool vnni = avx512 && HAS("avx512vnni");
  out[n++] = {&kAvx2, avx2};
  out[n++] = {avx_vnni ? &kAvx2Vnni : &kAvx2VnniEvex, avx_vnni || vnni};
  out[n++] = {&kAvx512, avx512};
  out[n++] = {&kAvx512Vnni, vnni && HAS("avx512vbmi2") && HAS("avx512bf16")};
#undef HAS
#endif
  return n;
}

// The fastest runnable rung that is not above the cap. An unknown name is no cap here; ops.py refuses it by name.
const Kernels* choose() {
  Rung all[kMaxRungs];
  const int n = rungs(all);
  const char* cap = std::getenv("CALORA_ISA");
  const Kernels* best = &kReference;
  for (int i = 0; i < n; ++i) {
    if (all[i].runnable) best = all[i].kernels;
    if (cap && !std::strcmp(cap, all[i].kernels->isa)) break;
  }
  return best;
}

const Kernels*& current() {
  static const Kernels* rung = choose();
  return rung;
}

}  // namespace

int available_rungs(const Kernels** out, int capacity) {
  Rung all[kMaxRungs];
  const int n = rungs(all);
  int count = 0;
  for (int i = 0; i < n; ++i)
    if (all[i].runnable && count < capacity) out[count++] = all[i].kernels;
  return count;
}

const Kernels& kernels() { return *current(); }

bool select_rung(const char* isa) {
  Rung all[kMaxRungs];
  const int n = rungs(all);
  for (int i = 0; i < n; ++i)
    if (all[i].runnable && !std::strcmp(isa, all[i].kernels->isa)) {
      current() = all[i].kernels;
      return true;
    }
  return false;
}

}  // namespace calora
