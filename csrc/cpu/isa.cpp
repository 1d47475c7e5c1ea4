#include "isa.h"

#include <atomic>
#include <cstdlib>
#include <cstring>

namespace cmfast {
namespace {

bool always() { return true; }

#ifdef __x86_64__
bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }

// Zen 4, Sapphire Rapids, Cooper Lake and newer. AVX-512 without BF16 is served by AVX2.
bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512bf16");
}
#endif

// The layout that kernels/pack.cpp writes.
constexpr const char* PANELS = "panels of 48";

#define CMFAST_ENTRY(isa, layout, runs_here)                                                                   \
  {#isa,             layout,                   runs_here,      isa::consistency_step, isa::consistency_step_backward, \
   isa::group_norm,  isa::group_norm_backward, isa::attention, isa::attention_backward, isa::conv2d,                  \
   isa::pack,        isa::moments,             isa::fold_group_norm, isa::channel_norm}

const Kernels* find(const char* name) {
  for (int i = 0; i < KERNELS_COUNT; ++i)
    if ((!name || !std::strcmp(ALL_KERNELS[i].name, name)) && ALL_KERNELS[i].runs_here()) return &ALL_KERNELS[i];
  return nullptr;
}

std::atomic<const Kernels*> chosen{nullptr};

}  // namespace

const Kernels ALL_KERNELS[] = {
#ifdef __x86_64__
    CMFAST_ENTRY(avx512, PANELS, has_avx512),
    CMFAST_ENTRY(avx2, PANELS, has_avx2),
#endif
    CMFAST_ENTRY(portable, PANELS, always),
};
const int KERNELS_COUNT = sizeof ALL_KERNELS / sizeof *ALL_KERNELS;

const Kernels* kernels() {
  const Kernels* found = chosen.load(std::memory_order_relaxed);
  if (!found) {
    const char* name = std::getenv("CMFAST_CPU_ISA");
    found = find(name && *name ? name : nullptr);
    chosen.store(found, std::memory_order_relaxed);
  }
  return found;
}

bool set_isa(const char* name) {
  const Kernels* found = find(name);
  if (found) chosen.store(found, std::memory_order_relaxed);
  return found;
}

}  // namespace cmfast
