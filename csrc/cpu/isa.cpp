// Which instruction sets this processor runs, probed once, and the one that a test has forced.
#include "isa.h"

#include <atomic>
#include <cstring>
#include <stdexcept>
#include <string>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace llama_fast::cpu {
namespace {

constexpr const char* kNames[] = {"portable", "avx2", "avx512", "avx512bf16"};

Isa probe() {
#if LF_X86
  __builtin_cpu_init();
  if (!(__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")))
    return Isa::portable;
  if (!(__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl")))
    return Isa::avx2;
  return __builtin_cpu_supports("avx512bf16") ? Isa::avx512bf16 : Isa::avx512;
#else
  return Isa::portable;
#endif
}

// Family of an AMD processor as its manuals number it (25: Zen 3 and 4, 26: Zen 5), 0 for any other.
int probe_amd_family() {
#if defined(__x86_64__)
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  if (__get_cpuid(0, &eax, &ebx, &ecx, &edx) == 0 || ebx != signature_AMD_ebx || ecx != signature_AMD_ecx) return 0;
  if (__get_cpuid(1, &eax, &ebx, &ecx, &edx) == 0) return 0;
  const unsigned base = eax >> 8 & 0xF, extended = eax >> 20 & 0xFF;
  return static_cast<int>(base == 0xF ? base + extended : base);
#else
  return 0;
#endif
}

Isa best_isa() {
  static const Isa best = probe();
  return best;
}

std::atomic<int> forced{-1};

}  // namespace

Isa current_isa() {
  const int f = forced.load(std::memory_order_relaxed);
  return f < 0 ? best_isa() : static_cast<Isa>(f);
}

int isa_count() { return static_cast<int>(best_isa()) + 1; }
const char* isa_name(int i) { return kNames[static_cast<int>(best_isa()) - i]; }
const char* isa() { return kNames[static_cast<int>(current_isa())]; }

int amd_family() {
  static const int family = probe_amd_family();
  return family;
}

void set_isa(const char* name) {
  if (name[0] == '\0') {
    forced = -1;
    return;
  }
  for (int i = 0; i <= static_cast<int>(best_isa()); ++i)
    if (std::strcmp(name, kNames[i]) == 0) {
      forced = i;
      return;
    }
  throw std::invalid_argument("isa: " + std::string(name) + " is not one that this processor runs (best: " +
                              kNames[static_cast<int>(best_isa())] + ")");
}

}  // namespace llama_fast::cpu
