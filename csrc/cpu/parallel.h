// Loops over PyTorch's own OpenMP pool: its thread count (torch.set_num_threads), its threads.
//
// The library is linked with no OpenMP runtime: its functions, declared here, resolve to the runtime that torch has
// loaded. What `#pragma omp parallel` becomes depends on the compiler: g++ calls GOMP_parallel, which GNU's, LLVM's and
// Intel's runtimes have; clang++ a function that GNU's, and so a torch of PyPI, lacks. So the call stands here in the
// pragma's place. Exceptions must not leave a loop body.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

extern "C" {
int omp_in_parallel();
int omp_get_max_threads();
int omp_get_thread_num();
int omp_get_num_threads();
// Calls fn(data) on up to `threads` threads; 0: no flags.
void GOMP_parallel(void (*fn)(void*), void* data, unsigned threads, unsigned flags);
}

namespace llama_fast::cpu {

// Blocks of `size` that hold n items, and the items that these have room for.
constexpr int64_t blocks_of(int64_t n, int64_t size) { return (n + size - 1) / size; }
constexpr int64_t round_up(int64_t n, int64_t size) { return blocks_of(n, size) * size; }

inline int max_threads() { return omp_in_parallel() ? 1 : omp_get_max_threads(); }

// Calls body(thread, threads) on `threads` threads at once, or on as many as the runtime gives.
template <class Body>
void in_team(int64_t threads, const Body& body) {
  if (threads <= 1) {
    body(int64_t{0}, int64_t{1});
    return;
  }
  const auto call = [](void* data) {
    (*static_cast<const Body*>(data))(int64_t{omp_get_thread_num()}, int64_t{omp_get_num_threads()});
  };
  GOMP_parallel(call, const_cast<Body*>(&body), static_cast<unsigned>(threads), 0);
}

// Calls body(begin, end) on contiguous shares of [0, n), at most one a thread and none below `grain` items.
template <class Body>
void parallel_for(int64_t n, int64_t grain, const Body& body) {
  if (n <= 0) return;
  const int64_t threads = std::min<int64_t>(max_threads(), (n + grain - 1) / grain);
  in_team(threads, [&](int64_t i, int64_t count) {
    const int64_t begin = n * i / count, end = n * (i + 1) / count;
    if (begin < end) body(begin, end);
  });
}

// Calls body(task, thread) for each task in [0, n), each thread taking the next one when it is free: for tasks of
// uneven cost. `thread` is below max_threads(). What a task computes must not depend on which thread runs it.
template <class Body>
void parallel_tasks(int64_t n, const Body& body) {
  std::atomic<int64_t> next{0};
  in_team(std::min<int64_t>(max_threads(), n), [&](int64_t thread, int64_t) {
    for (int64_t task = next++; task < n; task = next++) body(task, thread);
  });
}

// prepare(group, thread) once for each group in [0, groups), by one thread, its owner, and then work(group, item,
// owner, thread) once for each item in [0, items), items >= 1, by the owner and, when every group has an owner, by each
// thread that has nothing else to do. An owner then prepares no other group: what prepare leaves in its thread's place
// stays there until its items are done. At last leave() on each thread.
template <class Prepare, class Work, class Leave>
void parallel_prepared(int64_t groups, int64_t items, const Prepare& prepare, const Work& work, const Leave& leave) {
  struct alignas(64) Slot {  // of a thread: its group, of which the items from `next` on have not been taken
    std::atomic<int64_t> next;
    int64_t group = 0;
  };
  const int64_t most = std::min<int64_t>(max_threads(), groups * items);
  std::vector<Slot> slots(static_cast<size_t>(most));
  for (Slot& slot : slots) slot.next = items;
  std::atomic<int64_t> next{0}, prepared{0};
  in_team(most, [&](int64_t thread, int64_t threads) {
    const auto take_items = [&](int64_t owner) {
      Slot& slot = slots[static_cast<size_t>(owner)];
      while (slot.next.load(std::memory_order_relaxed) < items) {
        const int64_t item = slot.next.fetch_add(1, std::memory_order_acquire);
        if (item < items) work(slot.group, item, owner, thread);
      }
    };
    for (int64_t group = next++; group < groups; group = next++) {
      prepare(group, thread);
      Slot& own = slots[static_cast<size_t>(thread)];
      own.group = group;
      own.next.store(0, std::memory_order_release);
      prepared.fetch_add(1, std::memory_order_release);
      take_items(thread);
    }
    for (bool all = false; !all;) {
      all = prepared.load(std::memory_order_acquire) == groups;  // before the last look
      for (int64_t i = 1; i < threads; ++i) take_items((thread + i) % threads);
      if (!all) std::this_thread::yield();
    }
    leave();
  });
}

// A sequence of loops in one team of threads. Each deals its items, in parts that grow smaller, to whoever is free, and
// is left when all items are done, whoever did them: a thread that the system has put aside, or that has not yet woken,
// holds up the others only in the midst of a part.
class Loops {
 public:
  struct alignas(64) Counts {
    std::atomic<int64_t> next{0};
    alignas(64) std::atomic<int64_t> done{0};
  };
  // `counts`: of all loops, zero and shared by the team; `threads`: of the team.
  Loops(Counts* counts, int64_t threads) : counts_(counts), threads_(threads) {}

  // Calls body(begin, end) on parts of [0, n), each but the last a multiple of `grain`, and prepare() before this
  // thread's first, if it gets any. What a part computes must not depend on which thread runs it.
  template <class Prepare, class Body>
  void run(int64_t n, int64_t grain, const Prepare& prepare, const Body& body) {
    Counts& counts = *counts_++;
    bool prepared = false;
    int64_t begin = counts.next.load(std::memory_order_relaxed);
    while (begin < n) {
      const int64_t fair = (n - begin) / (2 * threads_) / grain * grain;
      const int64_t end = std::min(n, begin + std::max(grain, fair));
      if (!counts.next.compare_exchange_weak(begin, end, std::memory_order_relaxed)) continue;
      if (!prepared) prepare();
      prepared = true;
      body(begin, end);
      counts.done.fetch_add(end - begin, std::memory_order_release);
      begin = end;
      if (end < n) begin = counts.next.load(std::memory_order_relaxed);
    }
    for (int spins = 0; counts.done.load(std::memory_order_acquire) < n; ++spins) {
      if (spins > kSpins) std::this_thread::yield();
#if defined(__x86_64__)
      __builtin_ia32_pause();
#endif
    }
  }

 private:
  static constexpr int kSpins = 1000;  // some 20 us
  Counts* counts_;
  const int64_t threads_;
};

}  // namespace llama_fast::cpu
