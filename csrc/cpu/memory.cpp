#include "memory.h"

#include <cstdlib>

namespace llama_fast::cpu {

bool should_stream(int64_t bytes) {
  static const int64_t t = getenv("LF_STREAM") ? atoll(getenv("LF_STREAM")) : 16 << 20;
  return bytes >= t;
}

}  // namespace llama_fast::cpu
