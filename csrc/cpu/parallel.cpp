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
#pragma omp parallel for schedule(dynamic, 1) num_threads(used)
  for (int64_t task = 0; task < tasks; ++task) body(context, task, omp_get_thread_num());
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
