// SPDX-License-Identifier: Apache-2.0
// Runs CUDA kernels on the host: what device.cuh stands for where no CUDA compiler reads it. A
// thread is a fiber; one block runs at a time, its threads in random order, in some blocks with
// some warps ahead of all others, each until it meets others (a barrier, a shuffle, a matrix
// product) or ends, and blocks run in random order.
//
// Made to find faults, not to be fast. Shared memory starts as NaN, and each asynchronous copy
// happens at random when it is issued or when it is waited for, and so does a warpgroup's product;
// a barrier or a wait that is missing then shows in the result, mostly at the first run. Reported,
// as std::runtime_error, are: threads that wait for others that never come, warps that disagree
// about what they meet for, addresses that an instruction would not take, and writes behind the
// shared memory that was asked for.
//
// Not modelled: blocks that wait for each other, partial masks, visibility between blocks.
#pragma once

#if defined(_FORTIFY_SOURCE)
#undef _FORTIFY_SOURCE  // its longjmp refuses to change stacks
#endif
#include <setjmp.h>
#include <stdint.h>
#include <string.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __restrict__ __restrict
#define __launch_bounds__(...)
#define __grid_constant__
#define threadIdx (::softprompt_fast::cuda::emulator::thread().index)
#define blockIdx (::softprompt_fast::cuda::emulator::block().index)
#define blockDim (::softprompt_fast::cuda::emulator::block().threads_a_block)
#define gridDim (::softprompt_fast::cuda::emulator::block().grid)

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct alignas(8) uint2 {
  uint32_t x, y;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};

namespace softprompt_fast {
namespace cuda {
namespace emulator {

constexpr int kWarp = 32;
constexpr size_t kStack = 256 << 10, kGuard = 1024, kAligned = 1024;

// xorshift: any order will do, but the same one in every run.
inline uint64_t random_bits() {
  static thread_local uint64_t state = 0x9E3779B97F4A7C15u;
  state ^= state << 13;
  state ^= state >> 7;
  return state ^= state << 17;
}

struct Copy {
  void* to;
  const void* from;
  bool valid, done;
};

// Where threads meet. The last to come runs `complete` over what all have brought.
struct Meeting {
  const char* what = nullptr;
  int expected = 0;
  std::vector<int> threads;
  std::vector<void*> brought;
};

struct Thread {
  dim3 index;
  int number;
  bool finished = false;
  const char* waits_for = nullptr;
  std::vector<std::vector<Copy>> copies{1};  // a committed group each, the last one still open
  bool unfenced = false;                     // copies came since its last fence for tensor cores
  // Of a warp's first thread: its products under way, grouped in the same manner.
  std::vector<std::vector<std::function<void()>>> products{1};
  ucontext_t start;
  jmp_buf resume;
};

class Block {
 public:
  dim3 index, threads_a_block, grid;

  Block(dim3 grid, dim3 threads, size_t shared) : threads_a_block(threads), grid(grid) {
    const int count = threads.x * threads.y * threads.z;
    if (count % kWarp) throw std::runtime_error("emulator: a block of whole warps only");
    if (count > 1024) throw std::runtime_error("emulator: more than 1024 threads in a block");
    threads_.resize(count);
    stacks_ = std::make_unique<char[]>(count * kStack);
    shared_size_ = shared;
    shared_.resize(shared + kGuard + kAligned);
  }

  void run(dim3 at, void (*body)(const void*), const void* params);

  Thread& current() { return *current_; }
  int lane() const { return current_->number % kWarp; }

  Thread& warp_leader() { return threads_[current_->number / kWarp * kWarp]; }
  bool any_unfenced() const {
    return std::any_of(threads_.begin(), threads_.end(), [](const auto& t) { return t.unfenced; });
  }

  unsigned char* shared_memory() {
    return (unsigned char*)(((uintptr_t)shared_.data() + kAligned - 1) & ~uintptr_t{kAligned - 1});
  }
  bool in_shared(const void* p, size_t bytes) {
    const auto* first = shared_memory();
    return p >= first && (const unsigned char*)p + bytes <= first + shared_size_;
  }

  // The current thread brings something to a meeting of `expected` threads.
  template <typename Complete>
  void meet(Meeting& at, const char* what, int expected, void* bring, Complete complete) {
    if (at.threads.empty()) {
      at.what = what;
      at.expected = expected;
    }
    if (at.what != what || at.expected != expected) {
      fail(std::string("threads of one group disagree: ") + at.what + " and " + what);
    }
    at.threads.push_back(current_->number);
    at.brought.push_back(bring);
    if ((int)at.threads.size() < expected) {
      current_->waits_for = what;
      yield();
      return;
    }
    // Emptied first: whoever goes on may come here again.
    const std::vector<int> threads = std::move(at.threads);
    const std::vector<void*> brought = std::move(at.brought);
    at = Meeting();
    complete(threads, brought);
    for (int number : threads) {
      if (number != current_->number) {
        threads_[number].waits_for = nullptr;
        ready_.push_back(number);
      }
    }
    ready_.push_back(current_->number);  // any of them goes on first
    yield();
  }

  // All lanes of the warp bring a `Bring`; complete(lanes) sees lanes[0..31].
  template <typename Bring, typename Complete>
  void warp_meets(const char* what, Bring& bring, Complete complete) {
    meet(warps_[current_->number / kWarp], what, kWarp, &bring,
         [&](const std::vector<int>& threads, const std::vector<void*>& brought) {
           Bring* lanes[kWarp];
           for (int i = 0; i < kWarp; ++i) lanes[threads[i] % kWarp] = (Bring*)brought[i];
           complete(lanes);
         });
  }

  void barrier(int id, int expected) {
    if (id < 0 || id > 15) fail("a named barrier is 0 to 15");
    if (expected % kWarp) fail("a barrier is for whole warps");
    static const char* const kNames[] = {"barrier 0",  "barrier 1",  "barrier 2",  "barrier 3",
                                         "barrier 4",  "barrier 5",  "barrier 6",  "barrier 7",
                                         "barrier 8",  "barrier 9",  "barrier 10", "barrier 11",
                                         "barrier 12", "barrier 13", "barrier 14", "barrier 15"};
    meet(barriers_[id], kNames[id], expected, nullptr,
         [](const std::vector<int>&, const std::vector<void*>&) {});
  }

  [[noreturn]] void fail(const std::string& why) {
    error_ = "emulator: block (" + std::to_string(index.x) + ", " + std::to_string(index.y) + ", " +
             std::to_string(index.z) + "), thread " + std::to_string(current_->number) + ": " + why;
    _longjmp(scheduler_, 1);
  }

 private:
  void yield() {
    if (_setjmp(current_->resume) == 0) _longjmp(scheduler_, 1);
  }
  static void enter();
  void resume(int number);

  std::vector<Thread> threads_;
  std::unique_ptr<char[]> stacks_;
  std::vector<unsigned char> shared_;
  size_t shared_size_;
  std::vector<int> ready_;
  Meeting warps_[32], barriers_[16];
  Thread* current_ = nullptr;
  ucontext_t origin_;
  jmp_buf scheduler_;
  void (*body_)(const void*);
  const void* params_;
  std::string error_;
};

inline thread_local Block* running = nullptr;
inline Block& block() { return *running; }
inline Thread& thread() { return running->current(); }

inline void Block::enter() {
  Block& self = *running;
  self.body_(self.params_);
  self.current_->finished = true;
  _longjmp(self.scheduler_, 1);
}

// Not inlined: locals of a function that calls setjmp must not change between it and longjmp.
__attribute__((noinline)) inline void Block::resume(int number) {
  current_ = &threads_[number];
  if (_setjmp(scheduler_) == 0) {
    if (current_->start.uc_stack.ss_sp != nullptr) {
      ucontext_t start = current_->start;
      current_->start.uc_stack.ss_sp = nullptr;  // it has started
      setcontext(&start);
    }
    _longjmp(current_->resume, 1);
  }
}

inline void Block::run(dim3 at, void (*body)(const void*), const void* params) {
  index = at;
  body_ = body;
  params_ = params;
  error_.clear();
  running = this;
  memset(shared_.data(), 0xFF, shared_.size());
  for (Meeting& meeting : warps_) meeting = Meeting();
  for (Meeting& meeting : barriers_) meeting = Meeting();
  ready_.clear();
  for (int i = 0; i < (int)threads_.size(); ++i) {
    Thread& thread = threads_[i] = Thread();
    thread.number = i;
    const unsigned x = threads_a_block.x, y = threads_a_block.y;
    thread.index = dim3(i % x, i / x % y, i / x / y);
    getcontext(&thread.start);
    thread.start.uc_stack.ss_sp = stacks_.get() + i * kStack;
    thread.start.uc_stack.ss_size = kStack;
    thread.start.uc_link = &origin_;
    makecontext(&thread.start, (void (*)())&Block::enter, 0);
    ready_.push_back(i);
  }
  // In half of the blocks some warps run as far ahead as they can.
  const uint64_t favoured = random_bits() & 1 ? random_bits() : 0;
  while (!ready_.empty() && error_.empty()) {
    std::swap(ready_[random_bits() % ready_.size()], ready_.back());
    for (int i = (int)ready_.size(); favoured && i > 0; --i) {
      if (favoured >> ready_[i - 1] / kWarp & 1) {
        std::swap(ready_[i - 1], ready_.back());
        break;
      }
    }
    const int next = ready_.back();
    ready_.pop_back();
    resume(next);
  }
  for (const Thread& thread : threads_) {
    if (!thread.finished && error_.empty()) {
      current_ = &threads_[thread.number];
      error_ = "emulator: thread " + std::to_string(thread.number) + " waits for ever at " +
               thread.waits_for + ", others have ended or wait elsewhere";
    }
  }
  const auto* behind = shared_memory() + shared_size_;
  if (error_.empty() && std::any_of(behind, behind + kGuard, [](auto x) { return x != 0xFF; })) {
    error_ = "emulator: a write behind the shared memory that was asked for";
  }
  running = nullptr;
  if (!error_.empty()) throw std::runtime_error(error_);
}

template <typename Kernel, typename... Params>
void run(Kernel kernel, dim3 grid, dim3 threads, size_t shared, const Params&... params) {
  Block block(grid, threads, shared);
  std::vector<uint64_t> order(uint64_t{grid.x} * grid.y * grid.z);
  for (size_t i = 0; i < order.size(); ++i) {
    order[i] = i;
    std::swap(order[i], order[random_bits() % (i + 1)]);
  }
  const auto call = [&] { kernel(params...); };
  for (uint64_t i : order) {
    block.run(
        dim3(i % grid.x, i / grid.x % grid.y, i / grid.x / grid.y),
        [](const void* call_) { (*(const decltype(call)*)call_)(); }, &call);
  }
}

inline void check_address(const void* p, size_t alignment, const char* instruction) {
  if ((uintptr_t)p % alignment) {
    block().fail(std::string(instruction) + ": an address that is no multiple of " +
                 std::to_string(alignment));
  }
}

inline void check_shared(const void* p, size_t bytes, const char* instruction) {
  check_address(p, bytes, instruction);
  if (!block().in_shared(p, bytes)) {
    block().fail(std::string(instruction) + ": an address outside shared memory");
  }
}

inline void perform(Copy& copy) {
  if (copy.done) return;
  copy.done = true;
  if (copy.valid) {
    memcpy(copy.to, copy.from, 16);
  } else {
    memset(copy.to, 0, 16);
  }
}

}  // namespace emulator
}  // namespace cuda
}  // namespace softprompt_fast

// ---- what CUDA C++ itself has, under its names ----

inline void __syncthreads() {
  auto& block = softprompt_fast::cuda::emulator::block();
  const dim3 size = block.threads_a_block;
  block.barrier(0, size.x * size.y * size.z);
}

inline void __threadfence() {}

namespace softprompt_fast {
namespace cuda {
namespace emulator {

inline void check_mask(unsigned mask) {
  if (mask != 0xFFFFFFFFu) block().fail("a partial mask, which is not emulated");
}

template <typename T, typename Source>
T shuffle(const char* what, unsigned mask, T value, Source source) {
  check_mask(mask);
  struct Bring {
    T value;
    int source;
    T result;
  } bring{value, source(block().lane()), T()};
  block().warp_meets(what, bring, [](Bring** lanes) {
    for (int i = 0; i < kWarp; ++i) {
      const int from = lanes[i]->source;
      lanes[i]->result = from >= 0 && from < kWarp ? lanes[from]->value : lanes[i]->value;
    }
  });
  return bring.result;
}

}  // namespace emulator
}  // namespace cuda
}  // namespace softprompt_fast

template <typename T>
T __shfl_sync(unsigned mask, T value, int lane) {
  return softprompt_fast::cuda::emulator::shuffle("__shfl_sync", mask, value,
                                                  [=](int) { return lane & 31; });
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int bits) {
  return softprompt_fast::cuda::emulator::shuffle("__shfl_xor_sync", mask, value,
                                                  [=](int lane) { return lane ^ bits; });
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, int delta) {
  return softprompt_fast::cuda::emulator::shuffle("__shfl_up_sync", mask, value,
                                                  [=](int lane) { return lane - delta; });
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, int delta) {
  return softprompt_fast::cuda::emulator::shuffle("__shfl_down_sync", mask, value,
                                                  [=](int lane) { return lane + delta; });
}

inline unsigned __ballot_sync(unsigned mask, int predicate) {
  using namespace softprompt_fast::cuda::emulator;
  check_mask(mask);
  struct Bring {
    bool set;
    unsigned result;
  } bring{predicate != 0, 0};
  block().warp_meets("__ballot_sync", bring, [](Bring** lanes) {
    unsigned result = 0;
    for (int i = 0; i < kWarp; ++i) result |= unsigned{lanes[i]->set} << i;
    for (int i = 0; i < kWarp; ++i) lanes[i]->result = result;
  });
  return bring.result;
}
inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline int __all_sync(unsigned mask, int predicate) { return __ballot_sync(mask, !predicate) == 0; }

inline void __syncwarp(unsigned mask = 0xFFFFFFFFu) {
  using namespace softprompt_fast::cuda::emulator;
  check_mask(mask);
  char nothing = 0;
  block().warp_meets("__syncwarp", nothing, [](char**) {});
}

template <typename T, typename U>
T atomicAdd(T* to, U value) {
  const T before = *to;
  *to = before + (T)value;
  return before;
}
template <typename T, typename U>
T atomicMax(T* to, U value) {
  const T before = *to;
  *to = std::max(before, (T)value);
  return before;
}
template <typename T, typename U>
T atomicExch(T* to, U value) {
  const T before = *to;
  *to = (T)value;
  return before;
}
inline unsigned atomicInc(unsigned* to, unsigned limit) {
  const unsigned before = *to;
  *to = before >= limit ? 0 : before + 1;
  return before;
}
