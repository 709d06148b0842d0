// out = a b by the vendor's kernel for one tile, oneDNN's brgemm, in loops of our own: what oneDNN's whole products
// lose beside that kernel is rearranging their operands, and in float32 the cut of the sum that keeps its error
// (docs/ops/linear.md). What does not lie as the kernel reads it best is packed so; a tile of the product is added up
// in float32, part by part of the terms, while it stays in a core's caches, and rounded once. No bit depends on the
// number of threads.
#ifndef LF_ISA

#include <atomic>
#include <stdexcept>

#include "memory.h"
#include "parallel.h"
#include "simd.h"

#if LF_X86 && defined(__linux__)
#include <dlfcn.h>
#endif

// Torch's types, of which only pointers are needed.
namespace c10 {
struct BFloat16;
}

namespace llama_fast::cpu {
namespace {

// at::native::cpublas::brgemm of ATen/native/CPUBlas.h: C [M, N] = (add_C ? C : 0) + A [M, K] B [K, N], rows ld_ apart;
// the sum of K terms is one chain, and added to C once. With is_vnni B holds pairs of rows: (B[2 k, n], B[2 k + 1, n]).
template <class T>
using Kernel = void (*)(int64_t M, int64_t N, int64_t K, int64_t ld_a, int64_t ld_b, int64_t ld_c, bool add_C,
                        const T* A, const T* B, float* C, bool is_vnni);
using Release = void (*)(bool is_vnni);

struct Kernels {
  Kernel<float> f32 = nullptr;
  Kernel<c10::BFloat16> bf16 = nullptr;
  Release release = nullptr;
};

// Whether the kernel runs here: it raises on a processor that it is not for.
template <class T>
bool runs(Kernel<T> kernel, Release release) {
  if (kernel == nullptr || release == nullptr) return false;
  alignas(64) const float zeros[8 * 32] = {};
  alignas(64) float tile[8 * 16];
  const auto* operand = reinterpret_cast<const T*>(zeros);
  try {
    kernel(8, 16, 16, 16, 16, 16, false, operand, operand, tile, !std::is_same_v<T, float>);
    release(!std::is_same_v<T, float>);
  } catch (...) {
    return false;
  }
  return true;
}

Kernels find() {
  Kernels found;
#if LF_X86 && defined(__linux__)
  void* const torch = dlopen("libtorch_cpu.so", RTLD_LAZY | RTLD_NOLOAD);
  if (torch == nullptr) return found;
  const auto get = [&](auto& function, const char* name) {
    function = reinterpret_cast<std::decay_t<decltype(function)>>(dlsym(torch, name));
  };
  get(found.f32, "_ZN2at6native7cpublas6brgemmEllllllbPKfS3_Pfb");
  get(found.bf16, "_ZN2at6native7cpublas6brgemmEllllllbPKN3c108BFloat16ES5_Pfb");
  get(found.release, "_ZN2at6native7cpublas14brgemm_releaseEb");
  if (!runs(found.f32, found.release)) found.f32 = nullptr;
  if (!runs(found.bf16, found.release)) found.bf16 = nullptr;
#endif
  return found;
}

const Kernels& kernels() {
  static const Kernels all = find();
  return all;
}

}  // namespace
}  // namespace llama_fast::cpu

#define LF_THIS_FILE "brgemm.cpp"
#include "each_isa.h"

namespace llama_fast::cpu {

bool has_brgemm(bool half) { return half ? kernels().bf16 != nullptr : kernels().f32 != nullptr; }

void brgemm(const Tensor& a, const Tensor& b, const Tensor& out, bool accumulate) {
  LF_DISPATCH(brgemm, a, b, out, accumulate);
}

}  // namespace llama_fast::cpu

#else

namespace llama_fast::cpu::LF_ISA {
namespace {

constexpr int64_t kRows = 256;    // of a tile
constexpr int64_t kColumns = 64;  // of a tile: four registers of 16 lanes
constexpr int64_t kRowStep = 8;   // the last rows are padded to a multiple: each number of rows is a kernel of its own
constexpr int64_t kMostRows = 8 * kRows;  // for which a panel of b is packed once
constexpr int64_t kPacked = 17 << 20;     // bytes of a's that are packed at a time: they stay in the last cache
constexpr int64_t kWaiting = 8 << 20;     // bytes of the tiles that wait for their next terms
constexpr int64_t kAhead = 16;     // units, of which an operand's memory is asked for: its next rows, two to eight
                                   // cache lines each and far from each other, are what the processor does not foresee
constexpr int64_t kRowsAhead = 8;  // the same of the product's rows
constexpr int kStrides = 64;       // distances of a's rows for which it is read where it lies

// A unit is 32 bits: a float32, or two bfloat16 of consecutive terms, as the kernel takes the second operand.
constexpr int64_t kPart = 128;   // units that are one chain of sums: MKL's chains of 192 err more
constexpr int64_t kMost = 2048;  // units of a panel of b: 512 kB, half of the second cache
template <class T>
struct Format;
template <>
struct Format<float> {
  using Element = float;
  static constexpr int64_t kTerms = 1;  // of a unit
  static constexpr int64_t kStep = 8;   // the last part is padded to a multiple of it
  static Kernel<float> kernel() { return kernels().f32; }
};
template <>
struct Format<bf16> {
  using Element = c10::BFloat16;
  static constexpr int64_t kTerms = 2;
  static constexpr int64_t kStep = 16;
  static Kernel<c10::BFloat16> kernel() { return kernels().bf16; }
};

template <>
struct Format<f16> : Format<float> {};  // widened when it is packed

// An operand seen from the other's side: `lines` rows of a or columns of b, and `terms` along which the sum goes.
template <class T>
struct Operand {
  const T* data;
  int64_t line_stride, term_stride;  // one of them 1
  const T* at(int64_t line, int64_t term) const { return data + line * line_stride + term * term_stride; }
};

typedef uint32_t Units __attribute__((vector_size(32)));  // eight

// Unit `u` of a line, zero from term `terms` on.
template <class T>
LF_INLINE uint32_t unit(const Operand<T>& from, int64_t line, int64_t u, int64_t terms) {
  uint32_t bits = 0;
  const int64_t term = u * Format<T>::kTerms, n = std::min(Format<T>::kTerms, terms - term);
  for (int64_t i = 0; i < n; ++i)
    std::memcpy(reinterpret_cast<char*>(&bits) + i * static_cast<int64_t>(sizeof(T)), from.at(line, term + i),
                sizeof(T));
  return bits;
}

// Unit u of lines [line, line + 8), which lie side by side.
LF_INLINE Units units_across(const Operand<float>& from, int64_t line, int64_t u) {
  Units a;
  std::memcpy(&a, from.at(line, u), sizeof(a));
  return a;
}
LF_INLINE Units units_across(const Operand<bf16>& from, int64_t line, int64_t u) {
  typedef uint16_t Halves __attribute__((vector_size(16)));
  Halves even, odd;
  std::memcpy(&even, from.at(line, 2 * u), sizeof(even));
  std::memcpy(&odd, from.at(line, 2 * u + 1), sizeof(odd));
  return __builtin_convertvector(even, Units) | __builtin_convertvector(odd, Units) << 16;
}

// Units [u, u + 8) of a line, whose terms lie side by side.
template <class T>
LF_INLINE Units units_along(const Operand<T>& from, int64_t line, int64_t u) {
  Units a;
  std::memcpy(&a, from.at(line, u * Format<T>::kTerms), sizeof(a));
  return a;
}

template <class T>
constexpr int64_t kCacheLine = 64 / static_cast<int64_t>(sizeof(T));  // elements of it

// Asks for the memory of units [u, u + n) of the lines from `line` on that share a cache line. They may lie behind the
// operand's end: asking is no access.
template <class T>
LF_INLINE void ask(const Operand<T>& from, int64_t line, int64_t u, int64_t n) {
  for (int64_t i = 0; i < n * Format<T>::kTerms; ++i) __builtin_prefetch(from.at(line, u * Format<T>::kTerms + i));
}

// to[line * line_units + u * unit_units] for lines [line, line + lines) and units [u, u + units); terms from `terms` on
// and lines from `known` on are zero. One of line_units and unit_units is 1.
template <class T>
void pack(const Operand<T>& from, int64_t line, int64_t lines, int64_t known, int64_t u, int64_t units, int64_t terms,
          uint32_t* to, int64_t line_units, int64_t unit_units) {
  const bool along = from.term_stride == 1, to_along = unit_units == 1;
  const int64_t whole_lines = std::max<int64_t>(std::min(lines, known - line), 0) / 8 * 8;
  const int64_t whole_units = std::max<int64_t>(std::min(units, terms / Format<T>::kTerms - u), 0) / 8 * 8;
  const auto put = [&](const Units& a, int64_t l, int64_t k) {
    std::memcpy(to + l * line_units + k * unit_units, &a, sizeof(a));
  };
  if (to_along && along) {
    for (int64_t l = 0; l < whole_lines; ++l)
      for (int64_t k = 0; k < whole_units; k += 8) put(units_along(from, line + l, u + k), l, k);
  } else if (!to_along && !along) {
    for (int64_t k = 0; k < whole_units; ++k) {
      for (int64_t l = 0; l < whole_lines; l += kCacheLine<T>) ask(from, line + l, u + k + kAhead, 1);
      for (int64_t l = 0; l < whole_lines; l += 8) put(units_across(from, line + l, u + k), l, k);
    }
  } else {
    Units a[8];
    const auto block = [&](int64_t l, int64_t k) {
      for (int i = 0; i < 8; ++i)
        a[i] = along ? units_along(from, line + l + i, u + k) : units_across(from, line + l, u + k + i);
      transpose_8x8(a);
      for (int i = 0; i < 8; ++i) put(a[i], l + (to_along ? i : 0), k + (to_along ? 0 : i));
    };
    if (along) {  // whole cache lines of `to`: sixteen lines of `from` at a time
      for (int64_t l = 0; l < whole_lines; l += 16)
        for (int64_t k = 0; k < whole_units; k += 8)
          for (int64_t i = l; i < std::min(l + 16, whole_lines); i += 8) block(i, k);
    } else {
      for (int64_t k = 0; k < whole_units; k += 8) {
        for (int64_t l = 0; l < whole_lines; l += 8) {
          if (l % kCacheLine<T> == 0) ask(from, line + l, u + k + 8, 8);
          block(l, k);
        }
      }
    }
  }
  for (int64_t l = 0; l < lines; ++l)
    for (int64_t k = l < whole_lines ? whole_units : 0; k < units; ++k)
      to[l * line_units + k * unit_units] = line + l < known ? unit(from, line + l, u + k, terms) : 0;
}

// The same for float16, as float32, by blocks that are widened in the first cache.
void pack(const Operand<f16>& from, int64_t line, int64_t lines, int64_t known, int64_t u, int64_t units, int64_t terms,
          uint32_t* to, int64_t line_units, int64_t unit_units) {
  constexpr int64_t kSide = 64;
  alignas(64) float wide[kSide * kSide];
  const bool along = from.term_stride == 1;
  const Operand<float> block{wide, along ? kSide : 1, along ? 1 : kSide};
  for (int64_t l = 0; l < lines; l += kSide)
    for (int64_t k = 0; k < units; k += kSide) {
      const int64_t known_lines = std::clamp(known - line - l, int64_t{0}, kSide);
      const int64_t known_units = std::clamp(terms - u - k, int64_t{0}, kSide);
      for (int64_t i = 0; i < (along ? known_lines : known_units); ++i) {
        const f16* const row = along ? from.at(line + l + i, u + k) : from.at(line + l, u + k + i);
        for_each_vector(0, along ? known_units : known_lines, [&](int64_t c, auto n) {
          write_lanes<false>(wide + i * kSide + c, load_lanes(row + c, n), n);
        });
      }
      pack(block, 0, std::min(kSide, lines - l), known_lines, 0, std::min(kSide, units - k), known_units,
           to + l * line_units + k * unit_units, line_units, unit_units);
    }
}

// Whether rows of a that lie `stride` apart may be read there: each distance has kernels of its own, 20 to 130 kB each,
// which torch keeps as long as the thread lives. So the first kStrides distances that are met may, and no other.
template <class T>
bool may_read(int64_t stride) {
  static std::atomic<int64_t> met[kStrides] = {};
  return std::any_of(std::begin(met), std::end(met), [&](std::atomic<int64_t>& slot) {
    int64_t found = 0;
    return slot.compare_exchange_strong(found, stride) || found == stride;
  });
}

template <class T>
Operand<T> operand(const Tensor& t, int line_dim, int term_dim) {
  return {t.ptr<const T>(), t.stride[line_dim], t.stride[term_dim]};
}

// out[r, 0..n) = tile[r, 0..n), or added to it.
template <class Out>
void write_tile(const float* tile, Out* out, int64_t stride, int64_t rows, int64_t n, bool add, bool streamed) {
  for (int64_t r = 0; r < rows; ++r, tile += kColumns, out += stride) {
    if (streamed && n == kColumns && reinterpret_cast<uintptr_t>(out) % 64 == 0) {
      for (int64_t c = 0; c < kColumns; c += VecF::kLanes) stream(out + c, load(tile + c));
      continue;
    }
    for (int64_t c = 0; c < n; c += kCacheLine<Out>) __builtin_prefetch(out + kRowsAhead * stride + c, 1);
    for_each_vector(0, n, [&](int64_t c, auto lanes) {
      const VecF a = load_lanes(tile + c, lanes);
      write_lanes<false>(out + c, add ? load_lanes(out + c, lanes) + a : a, lanes);
    });
  }
}

// n cut into the fewest equal pieces of at most `most`, each a multiple of `step`.
int64_t piece(int64_t n, int64_t most, int64_t step) { return round_up(blocks_of(n, blocks_of(n, most)), step); }

template <class T, class Out>
void brgemm(const Operand<T>& a, const Operand<T>& b, int64_t M, int64_t N, int64_t K, const Tensor& out,
            bool accumulate) {
  using F = Format<T>;
  using Element = typename F::Element;
  constexpr bool kPairs = F::kTerms > 1;
  const auto kernel = F::kernel();
  const auto release = kernels().release;
  // Terms go by pieces of `deep` units, a multiple of kPart, and these by parts. A row of a piece of a's is packed as
  // one: behind a part's end stands what the next part reads, and that is what the processor fetches ahead. Rows lie an
  // odd number of cache lines apart, so that they share no set of a cache.
  const int64_t units = round_up(blocks_of(K, F::kTerms), F::kStep);
  const int64_t deep = units <= kPart ? units : piece(units, kMost, kPart);
  const int64_t a_stride = units <= kPart ? units : deep + kCacheLine<float>;
  const int64_t a_row = blocks_of(units, deep) * a_stride;
  const int64_t chunks = blocks_of(N, kColumns), threads = max_threads();
  // Whole blocks of a are read where they lie, if there are any, terms lie side by side, none is missing, and the rows
  // are no further apart than the kernel takes: it counts the bytes of a block in 31 bits.
  const bool direct = !std::is_same_v<T, f16> && M >= kRows && a.term_stride == 1 && K == units * F::kTerms &&
                      a.line_stride <= INT32_MAX / (kRows * static_cast<int64_t>(sizeof(T))) &&
                      may_read<T>(a.line_stride);
  const int64_t most = direct ? kMostRows : std::clamp(kPacked / 4 / a_row / kRows * kRows, kRows, kMostRows);
  const int64_t row_piece = std::min(round_up(M, kRowStep), piece(M, most, kRows));
  // Where the terms come in pieces, all columns of a group take one before any takes the next, so that a's is read from
  // the last cache; their tiles wait. Else a tile is done at once.
  const bool waits = deep < units;
  const int64_t group = waits ? std::clamp(kWaiting / (row_piece * kColumns * 4), int64_t{1}, chunks) : chunks;
  const Scratch<uint32_t> a_packed((!direct ? row_piece : M % kRows == 0 ? 0 : std::min(row_piece, kRows)) * a_row);
  const Scratch<uint32_t> panels(threads * deep * kColumns);
  const Scratch<float> tiles((waits ? group * blocks_of(row_piece, kRows) : threads) * kRows * kColumns);
  const bool streamed = !accumulate && should_stream(M * N * static_cast<int64_t>(sizeof(Out)));
  std::atomic<bool> failed{false};
  for (int64_t m0 = 0; m0 < M; m0 += row_piece) {
    const int64_t rows = std::min(row_piece, M - m0), row_blocks = blocks_of(rows, kRows);
    const auto height_of = [&](int64_t i) { return std::min(kRows, round_up(rows - i * kRows, kRowStep)); };
    // what is packed of a: from this block on; each piece of the terms one after the other, in it row by row
    const int64_t first_packed = direct ? rows / kRows : 0, parts = blocks_of(units, kPart);
    const auto packed = [&](int64_t i, int64_t k) {
      return a_packed.data() + (i - first_packed) * kRows * a_row + height_of(i) * (k / deep) * a_stride + k % deep;
    };
    parallel_tasks((row_blocks - first_packed) * parts, [&](int64_t task, int64_t) {
      const int64_t i = first_packed + task / parts, k = task % parts * kPart, width = std::min(kPart, units - k);
      pack(a, m0 + i * kRows, height_of(i), M, k, width, K, packed(i, k), a_stride, 1);
    });
    for (int64_t c0 = 0; c0 < chunks; c0 += group) {
      for (int64_t u0 = 0; u0 < units; u0 += deep) {
        const int64_t u1 = std::min(u0 + deep, units);
        const auto panel_of = [&](int64_t thread) { return panels.data() + thread * deep * kColumns; };
        const auto prepare = [&](int64_t chunk, int64_t thread) {
          pack(b, (c0 + chunk) * kColumns, kColumns, N, u0, u1 - u0, K, panel_of(thread), 1, kColumns);
        };
        const auto multiply = [&](int64_t chunk, int64_t i, int64_t owner, int64_t thread) {
          const int64_t height = height_of(i), n0 = (c0 + chunk) * kColumns;
          const uint32_t* const panel = panel_of(owner);
          float* const tile = tiles.data() + (waits ? chunk * row_blocks + i : thread) * kRows * kColumns;
          try {
            for (int64_t k = u0; k < u1; k += kPart) {
              const int64_t terms = std::min(kPart, u1 - k) * F::kTerms;
              const void* from =
                  i < first_packed ? static_cast<const void*>(a.at(m0 + i * kRows, k * F::kTerms)) : packed(i, k);
              kernel(height, kColumns, terms, i < first_packed ? a.line_stride : a_stride * F::kTerms, kColumns,
                     kColumns, k > 0, static_cast<const Element*>(from),
                     reinterpret_cast<const Element*>(panel + (k - u0) * kColumns), tile, kPairs);
            }
          } catch (...) {
            failed = true;
          }
          if (u1 < units) return;
          write_tile(tile, out.ptr<Out>() + (m0 + i * kRows) * out.stride[0] + n0, out.stride[0],
                     std::min(kRows, rows - i * kRows), std::min(kColumns, N - n0), accumulate, streamed);
        };
        const auto leave = [&] {
          release(kPairs);
          if (streamed) stream_fence();
        };
        parallel_prepared(std::min(group, chunks - c0), row_blocks, prepare, multiply, leave);
      }
    }
  }
  if (failed) throw std::runtime_error("brgemm: oneDNN's kernel failed");
}

void brgemm(const Tensor& a, const Tensor& b, const Tensor& out, bool accumulate) {
  const int64_t M = out.size[0], N = out.size[1], K = a.size[1];
  const auto run = [&](auto element, auto result) {
    using T = decltype(element);
    brgemm<T, decltype(result)>(operand<T>(a, 0, 1), operand<T>(b, 1, 0), M, N, K, out, accumulate);
  };
  with_dtype(a.dtype, [&](auto element) {
    if (out.dtype == DType::f32)
      run(element, float{});
    else
      run(element, element);
  });
}

}  // namespace
}  // namespace llama_fast::cpu::LF_ISA

#endif
