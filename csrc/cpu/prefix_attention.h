// SPDX-License-Identifier: Apache-2.0
// prefix_attention: arguments, and the plan that splits a call into tasks.
#pragma once

#include "kernels.h"

namespace softprompt_fast {

// What one row of the batch sees, in entries of the pack and of its own keys.
struct RowView {
  int64_t row;           // its place in the batch
  int64_t prefix_first;  // entry of the pack where its prefix starts
  int64_t prefix_size;
  int64_t own_first, own_last;  // [own_start, own_end)
  int64_t query_start;          // own position of its first query
};

// Queries that one task stacks: `count` of a key/value head's queries of rows that share a prefix,
// from place `first` in the order (row, query, group) of the rows views[row_begin ...].
struct QueryBlock {
  int64_t row_begin;
  int64_t first, count;
  int64_t kv_head;
};

struct PrefixAttention {
  int64_t batch, q_heads, kv_heads, groups, queries, own, packed, head_dim, v_dim;
  Tensor query, key, value;         // [B, Hq, S, D], [B, Hkv, T, D], [B, Hkv, T, Dv]
  Tensor prefix_key, prefix_value;  // [Hkv, L, D], [Hkv, L, Dv]: strides 0, 1, 2
  // int8 prefixes: float scales [Hkv, ceil(L / scale_block)], dense.
  const float* prefix_key_scale;
  const float* prefix_value_scale;
  int64_t scale_block, scale_stride;
  Tensor out;            // [B, Hq, S, Dv]
  float* lse;            // [B, Hq, S], dense
  float scale, softcap;  // softcap 0: none
  bool causal;
  int64_t window;        // 0: none
  const float* sinks;    // [Hq] or null
  Tensor bias;           // [B, Hq, S, W + T], stride 0 where it broadcasts; data null: none
  int64_t bias_columns;  // W, the columns that belong to the prefix

  // The plan.
  const RowView* views;  // B of them, rows of one prefix next to each other
  const QueryBlock* blocks;
  int64_t num_blocks, splits;  // task = block * splits + split
  int64_t block_size;          // queries a block holds at most
  float* partials;             // [num_blocks, splits, block_size, partial_width] where splits > 1
};

constexpr int64_t kKeyBlock = 64;  // keys scored at a time
constexpr int64_t kMaxLanes = 16;
constexpr int64_t kFar = int64_t{1} << 60;  // positions and windows further out see the same

constexpr int64_t padded(int64_t n) { return (n + kMaxLanes - 1) / kMaxLanes * kMaxLanes; }

// A partial state: the weighted sum of values, then the running maximum and the sum of weights.
constexpr int64_t partial_width(int64_t v_dim) { return padded(v_dim) + kMaxLanes; }

// Floats of scratch that a task needs, in the order of the kernel's Scratch.
constexpr int64_t prefix_attention_scratch(int64_t block, int64_t head_dim, int64_t v_dim) {
  return block * padded(head_dim)                                  // queries
         + block * partial_width(v_dim)                            // state
         + padded(block) * kKeyBlock                               // scores
         + padded(head_dim) * kKeyBlock                            // keys, transposed
         + kKeyBlock * padded(head_dim)                            // keys as floats
         + kKeyBlock * padded(v_dim)                               // values as floats
         + (padded(head_dim) + padded(v_dim) + 5) * padded(block)  // queries and state, stacked
         + block * 8;                                              // each query's ranges of keys
}

// The op's index tensors, each as in its contract or absent.
struct PrefixAttentionRows {
  Index prefix_offsets, prefix_index, own_start, own_end, query_start;
};

// Fills in the plan and computes out and lse. All arguments have been checked.
void run_prefix_attention(PrefixAttention& op, const PrefixAttentionRows& rows, int threads);

struct PrefixAttentionPlan {
  int64_t block_size, splits;
};

// How many queries a block stacks and into how many runs the keys are split. `stacked`: queries of
// a key/value head over all rows of the largest prefix group; `per_row`: of one row; `keys`: the
// most keys a query sees. Example: 32 rows of one query in 3 groups, 3 heads, 544 keys, 2 threads:
// blocks of 48 (6 tasks, an even load), not split. One row of 4 groups, 8 heads, 4096 keys, 16
// threads: blocks of 4, keys in 8 runs (64 tasks).
PrefixAttentionPlan plan_prefix_attention(int64_t stacked, int64_t per_row, int64_t kv_heads,
                                          int64_t keys, int threads);

}  // namespace softprompt_fast
