// Which instruction sets this processor runs, probed once, and the one that a test has forced.
#include "isa.h"

#include <atomic>
#include <cstring>
#include <stdexcept>
#include <string>

#if LF_X86
#include <cpuid.h>
#endif
#if LF_X86 && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#if defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#elif defined(__aarch64__) && defined(__APPLE__)
#include <sys/sysctl.h>
#endif

namespace llama_fast::cpu {
namespace {

// In the order of Isa.
constexpr const char* kNames[] = {
    "portable",
#if LF_NEON
    "neon",
#endif
#if LF_NEON_BF16
    "neonbf16",
#endif
#if LF_X86
    "avx2",     "avx512", "avx512bf16", "amx",
#endif
};

#if LF_X86
struct Registers {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
};

// All zero for a leaf that the processor does not have.
Registers cpuid(unsigned leaf, unsigned subleaf) {
  Registers r;
  __get_cpuid_count(leaf, subleaf, &r.eax, &r.ebx, &r.ecx, &r.edx);
  return r;
}

// Whether the system lets this process use the matrix registers (8 KB a thread): it must be asked, once.
bool may_use_amx() {
#if LF_SOFTWARE
  return true;
#elif defined(__linux__)
  constexpr unsigned kBf16 = 1U << 22, kTiles = 1U << 24;
  constexpr int kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  const unsigned features = cpuid(7, 0).edx;
  return (features & kBf16) != 0 && (features & kTiles) != 0 &&
         syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}
#endif

#if LF_NEON_BF16
bool has_bf16() {
#if LF_SOFTWARE_NEON
  return true;
#elif defined(__linux__)
  constexpr unsigned long kBf16 = 1UL << 14;  // HWCAP2_BF16
  return (getauxval(AT_HWCAP2) & kBf16) != 0;
#elif defined(__APPLE__)
  int has = 0;
  size_t bytes = sizeof(has);
  return sysctlbyname("hw.optional.arm.FEAT_BF16", &has, &bytes, nullptr, 0) == 0 && has != 0;
#else
  return false;
#endif
}
#endif

Isa probe() {
#if LF_NEON_BF16
  const Isa least = has_bf16() ? Isa::neonbf16 : Isa::neon;
#elif LF_NEON
  const Isa least = Isa::neon;
#else
  const Isa least = Isa::portable;
#endif
#if LF_X86
  // clang 14 has no f16c and avx512bf16 in __builtin_cpu_supports. That the system saves the registers follows from the
  // features that it does have.
  __builtin_cpu_init();
  const bool f16c = (cpuid(1, 0).ecx >> 29 & 1) != 0, avx512bf16 = (cpuid(7, 1).eax >> 5 & 1) != 0;
  if (!(__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && f16c)) return least;
  if (!(__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl")))
    return Isa::avx2;
  if (!avx512bf16) return Isa::avx512;
  return may_use_amx() ? Isa::amx : Isa::avx512bf16;
#else
  return least;
#endif
}

// Family of an AMD processor as its manuals number it (25: Zen 3 and 4, 26: Zen 5), 0 for any other.
int probe_amd_family() {
#if LF_X86
  const Registers maker = cpuid(0, 0);
  if (maker.ebx != signature_AMD_ebx || maker.ecx != signature_AMD_ecx) return 0;
  const unsigned eax = cpuid(1, 0).eax;
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
