// Advice to the system about the pages of outputs, and the size from which outputs bypass the caches.
#include "memory.h"

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace llama_fast::cpu {

void use_huge_pages(const Tensor& out) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kLeast = 4 << 20;  // of less than two huge pages, alignment leaves one or none
  if (out.data == nullptr) return;
  int64_t span = 1;  // elements from the first to the last
  for (int i = 0; i < out.ndim; ++i) {
    if (out.size[i] == 0) return;
    span += (out.size[i] - 1) * out.stride[i];
  }
  const auto item = static_cast<uintptr_t>(out.dtype == DType::f32 ? 4 : 2);
  const uintptr_t page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  const uintptr_t data = reinterpret_cast<uintptr_t>(out.data), end = data + static_cast<uintptr_t>(span) * item;
  const uintptr_t begin = (data + page - 1) / page * page;
  if (end < begin + kLeast) return;
  madvise(reinterpret_cast<void*>(begin), end / page * page - begin, MADV_HUGEPAGE);
#else
  static_cast<void>(out);
#endif
}

bool should_stream(int64_t bytes) {
  // Half of a last-level cache of 32 MB, which the next op may still find there. Asked for the cache's size, a virtual
  // machine answers with the host's (384 MB where 32 are in reach), so it is not asked.
  constexpr int64_t kLeast = 16 << 20;
  return bytes >= kLeast;
}

}  // namespace llama_fast::cpu
