// A fiber: a stack of its own and the place where its code was left.
//
// Switching is twelve instructions on x86-64. The portable form, ucontext, saves the signal mask with a system call at
// every switch and is some fifty times slower.
#pragma once

#include <cstddef>

#if !defined(__x86_64__) || defined(CMFAST_PORTABLE_FIBERS)
#define CMFAST_UCONTEXT 1
#include <ucontext.h>
#endif

namespace cmfast::emulation {

struct Fiber {
#ifdef CMFAST_UCONTEXT
  ucontext_t context;
#else
  void* stack_pointer = nullptr;
#endif
  const void* stack_bottom = nullptr;  // the lowest address; null until known for the fiber that the program started on
  size_t stack_bytes = 0;
};

// Make `fiber` start at `entry` on the stack given, at the next switch to it. `entry` never returns.
void prepare(Fiber& fiber, void (*entry)(), void* stack_bottom, size_t stack_bytes);

// Leave `from`, which is running, and continue `to`. With `leaves`, `from` is never continued.
void switch_fiber(Fiber& from, Fiber& to, bool leaves);

// The first thing that `entry` calls, for the address sanitizer's book-keeping.
void entered();

}  // namespace cmfast::emulation
