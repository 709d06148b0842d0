// Global memory as kernels see it: tensors that have been made known to them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <utility>

#include "pointer.h"
#include "race.h"

namespace llama_fast::emulator {

// Makes the bytes known to kernels. The result is the same address with the tensor's number in its upper 16 bits: host
// code must not use it, kernels reach nothing else with it than these bytes. `label` names the tensor in reports.
void* map_global(const void* data, size_t bytes, std::string label);
void unmap_global(const void* mapped);

// The race checker's part of an access by `actor`, a thread or an agent that `thread` has started.
void check_global(uint64_t address, size_t bytes, int thread, int actor, Clock clock, Use use, const char* op);

// RAII of map_global.
class Mapping {
 public:
  Mapping() = default;
  Mapping(const void* data, size_t bytes, std::string label) : mapped_(map_global(data, bytes, std::move(label))) {}
  Mapping(Mapping&& other) noexcept : mapped_(other.mapped_) { other.mapped_ = nullptr; }
  Mapping& operator=(Mapping&& other) noexcept {
    std::swap(mapped_, other.mapped_);
    return *this;
  }
  ~Mapping() {
    if (mapped_ != nullptr) unmap_global(mapped_);
  }
  void* data() const { return mapped_; }

 private:
  void* mapped_ = nullptr;
};

}  // namespace llama_fast::emulator
