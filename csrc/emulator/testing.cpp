// What tests call through ctypes.
#include <dlfcn.h>

#include <algorithm>
#include <cstring>
#include <list>
#include <stdexcept>
#include <string>
#include <vector>

#include "block.h"
#include "hopper.h"
#include "memory.h"
#include "ptx_run.h"

using namespace llama_fast::emulator;

namespace {

std::string report;

template <class F>
const char* reported(F&& f) {
  report.clear();
  try {
    f();
  } catch (const std::exception& error) {
    report = error.what();
  }
  return report.c_str();
}

// Programs live as long as the process: launches may hold them.
const PtxProgram& keep(PtxProgram program) {
  static auto& kept = *new std::list<PtxProgram>;
  return kept.emplace_back(std::move(program));
}

}  // namespace

#pragma GCC visibility push(default)  // of the Python module too
extern "C" {

void llama_fast_emulator_configure(uint64_t seed, bool race_check, int workers, bool proxy_fences) {
  options() = {seed, race_check, workers, proxy_fences};
}

// The counters in the order of their declaration; sets them to 0.
void llama_fast_emulator_counters(int64_t* values) {
  const Counters c = counters();
  std::memcpy(values, &c, sizeof c);
  reset_counters();
}

void* llama_fast_emulator_map(const void* data, size_t bytes, const char* label) {
  return map_global(data, bytes, label);
}
void llama_fast_emulator_unmap(const void* mapped) { unmap_global(mapped); }

// A tensor map of `rank` dimensions, with the 128-byte swizzle; sizes in elements, strides in bytes.
void llama_fast_emulator_tensor_map(void* map, void* mapped, int rank, int element_bytes, const int64_t* size,
                                    const int64_t* stride, const int* box) {
  TensorMap m;
  m.base = reinterpret_cast<uintptr_t>(mapped);
  m.rank = rank;
  m.element_bytes = element_bytes;
  m.swizzle = Swizzle::bytes128;
  std::copy(size, size + rank, m.size);
  std::copy(stride, stride + rank, m.stride);
  std::copy(box, box + rank, m.box);
  std::memcpy(map, &m, sizeof m);
}

// Runs an entry of a PTX module. `parameters`: the entry's parameter bytes. Gives "" or what went wrong.
const char* llama_fast_emulator_run_ptx(const char* text, const char* entry, const unsigned* grid,
                                        const unsigned* block, size_t dynamic_shared, const void* parameters,
                                        size_t bytes) {
  return reported([=] {
    const PtxProgram& program = keep(parse_ptx(text, entry));
    const Parameter all{parameters, bytes, 1};
    replace_kernel(&program, &program);
    launch_grid(entry, {grid[0], grid[1], grid[2]}, {block[0], block[1], block[2]}, dynamic_shared,
                {&program, nullptr, nullptr, &all, 1});
  });
}

// Has launches of the kernel that lies `offset` bytes into the library that holds `symbol` run the entry in its place.
const char* llama_fast_emulator_replace(const void* symbol, size_t offset, const char* text, const char* entry) {
  return reported([=] {
    Dl_info library;
    if (dladdr(symbol, &library) == 0) throw std::invalid_argument("the address lies in no library");
    replace_kernel(static_cast<const char*>(library.dli_fbase) + offset, &keep(parse_ptx(text, entry)));
  });
}

}  // extern "C"
#pragma GCC visibility pop
