// Where the outputs of a memory-bound op go: into huge pages when they are new (`use_huge_pages` of ops.h), past the
// caches when they are large.
#pragma once

#include "../ops.h"

namespace llama_fast::cpu {

// Whether outputs of this many bytes in all are written past the caches.
bool should_stream(int64_t bytes);

}  // namespace llama_fast::cpu
