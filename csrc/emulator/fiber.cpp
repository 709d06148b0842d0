#undef _FORTIFY_SOURCE  // its longjmp refuses to jump between stacks
#include "fiber.h"

#include <new>
#include <sys/mman.h>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

namespace llama_fast::emulator {
namespace {

constexpr size_t kStack = 128 << 10;  // pages are committed when touched
constexpr size_t kGuard = 4 << 10;

thread_local Fiber* came_from = nullptr;
thread_local Fiber* starting = nullptr;

}  // namespace

Fiber::~Fiber() {
  if (stack_ != nullptr) munmap(stack_, kGuard + kStack);
}

void Fiber::start(void (*entry)()) {
  if (stack_ == nullptr) {
    void* p =
        mmap(nullptr, kGuard + kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED) throw std::bad_alloc();
    stack_ = static_cast<char*>(p);
    mprotect(stack_, kGuard, PROT_NONE);
  }
  stack_bottom_ = stack_ + kGuard;
  stack_size_ = kStack;
  getcontext(&first_);
  first_.uc_stack.ss_sp = stack_ + kGuard;
  first_.uc_stack.ss_size = kStack;
  first_.uc_link = nullptr;
  makecontext(&first_, &Fiber::first_steps, 0);
  entry_ = entry;
}

void Fiber::first_steps() {
  void (*entry)() = starting->entry_;
  starting->entry_ = nullptr;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &came_from->stack_bottom_, &came_from->stack_size_);
#endif
  entry();
}

void Fiber::jump(Fiber& from, Fiber& to) {
  came_from = &from;
#if defined(__SANITIZE_ADDRESS__)
  void* fake = nullptr;
  __sanitizer_start_switch_fiber(&fake, to.stack_bottom_, to.stack_size_);
#endif
  if (_setjmp(from.state_) == 0) {
    if (to.entry_ != nullptr) {
      starting = &to;
      setcontext(&to.first_);
    }
    _longjmp(to.state_, 1);
  }
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fake, &came_from->stack_bottom_, &came_from->stack_size_);
#endif
}

}  // namespace llama_fast::emulator
