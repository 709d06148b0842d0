// Where the outputs of a memory-bound op go: into huge pages when they are new (`use_huge_pages` of ops.h), past the
// caches when they are large. And the memory that a kernel works in.
#pragma once

#include <cstdlib>
#include <new>

#include "../ops.h"

namespace llama_fast::cpu {

// Whether outputs of this many bytes in all are written past the caches.
bool should_stream(int64_t bytes);

// Uninitialised memory for `count` T, aligned to a cache line.
template <class T>
class Scratch {
 public:
  explicit Scratch(int64_t count)
      : data_(static_cast<T*>(std::aligned_alloc(64, (static_cast<size_t>(count) * sizeof(T) + 127) / 64 * 64))) {
    if (data_ == nullptr) throw std::bad_alloc();
  }
  ~Scratch() { std::free(data_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  T* data() const { return data_; }

 private:
  T* data_;
};

}  // namespace llama_fast::cpu
