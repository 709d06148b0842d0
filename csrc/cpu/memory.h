// Where the outputs of a memory-bound op go: into huge pages when they are new (`use_huge_pages` of ops.h), past the
// caches when they are large. And the memory that a kernel works in.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <new>

#include "../ops.h"

namespace llama_fast::cpu {

// Whether outputs of this many bytes in all are written past the caches.
bool should_stream(int64_t bytes);

// Uninitialised memory for `count` T, aligned to a cache line. By hand: glibc's aligned_alloc looks for more than it
// then takes, so what one call frees does not serve the next of that size, once something small lies beside it.
template <class T>
class Scratch {
 public:
  explicit Scratch(int64_t count) : memory_(std::malloc(static_cast<size_t>(count) * sizeof(T) + 128)) {
    if (memory_ == nullptr) throw std::bad_alloc();
    data_ = reinterpret_cast<T*>((reinterpret_cast<uintptr_t>(memory_) + 63) / 64 * 64);
  }
  ~Scratch() { std::free(memory_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  T* data() const { return data_; }

 private:
  void* memory_;
  T* data_;
};

}  // namespace llama_fast::cpu
