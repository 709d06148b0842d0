#include "memory.h"

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif
#include <cstdlib>

namespace llama_fast::cpu {

void use_huge_pages(const Tensor& out) {
  constexpr uintptr_t kLeast = 4 << 20;  // below two huge pages, alignment leaves one or none
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  if (getenv("LF_NOHUGE")) return;
  if (out.data == nullptr) return;
  int64_t span = 1;  // elements from the first to the last
  for (int i = 0; i < out.ndim; ++i) span += (out.size[i] - 1) * out.stride[i];
  const auto item = static_cast<uintptr_t>(out.dtype == DType::f32 ? 4 : 2);
  const uintptr_t page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  const uintptr_t data = reinterpret_cast<uintptr_t>(out.data), end = data + static_cast<uintptr_t>(span) * item;
  const uintptr_t begin = (data + page - 1) / page * page;
  if (span <= 0 || end < begin + kLeast) return;
  madvise(reinterpret_cast<void*>(begin), end / page * page - begin, MADV_HUGEPAGE);
#endif
}

bool should_stream(int64_t bytes) {
  constexpr int64_t kLeast = 16 << 20;
  return getenv("LF_STREAM") ? bytes > atoll(getenv("LF_STREAM")) : bytes >= kLeast;
}

}  // namespace llama_fast::cpu
