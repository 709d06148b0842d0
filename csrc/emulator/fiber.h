// A stack of its own for each CUDA thread, and the jump from one to another. Portable: ucontext makes the stack,
// _setjmp and _longjmp switch without a system call. A fiber never moves to another OS thread.
#pragma once

#include <csetjmp>
#include <cstddef>
#include <ucontext.h>

namespace llama_fast::emulator {

class Fiber {
 public:
  Fiber() = default;
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;
  ~Fiber();

  // The first jump to this fiber calls entry(), which must not return. Allocates the stack once; a fiber that was left
  // in the middle of something may be started anew.
  void start(void (*entry)());

  // Leaves `from`, the running fiber, for `to`; returns when something jumps back to `from`. The OS thread's own stack
  // is a Fiber on which start() was never called.
  static void jump(Fiber& from, Fiber& to);

 private:
  static void first_steps();

  jmp_buf state_;
  ucontext_t first_;
  void (*entry_)() = nullptr;  // of a fiber that has not run yet
  char* stack_ = nullptr;
  const void* stack_bottom_ =
      nullptr;  // what AddressSanitizer is told; of the OS thread's stack, learnt on the first jump
  size_t stack_size_ = 0;
};

}  // namespace llama_fast::emulator
