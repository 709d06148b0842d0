// What an emulated kernel calls: functions of the thread that calls them. No more of the emulator is compiled with a
// kernel than this header and the instructions.
#pragma once

#include <cstddef>
#include <cstdint>

#include "types.h"

namespace llama_fast::emulator {

constexpr int kWarp = 32;

uint3 thread_index();
uint3 block_index();
dim3 block_shape();
dim3 grid_shape();
int lane();

// Ends the block with a report that names the thread. Does not return.
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

// bar.sync and bar.arrive. `count` threads take part; 0: every thread that has not exited.
void barrier(int id, int count, bool wait_for_others);
void syncwarp(uint32_t mask);
uint32_t ballot(const char* op, uint32_t mask, bool predicate);

// A rendezvous of the lanes of `mask` in the same instruction `op`; the last one to come runs `execute` for all of
// them, on their `mine` by lane (nullptr for a lane that takes no part).
void collective(const char* op, uint32_t mask, void* mine, void (*execute)(void* const* each));

// Address of an array declared in a kernel, the same for each thread that passes; `key` identifies the declaration.
uint32_t static_shared(const void* key, size_t bytes, size_t alignment);
// Check bounds, alignment and races, and give the bytes.
const void* shared_read(uint32_t address, uint32_t bytes, const char* op);
void* shared_write(uint32_t address, uint32_t bytes, const char* op);
// What an access to global memory is to the race checker: `none` is seen when it is issued; a `constant` is promised
// not to be written by the kernel (ld.global.nc).
enum class Use : uint8_t { none, read, constant, write, atomic };
// Checks bounds, alignment and races, and gives the true address.
void* global_at(uint64_t address, size_t bytes, size_t alignment, const char* op, Use use);
// What the thread has seen and done lies behind whoever acquires the variable, and what was released to it behind the
// thread.
void global_release(uint64_t address);
void global_acquire(uint64_t address);

// A kernel's arguments, one after the other as they are laid out for the device.
struct Parameter {
  const void* value;
  size_t size, alignment;
};
struct KernelCall {
  const void* kernel;             // the function
  void (*run)(const void* call);  // calls it, with `call`
  const void* call;
  const Parameter* parameters;
  int count;
};

// Runs the kernel for each thread of the grid. Throws std::runtime_error with the first fault's report, which begins
// with `op`; std::invalid_argument for a configuration that no GPU takes.
void launch_grid(const char* op, dim3 grid, dim3 shape, size_t dynamic_shared, const KernelCall& kernel);

}  // namespace llama_fast::emulator
