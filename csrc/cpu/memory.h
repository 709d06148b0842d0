// Where outputs go: past the caches when they would not stay there, into huge pages when they are new.
#pragma once

#include <cstdint>

namespace llama_fast::cpu {

// Whether outputs of this many bytes in all are written past the caches.
bool should_stream(int64_t bytes);

}  // namespace llama_fast::cpu
