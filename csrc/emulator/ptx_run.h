// Runs a PTX program on the fibers of an emulated launch: each thread has registers of its own, and the instructions
// that threads share are the ones that csrc/cuda/ptx.cuh calls. Not fast; for tests.
#pragma once

#include <cstddef>

#include "ptx_program.h"

namespace llama_fast::emulator {

// A launch's thread: runs the program to its end. `parameters`: program.parameter_bytes, laid out as PTX lays them out.
void run_ptx_thread(const PtxProgram& program, const void* parameters);

// From here on launches of the kernel at this address run the program in its place; nullptr: no longer.
void replace_kernel(const void* kernel, const PtxProgram* program);
const PtxProgram* replacement_of(const void* kernel);

}  // namespace llama_fast::emulator
