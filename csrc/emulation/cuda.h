// CUDA as a host compiler can read it: the words, the built-in variables and the functions that kernels use.
#pragma once

#include <cstdint>

#include "scheduler.h"
#include "types.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __restrict__ __restrict

#define threadIdx (::cmfast::emulation::thread_index)
#define blockIdx (::cmfast::emulation::block_index)
#define blockDim (::cmfast::emulation::block_size)
#define gridDim (::cmfast::emulation::grid_size)

namespace cmfast::emulation {

// A shuffle in two values: what a lane gives, and the lane whose value it takes.
template <class T>
struct Shuffle {
  T given, taken;
  unsigned source;
};

template <class T>
T shuffle(const char* operation, uint32_t mask, T value, unsigned source, Place place) {
  Shuffle<T> own{value, value, source};
  collective(
      operation, mask, &own,
      [](void* const(&arguments)[32], uint32_t mask) {
        for (unsigned i = 0; i < 32; ++i) {
          if (!(mask >> i & 1)) continue;
          auto* lane = static_cast<Shuffle<T>*>(arguments[i]);
          // What a lane outside the mask holds is undefined.
          if (mask >> lane->source & 1) lane->taken = static_cast<Shuffle<T>*>(arguments[lane->source])->given;
          else std::memset(&lane->taken, 0xff, sizeof(T));
        }
      },
      place);
  return own.taken;
}

struct Vote {
  bool given;
  uint32_t ballot;
};

inline uint32_t ballot(const char* operation, uint32_t mask, bool given, Place place) {
  Vote own{given, 0};
  collective(
      operation, mask, &own,
      [](void* const(&arguments)[32], uint32_t mask) {
        uint32_t ballot = 0;
        for (unsigned i = 0; i < 32; ++i)
          if (mask >> i & 1 && static_cast<Vote*>(arguments[i])->given) ballot |= 1u << i;
        for (unsigned i = 0; i < 32; ++i)
          if (mask >> i & 1) static_cast<Vote*>(arguments[i])->ballot = ballot;
      },
      place);
  return own.ballot;
}

}  // namespace cmfast::emulation

#define CMFAST_PLACE ::cmfast::emulation::Place place = ::cmfast::emulation::Place::here()

inline void __syncthreads(CMFAST_PLACE) { cmfast::emulation::sync_block(place); }
inline void __syncwarp(unsigned mask = 0xffffffffu, CMFAST_PLACE) {
  cmfast::emulation::collective("__syncwarp", mask, nullptr, [](void* const(&)[32], uint32_t) {}, place);
}

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32, CMFAST_PLACE) {
  unsigned lane = cmfast::emulation::lane(), first = lane & ~(width - 1u);
  return cmfast::emulation::shuffle("__shfl_sync", mask, value, first + (source & (width - 1)), place);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = 32, CMFAST_PLACE) {
  unsigned lane = cmfast::emulation::lane(), other = lane ^ lanes;
  bool beyond = other >= (lane & ~(width - 1u)) + width;  // a lane before the segment may be read, one after it not
  return cmfast::emulation::shuffle("__shfl_xor_sync", mask, value, beyond ? lane : other, place);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, CMFAST_PLACE) {
  unsigned lane = cmfast::emulation::lane();
  bool beyond = (lane & (width - 1u)) + delta >= static_cast<unsigned>(width);
  return cmfast::emulation::shuffle("__shfl_down_sync", mask, value, beyond ? lane : lane + delta, place);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, CMFAST_PLACE) {
  unsigned lane = cmfast::emulation::lane();
  bool beyond = (lane & (width - 1u)) < delta;
  return cmfast::emulation::shuffle("__shfl_up_sync", mask, value, beyond ? lane : lane - delta, place);
}
inline unsigned __ballot_sync(unsigned mask, bool value, CMFAST_PLACE) {
  return cmfast::emulation::ballot("__ballot_sync", mask, value, place);
}
inline bool __any_sync(unsigned mask, bool value, CMFAST_PLACE) {
  return cmfast::emulation::ballot("__any_sync", mask, value, place) != 0;
}
inline bool __all_sync(unsigned mask, bool value, CMFAST_PLACE) {
  return cmfast::emulation::ballot("__all_sync", mask, value, place) == mask;
}

// One thread runs at a time, and none is interrupted.
template <class T>
T atomicAdd(T* address, T value) {
  T old = *address;
  *address = old + value;
  return old;
}
template <class T>
T atomicMax(T* address, T value) {
  T old = *address;
  *address = std::max(old, value);
  return old;
}
template <class T>
T atomicCAS(T* address, T expected, T value) {
  T old = *address;
  if (old == expected) *address = value;
  return old;
}
inline void __threadfence() {}
inline void __threadfence_block() {}
[[noreturn]] inline void __trap(CMFAST_PLACE) { cmfast::emulation::abort_launch("__trap()", place); }
