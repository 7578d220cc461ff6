// SPDX-License-Identifier: Apache-2.0
// Calls of prefix_attention from several threads at once, each of which splits into threads of its
// own; every result must equal, bit for bit, the one that the call gives alone. Built without
// OpenMP, whose runtime ThreadSanitizer cannot see into: parallel_tasks below stands in for it, and
// parallel.cpp keeps the workspace (tests/test_cpu_backend.py compiles it with its own
// parallel_tasks renamed).
#include <atomic>
#include <cstdio>
#include <cstring>
#include <thread>
#include <vector>

#include "../cpu/dispatch.h"
#include "../cpu/parallel.h"
#include "../cpu/prefix_attention.h"

namespace softprompt_fast {

void parallel_tasks(int64_t tasks, int threads, void (*body)(void*, int64_t, int), void* context) {
  std::atomic<int64_t> next{0};
  const auto work = [&](int thread) {
    for (int64_t task; (task = next.fetch_add(1, std::memory_order_relaxed)) < tasks;) {
      body(context, task, thread);
    }
  };
  std::vector<std::thread> others;
  for (int thread = 1; thread < threads; ++thread) others.emplace_back(work, thread);
  work(0);
  for (std::thread& other : others) other.join();
}

namespace {

struct Shape {
  int64_t batch, q_heads, kv_heads, queries, own, prefix, head_dim;
};

// Decode and prefill, with one split of the keys and with several, over whole and odd vectors.
constexpr Shape kShapes[] = {
    {8, 6, 2, 1, 12, 300, 32},  {1, 4, 1, 1, 9, 1500, 64},  {2, 4, 2, 40, 40, 130, 24},
    {1, 2, 2, 70, 70, 0, 48},   {5, 3, 3, 3, 11, 64, 17},   {1, 8, 2, 1, 700, 700, 40},
    {16, 9, 3, 1, 32, 128, 64}, {3, 2, 1, 17, 33, 257, 65},
};
constexpr int kCallers = sizeof(kShapes) / sizeof(kShapes[0]);
constexpr int kRounds = 6;

std::vector<float> numbers(int64_t count, uint32_t seed) {
  std::vector<float> made(count);
  for (float& x : made) {
    seed = seed * 1664525u + 1013904223u;
    x = static_cast<float>(seed >> 8) / (1 << 23) - 1.0f;
  }
  return made;
}

Tensor dense(std::vector<float>& data, const int64_t (&sizes)[4]) {
  Tensor tensor;
  tensor.data = data.data();
  int64_t stride = 1;
  for (int i = 3; i >= 0; --i) {
    tensor.stride[i] = stride;
    stride *= sizes[i];
  }
  return tensor;
}

// out, then lse.
std::vector<float> attend(const Shape& s) {
  auto query = numbers(s.batch * s.q_heads * s.queries * s.head_dim, 1);
  auto key = numbers(s.batch * s.kv_heads * s.own * s.head_dim, 2);
  auto value = numbers(s.batch * s.kv_heads * s.own * s.head_dim, 3);
  auto prefix_key = numbers(s.kv_heads * s.prefix * s.head_dim, 4);
  auto prefix_value = numbers(s.kv_heads * s.prefix * s.head_dim, 5);
  const size_t lse = query.size();
  std::vector<float> result(lse + s.batch * s.q_heads * s.queries, -1.0f);
  PrefixAttention op = {};
  op.batch = s.batch, op.q_heads = s.q_heads, op.kv_heads = s.kv_heads;
  op.groups = s.q_heads / s.kv_heads;
  op.queries = s.queries, op.own = s.own, op.packed = s.prefix;
  op.head_dim = op.v_dim = s.head_dim;
  op.query = dense(query, {s.batch, s.q_heads, s.queries, s.head_dim});
  op.key = dense(key, {s.batch, s.kv_heads, s.own, s.head_dim});
  op.value = dense(value, {s.batch, s.kv_heads, s.own, s.head_dim});
  // A prefix has no batch dimension: its strides stand in places 0, 1 and 2.
  op.prefix_key = dense(prefix_key, {s.kv_heads, s.prefix, s.head_dim, 1});
  op.prefix_value = dense(prefix_value, {s.kv_heads, s.prefix, s.head_dim, 1});
  op.out = dense(result, {s.batch, s.q_heads, s.queries, s.head_dim});
  op.lse = result.data() + lse;
  op.scale = 0.2f;
  op.causal = true;
  op.scale_block = 1;
  run_prefix_attention(op, PrefixAttentionRows(), 3);
  return result;
}

}  // namespace
}  // namespace softprompt_fast

int main() {
  using namespace softprompt_fast;
  int wrong = 0;
  for (const std::string& isa : available_isas()) {
    use_isa(isa);
    std::vector<std::vector<float>> alone;
    for (const Shape& shape : kShapes) alone.push_back(attend(shape));
    std::atomic<int> different{0};
    std::vector<std::thread> callers;
    for (int caller = 0; caller < kCallers; ++caller) {
      callers.emplace_back([&, caller] {
        for (int round = 0; round < kRounds; ++round) {
          const int which = (caller + round) % kCallers;
          const auto found = attend(kShapes[which]);
          const auto& expected = alone[which];
          different += std::memcmp(found.data(), expected.data(), 4 * expected.size()) != 0;
        }
      });
    }
    for (std::thread& caller : callers) caller.join();
    std::printf("%s: %d of %d calls differ\n", isa.c_str(), different.load(), kCallers * kRounds);
    wrong += different;
  }
  return wrong != 0;
}
