// SPDX-License-Identifier: Apache-2.0
// The host side of prefix_attention: rows sorted by their prefix, the plan, and its execution.
#include "prefix_attention.h"

#include <algorithm>
#include <vector>

#include "dispatch.h"
#include "parallel.h"
#include "prefix_attention_rows.h"

namespace softprompt_fast {
namespace {

constexpr int64_t kMaxBlock = 96;  // queries: their scores, states and a key block fit the L2 cache
constexpr int64_t kQueryWork = 32;  // reading and writing a query costs what so many keys do
constexpr int64_t kMinBlock = 48;   // below, reading the keys once a block would show

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace

PrefixAttentionPlan plan_prefix_attention(int64_t stacked, int64_t per_row, int64_t kv_heads,
                                          int64_t keys, int threads) {
  // A block holds whole rows where they fit, so that a row's own keys are read once; else equal
  // parts of one row, in multiples of the vectors' lanes.
  const bool whole_rows = per_row <= kMaxBlock;
  const int64_t unit = whole_rows ? stacked : per_row, step = whole_rows ? per_row : kMaxLanes;
  const auto size_of = [&](int64_t blocks) {
    return ceil_div(ceil_div(unit, blocks), step) * step;
  };
  const auto tasks_of = [&](int64_t size) {
    return kv_heads * ceil_div(unit, size) * ceil_div(stacked, unit);
  };
  const auto even = [&](int64_t tasks) {
    return tasks >= 4 * threads || (tasks >= threads && tasks % threads == 0);
  };
  int64_t blocks = ceil_div(unit, kMaxBlock), size = size_of(blocks);
  while (!even(tasks_of(size)) && unit / (blocks + 1) >= kMinBlock) size = size_of(++blocks);
  const int64_t tasks = tasks_of(size);
  if (even(tasks)) return {size, 1};
  const int64_t splits = std::min(ceil_div(4 * threads, tasks), keys / (2 * kKeyBlock));
  return {size, std::max<int64_t>(splits, 1)};
}

void place_rows(const PrefixAttention& op, const PrefixAttentionRows& rows, PlacedRows& placed) {
  const int64_t prefixes = rows.prefix_offsets ? rows.prefix_offsets.size - 1 : 1;
  const auto prefix_of = [&](int64_t row) {
    const int64_t prefix = rows.prefix_index ? rows.prefix_index[row] : 0;
    return prefix < 0 ? prefixes : prefix;
  };
  std::vector<int64_t>& ends = placed.ends;  // until the rows are placed: where they begin
  ends.assign(prefixes + 2, 0);
  for (int64_t row = 0; row < op.batch; ++row) ++ends[prefix_of(row) + 1];
  placed.largest = placed.longest = 0;
  for (int64_t prefix = 0; prefix <= prefixes; ++prefix) {
    placed.largest = std::max(placed.largest, ends[prefix + 1]);
    ends[prefix + 1] += ends[prefix];
  }
  ends.pop_back();
  placed.views.resize(op.batch);
  for (int64_t row = 0; row < op.batch; ++row) {
    const int64_t prefix = prefix_of(row);
    RowView& view = placed.views[ends[prefix]++];
    view.row = row;
    view.prefix_first = view.prefix_size = 0;
    if (prefix < prefixes) {
      view.prefix_first = rows.prefix_offsets ? rows.prefix_offsets[prefix] : 0;
      const int64_t end = rows.prefix_offsets ? rows.prefix_offsets[prefix + 1] : op.packed;
      view.prefix_size = end - view.prefix_first;
    }
    placed.longest = std::max(placed.longest, view.prefix_size);
    view.own_first = rows.own_start ? rows.own_start[row] : 0;
    view.own_last = rows.own_end ? rows.own_end[row] : op.own;
    // Far out, every position sees the same; without the limit its sums would overflow.
    view.query_start =
        rows.query_start ? std::clamp(rows.query_start[row], -kFar, kFar) : op.own - op.queries;
  }
}

void run_prefix_attention(PrefixAttention& op, const PrefixAttentionRows& rows, int threads) {
  if (op.batch == 0 || op.queries == 0 || op.q_heads == 0) return;
  // Kept between calls, as the workspace is: a decode step allocates nothing.
  thread_local PlacedRows placed;
  thread_local std::vector<QueryBlock> blocks;
  place_rows(op, rows, placed);

  // The work decides whether a second thread is worth waking: not for less than some 10 us.
  const double work = 1.0 * op.batch * op.q_heads * op.queries *
                      (kQueryWork + placed.longest + op.own) *
                      static_cast<double>(op.head_dim + op.v_dim);
  if (work < 1 << 19) threads = 1;
  const int64_t per_row = op.queries * op.groups;
  const PrefixAttentionPlan plan = plan_prefix_attention(
      placed.largest * per_row, per_row, op.kv_heads, placed.longest + op.own, threads);

  blocks.clear();
  int64_t begin = 0;
  for (const int64_t end : placed.ends) {
    const int64_t stacked = (end - begin) * per_row;
    for (int64_t head = 0; head < op.kv_heads; ++head) {
      for (int64_t first = 0, count; first < stacked; first += count) {
        count = std::min(plan.block_size, stacked - first);
        // A block that holds no whole row ends with its row.
        if (per_row > plan.block_size) count = std::min(count, per_row - first % per_row);
        blocks.push_back({begin, first, count, head});
      }
    }
    begin = end;
  }

  op.views = placed.views.data();
  op.blocks = blocks.data();
  op.num_blocks = static_cast<int64_t>(blocks.size());
  op.block_size = plan.block_size;
  op.splits = plan.splits;
  const int64_t scratch = prefix_attention_scratch(plan.block_size, op.head_dim, op.v_dim);
  const int64_t partials =
      plan.splits > 1 ? op.num_blocks * plan.splits * plan.block_size * partial_width(op.v_dim) : 0;
  float* memory = static_cast<float*>(workspace((threads * scratch + partials) * sizeof(float)));
  op.partials = memory + threads * scratch;

  const Kernels& isa = kernels();
  parallel_for(op.num_blocks * op.splits, threads, [&](int64_t task, int thread) {
    isa.prefix_attention(op, task, memory + thread * scratch);
  });
  if (op.splits > 1) {
    parallel_for(op.num_blocks, threads, [&](int64_t block, int thread) {
      isa.prefix_attention_merge(op, block, memory + thread * scratch);
    });
  }
}

}  // namespace softprompt_fast
