// SPDX-License-Identifier: Apache-2.0
// The host side of prefix_attention's backward: the plan, and its execution.
#include "prefix_attention_backward.h"

#include <algorithm>
#include <vector>

#include "dispatch.h"
#include "parallel.h"
#include "prefix_attention_rows.h"

namespace softprompt_fast {
namespace {

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace

PrefixAttentionBackwardPlan plan_prefix_attention_backward(int64_t batch, int64_t per_row,
                                                           int64_t kv_heads, int threads) {
  const bool whole_rows = per_row <= kGradientBlock;
  const int64_t block = whole_rows ? kGradientBlock / per_row * per_row
                                   : padded(ceil_div(per_row, ceil_div(per_row, kGradientBlock)));
  const int64_t row_blocks = ceil_div(per_row, block);
  PrefixAttentionBackwardPlan plan = {block, batch, 0};
  // Queries that the busiest thread takes; one more chunk has to save a twentieth of them.
  int64_t span = ceil_div(kv_heads, threads) * batch * per_row;
  const auto consider = [&](int64_t tasks, int64_t chunk, int64_t rows, int64_t blocks) {
    const int64_t found = ceil_div(tasks, threads) * chunk;
    if (20 * found >= 19 * span) return;
    span = found;
    plan.chunk_rows = rows;
    plan.row_blocks = blocks;
  };
  const int64_t most = ceil_div(2 * threads, kv_heads);  // chunks of a head
  for (int64_t chunks = 2; chunks <= std::min(batch, most); ++chunks) {
    const int64_t rows = ceil_div(batch, chunks);
    consider(kv_heads * ceil_div(batch, rows), rows * per_row, rows, 0);
  }
  for (int64_t cuts = 2; cuts <= row_blocks && cuts * batch <= most; ++cuts) {
    const int64_t blocks = ceil_div(row_blocks, cuts);
    consider(kv_heads * batch * ceil_div(row_blocks, blocks), blocks * block, 1, blocks);
  }
  return plan;
}

void run_prefix_attention_backward(PrefixAttentionBackward& op, const PrefixAttentionRows& rows,
                                   int threads) {
  PrefixAttention& forward = op.forward;
  if (forward.batch == 0 || forward.queries == 0 || forward.q_heads == 0) return;
  thread_local PlacedRows placed;
  thread_local std::vector<GradientChunk> chunks;
  thread_local std::vector<GradientSum> sums;
  place_rows(forward, rows, placed);

  // As in forward: not worth a second thread below some 10 us.
  const double work = 2.5 * forward.batch * forward.q_heads * forward.queries *
                      (placed.longest + forward.own) *
                      static_cast<double>(forward.head_dim + forward.v_dim);
  if (work < 1 << 19) threads = 1;
  const int64_t per_row = forward.queries * forward.groups;
  const PrefixAttentionBackwardPlan plan =
      plan_prefix_attention_backward(forward.batch, per_row, forward.kv_heads, threads);
  const bool cut = plan.row_blocks > 0;
  const int64_t width = gradient_width(forward.head_dim, forward.v_dim);
  const int64_t slice = cut ? plan.row_blocks * plan.block_size : plan.chunk_rows * per_row;

  chunks.clear();
  sums.clear();
  int64_t partials = 0;
  const auto add_sums = [&](bool prefix, int64_t row, int64_t head, int64_t first, int64_t size,
                            int64_t partial, int64_t stride, int64_t count) {
    for (int64_t at = 0; at < size; at += kKeyBlock) {
      sums.push_back({prefix, row, head, first + at, std::min(kKeyBlock, size - at),
                      partial + at * width, stride, count});
    }
  };
  int64_t begin = 0;
  for (const int64_t end : placed.ends) {
    if (begin == end) continue;
    const RowView& any = placed.views[begin];
    const int64_t stride = (any.prefix_size + (cut ? forward.own : 0)) * width;
    for (int64_t head = 0; head < forward.kv_heads; ++head) {
      const int64_t head_partial = partials;
      int64_t head_chunks = 0;
      for (int64_t row = begin; row < end; row += plan.chunk_rows) {
        const int64_t stacked = std::min(plan.chunk_rows, end - row) * per_row;
        const int64_t row_partial = partials;
        for (int64_t first = 0; first < stacked; first += slice, ++head_chunks) {
          chunks.push_back({{row, first, std::min(slice, stacked - first), head}, partials});
          partials += stride;
        }
        if (cut) {
          add_sums(false, placed.views[row].row, head, 0, forward.own,
                   row_partial + any.prefix_size * width, stride, ceil_div(stacked, slice));
        }
      }
      add_sums(true, 0, head, any.prefix_first, any.prefix_size, head_partial, stride, head_chunks);
    }
    begin = end;
  }

  forward.views = placed.views.data();
  op.chunks = chunks.data();
  op.sums = sums.data();
  op.block_size = plan.block_size;
  op.rows_cut = cut;
  const int64_t scratch =
      gradient_scratch(plan.block_size, forward.own, forward.head_dim, forward.v_dim);
  float* memory = static_cast<float*>(workspace((threads * scratch + partials) * sizeof(float)));
  op.partials = memory + threads * scratch;
  const Kernels& isa = kernels();
  parallel_for(static_cast<int64_t>(chunks.size()), threads, [&](int64_t task, int thread) {
    isa.prefix_attention_backward(op, task, memory + thread * scratch);
  });
  parallel_for(static_cast<int64_t>(sums.size()), threads, [&](int64_t task, int thread) {
    isa.prefix_attention_backward_sum(op, task, memory + thread * scratch);
  });
}

}  // namespace softprompt_fast
