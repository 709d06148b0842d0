// Where the outputs of a memory-bound op go: into huge pages when they are new, past the caches when they are large.
#pragma once

#include "../ops.h"

namespace llama_fast::cpu {

// Asks for huge pages under the outputs of 4 MB and more: one that the allocator has just taken from the system is then
// faulted in by 2 MB instead of 4 kB. Advice only (madvise on Linux, nothing elsewhere); contents are not touched.
void use_huge_pages(const Tensor& out);

// Whether outputs of this many bytes in all are written past the caches.
bool should_stream(int64_t bytes);

}  // namespace llama_fast::cpu
