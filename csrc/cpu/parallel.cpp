// SPDX-License-Identifier: Apache-2.0
#include "parallel.h"

#include <atomic>
#include <cstdlib>
#include <new>

#if defined(_OPENMP)
#include <omp.h>
#endif

namespace softprompt_fast {
namespace {

constexpr size_t kKept = size_t{256} << 20;
std::atomic<int64_t> allocations{0};

struct Memory {
  void* data = nullptr;
  size_t size = 0;

  void resize(size_t bytes) {
    std::free(data);
    data = nullptr;
    size = 0;
    if (bytes == 0) return;
    data = std::aligned_alloc(64, (bytes + 63) / 64 * 64);
    if (data == nullptr) throw std::bad_alloc();
    size = bytes;
    ++allocations;
  }
  ~Memory() { std::free(data); }
};

}  // namespace

void parallel_tasks(int64_t tasks, int threads, void (*body)(void*, int64_t, int), void* context) {
#if defined(_OPENMP)
  const int used = static_cast<int>(tasks < threads ? tasks : threads);
  // Each thread walks a run of its own from the front, then helps the others with theirs: tasks
  // that follow one another read memory that does, and what one of them asks for early is then
  // found in the cache of the core that needs it. One line a counter, or the threads would wait for
  // each other's.
  struct alignas(64) Run {
    std::atomic<int64_t> next;
    int64_t end;
  };
  constexpr int kRuns = 64;
  Run runs[kRuns];
  const int count = used < kRuns ? used : kRuns;
  for (int run = 0; run < count; ++run) {
    runs[run].next.store(tasks * run / count, std::memory_order_relaxed);
    runs[run].end = tasks * (run + 1) / count;
  }
#pragma omp parallel num_threads(used)
  {
    const int thread = omp_get_thread_num();
    for (int other = 0; other < count; ++other) {
      Run& run = runs[(thread + other) % count];
      for (;;) {
        const int64_t task = run.next.fetch_add(1, std::memory_order_relaxed);
        if (task >= run.end) break;
        body(context, task, thread);
      }
    }
  }
#else
  (void)threads;
  for (int64_t task = 0; task < tasks; ++task) body(context, task, 0);
#endif
}

void* workspace(size_t bytes) {
  thread_local Memory memory;
  const bool hoards = memory.size > kKept && bytes <= kKept;
  if (memory.size < bytes || hoards) memory.resize(bytes);
  return memory.data;
}

int64_t workspace_allocations() { return allocations; }

}  // namespace softprompt_fast
