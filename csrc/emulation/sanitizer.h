// What the address sanitizer is told; nothing in other builds.
#pragma once

#include <cstddef>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#endif

namespace cmfast::emulation {

#ifdef __SANITIZE_ADDRESS__
inline void forbid(void* memory, size_t bytes) { __asan_poison_memory_region(memory, bytes); }
inline void allow(void* memory, size_t bytes) { __asan_unpoison_memory_region(memory, bytes); }
#else
inline void forbid(void*, size_t) {}
inline void allow(void*, size_t) {}
#endif

}  // namespace cmfast::emulation
