// Loops over PyTorch's own OpenMP pool: its thread count (torch.set_num_threads), its threads.
//
// The library is compiled with -fopenmp and linked with no OpenMP runtime: the symbols resolve to the runtime that
// torch has loaded. Exceptions must not leave a loop body.
#pragma once

#include <omp.h>

#include <algorithm>
#include <atomic>
#include <cstdint>

namespace llama_fast::cpu {

inline int max_threads() { return omp_in_parallel() ? 1 : omp_get_max_threads(); }

// Calls body(begin, end) on contiguous shares of [0, n), at most one a thread and none below `grain` items.
template <class Body>
void parallel_for(int64_t n, int64_t grain, const Body& body) {
  if (n <= 0) return;
  const int64_t threads = std::min<int64_t>(max_threads(), (n + grain - 1) / grain);
  if (threads <= 1) {
    body(int64_t{0}, n);
    return;
  }
#pragma omp parallel num_threads(static_cast<int>(threads))
  {
    // The runtime may give fewer threads than asked for.
    const int64_t count = omp_get_num_threads(), i = omp_get_thread_num();
    const int64_t begin = n * i / count, end = n * (i + 1) / count;
    if (begin < end) body(begin, end);
  }
}

// Calls body(task, thread) for each task in [0, n), each thread taking the next one when it is free: for tasks of
// uneven cost. `thread` is below max_threads(). What a task computes must not depend on which thread runs it.
template <class Body>
void parallel_tasks(int64_t n, const Body& body) {
  const int64_t threads = std::min<int64_t>(max_threads(), n);
  if (threads <= 1) {
    for (int64_t task = 0; task < n; ++task) body(task, 0);
    return;
  }
  std::atomic<int64_t> next{0};
#pragma omp parallel num_threads(static_cast<int>(threads))
  {
    const int thread = omp_get_thread_num();
    for (int64_t task = next++; task < n; task = next++) body(task, thread);
  }
}

}  // namespace llama_fast::cpu
