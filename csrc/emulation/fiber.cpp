#include "fiber.h"

#include <cstdint>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/common_interface_defs.h>
#endif

namespace cmfast::emulation {

#ifdef __SANITIZE_ADDRESS__
namespace {

// The fiber that is being left while a switch is under way.
Fiber* left;

void arrive(void* fake_stack) {
  const void* bottom;
  size_t bytes;
  __sanitizer_finish_switch_fiber(fake_stack, &bottom, &bytes);
  if (!left->stack_bottom) {
    left->stack_bottom = bottom;
    left->stack_bytes = bytes;
  }
}

}  // namespace

void entered() { arrive(nullptr); }
#else
void entered() {}
#endif

#ifdef CMFAST_UCONTEXT

void prepare(Fiber& fiber, void (*entry)(), void* bottom, size_t bytes) {
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = bottom;
  fiber.context.uc_stack.ss_size = bytes;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, entry, 0);
  fiber.stack_bottom = bottom;
  fiber.stack_bytes = bytes;
}

static void exchange(Fiber& from, Fiber& to) { swapcontext(&from.context, &to.context); }

#else

// The System V ABI asks that a call keeps rbx, rbp, r12 to r15 and the stack pointer; the compiler saves the rest.
extern "C" void cmfast_exchange_stacks(void** save, void* stack_pointer);
asm(R"(
.text
.type cmfast_exchange_stacks, @function
.hidden cmfast_exchange_stacks
.globl cmfast_exchange_stacks
cmfast_exchange_stacks:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size cmfast_exchange_stacks, .-cmfast_exchange_stacks
)");

void prepare(Fiber& fiber, void (*entry)(), void* bottom, size_t bytes) {
  auto top = (reinterpret_cast<uintptr_t>(bottom) + bytes) & ~uintptr_t{15};
  auto* words = reinterpret_cast<void**>(top) - 2;  // `ret` leaves the stack pointer 8 past a multiple of 16, as a call
  words[1] = nullptr;                               // no caller
  words[0] = reinterpret_cast<void*>(entry);
  for (int i = 1; i <= 6; ++i) words[-i] = nullptr;
  fiber.stack_pointer = words - 6;
  fiber.stack_bottom = bottom;
  fiber.stack_bytes = bytes;
}

static void exchange(Fiber& from, Fiber& to) { cmfast_exchange_stacks(&from.stack_pointer, to.stack_pointer); }

#endif

void switch_fiber(Fiber& from, Fiber& to, [[maybe_unused]] bool leaves) {
#ifdef __SANITIZE_ADDRESS__
  void* fake_stack = nullptr;
  left = &from;
  __sanitizer_start_switch_fiber(leaves ? nullptr : &fake_stack, to.stack_bottom, to.stack_bytes);
  exchange(from, to);
  arrive(fake_stack);
#else
  exchange(from, to);
#endif
}

}  // namespace cmfast::emulation
