#include "isa.h"

#ifdef __x86_64__
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <atomic>
#include <cstdlib>
#include <cstring>

namespace cmfast {
namespace {

bool always() { return true; }

#ifdef __x86_64__
bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }

bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}

// Zen 4, Sapphire Rapids, Cooper Lake and newer.
bool has_avx512bf16() { return has_avx512() && __builtin_cpu_supports("avx512bf16"); }

#ifndef CMFAST_TILE_TWIN
// Sapphire Rapids and newer, where Linux (5.16 or newer) gives the process leave to use tiles, which it is asked for once.
bool has_amx() {
  static const bool granted = [] {
    unsigned a, b, c, d;
    constexpr unsigned amx_bf16 = 1u << 22, amx_tile = 1u << 24;
    if (!has_avx512bf16() || !__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d & amx_bf16) || !(d & amx_tile)) return false;
    constexpr long request_permission = 0x1023, tile_data = 18;
    return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
  }();
  return granted;
}
#endif
#endif

// The layouts that kernels/pack.cpp writes.
constexpr const char *PANELS = "panels of 48", *TILED = "panels of 48, of bfloat16 tiles";

// The kernels of an instruction set; those without products are another's, `plain`.
#define CMFAST_ENTRY(isa, plain, layout, tiles, runs_here)                                                            \
  {#isa,                                                                                                              \
   layout,                                                                                                            \
   tiles,                                                                                                             \
   runs_here,                                                                                                         \
   plain::consistency_step,                                                                                           \
   plain::consistency_step_backward,                                                                                  \
   plain::group_norm,                                                                                                 \
   plain::group_norm_backward,                                                                                        \
   isa::attention,                                                                                                    \
   plain::attention_backward,                                                                                         \
   isa::conv2d,                                                                                                       \
   isa::pack,                                                                                                         \
   plain::moments,                                                                                                    \
   plain::fold_group_norm,                                                                                            \
   plain::channel_norm,                                                                                                \
   plain::timestep_embedding}

const Kernels* find(const char* name) {
  for (int i = 0; i < KERNELS_COUNT; ++i)
    if ((!name || !std::strcmp(ALL_KERNELS[i].name, name)) && ALL_KERNELS[i].runs_here()) return &ALL_KERNELS[i];
  return nullptr;
}

std::atomic<const Kernels*> chosen{nullptr};

}  // namespace

const Kernels ALL_KERNELS[] = {
#ifdef __x86_64__
#ifndef CMFAST_TILE_TWIN
    CMFAST_ENTRY(amx, avx512, TILED, true, has_amx),
#endif
    CMFAST_ENTRY(avx512bf16, avx512, PANELS, false, has_avx512bf16),
    CMFAST_ENTRY(avx512, avx512, PANELS, false, has_avx512),
    CMFAST_ENTRY(avx2, avx2, PANELS, false, has_avx2),
#endif
    CMFAST_ENTRY(portable, portable, PANELS, false, always),
#ifdef CMFAST_TILE_TWIN
    CMFAST_ENTRY(amx, portable, TILED, true, always),
#endif
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
