// SPDX-License-Identifier: Apache-2.0
// Threads and scratch memory of the CPU kernels.
#pragma once

#include <cstddef>
#include <cstdint>

namespace softprompt_fast {

// Run body(context, task, thread) for every task in 0..tasks-1 on at most `threads` threads, and
// return when all are done. Tasks go to whoever is free, so a task's result must not depend on its
// thread. OpenMP, whose runtime (and so whose threads) PyTorch has loaded already; serial in a
// build without it.
void parallel_tasks(int64_t tasks, int threads, void (*body)(void*, int64_t, int), void* context);

template <typename Body>
void parallel_for(int64_t tasks, int threads, Body&& body) {
  if (threads <= 1 || tasks <= 1) {
    for (int64_t task = 0; task < tasks; ++task) body(task, 0);
    return;
  }
  parallel_tasks(
      tasks, threads,
      [](void* b, int64_t task, int thread) { (*static_cast<Body*>(b))(task, thread); }, &body);
}

// Memory of the calling thread for one op call, aligned to 64 bytes. Kept for the next call and
// grown only, so that a decode step allocates nothing after the first; above 256 MB it is given
// back. Valid until the same thread asks again.
void* workspace(size_t bytes);

// How often workspace() had to allocate, over all threads: for tests.
int64_t workspace_allocations();

// Cuts one block of memory into arrays, each aligned to 64 bytes. First pass without memory: count.
class Carver {
 public:
  explicit Carver(void* memory = nullptr) : base_(static_cast<char*>(memory)) {}

  template <typename T>
  T* take(int64_t count) {
    char* here = base_ ? base_ + used_ : nullptr;
    used_ += (static_cast<size_t>(count) * sizeof(T) + 63) / 64 * 64;
    return reinterpret_cast<T*>(here);
  }
  size_t used() const { return used_; }

 private:
  char* base_;
  size_t used_ = 0;
};

}  // namespace softprompt_fast
