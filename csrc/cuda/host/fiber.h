// Switching between stacks: a few instructions on x86-64, ucontext elsewhere (whose switch is two
// system calls).
#pragma once

#include <cstddef>
#include <cstdint>

#ifdef __x86_64__

namespace quantkit::cuda::twin {

struct Fiber {
  void* stack_pointer = nullptr;
};

extern "C" void qk_twin_switch(void** save, void* load);
// Saves the registers that the System V ABI makes a callee keep, and the return address.
asm(R"(
  .text
  .type qk_twin_switch, @function
qk_twin_switch:
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
  .size qk_twin_switch, . - qk_twin_switch
)");

inline void switch_fiber(Fiber& from, Fiber& to) {
  qk_twin_switch(&from.stack_pointer, to.stack_pointer);
}

// `entry` must not return.
inline void start_fiber(Fiber& fiber, char* stack, size_t bytes, void (*entry)()) {
  // As after a call: the stack pointer is 8 below a multiple of 16 when entry begins.
  auto* top = reinterpret_cast<uintptr_t*>(
      (reinterpret_cast<uintptr_t>(stack) + bytes) / 16 * 16);
  *--top = 0;  // entry's return address, never used
  *--top = reinterpret_cast<uintptr_t>(entry);
  for (int i = 0; i < 6; ++i) *--top = 0;
  fiber.stack_pointer = top;
}

}  // namespace quantkit::cuda::twin

#else

#include <ucontext.h>

namespace quantkit::cuda::twin {

struct Fiber {
  ucontext_t context;
};

inline void switch_fiber(Fiber& from, Fiber& to) { swapcontext(&from.context, &to.context); }

inline void start_fiber(Fiber& fiber, char* stack, size_t bytes, void (*entry)()) {
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = stack;
  fiber.context.uc_stack.ss_size = bytes;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, entry, 0);
}

}  // namespace quantkit::cuda::twin

#endif
