// SPDX-License-Identifier: Apache-2.0
// prefix_attention backward: arguments, and the plan that splits a call into tasks.
//
// A chunk of a key/value head's stacked queries is a task. It owns the gradients of its queries. It
// also owns those of its rows' own keys and values, unless a row is cut into several chunks; these,
// and what the chunk adds to the prefix, it sums up in a partial of its own. The partials are then
// added in the order of the chunks: no atomics, and the same result at every call.
#pragma once

#include "prefix_attention.h"

namespace softprompt_fast {

struct GradientChunk {
  QueryBlock queries;
  int64_t partial;  // where in `partials` its own starts, [entries, gradient_width]
};

// A run of a key/value head's gradients, each the sum over `chunks` partials.
struct GradientSum {
  bool prefix;
  int64_t row;  // of the batch; own keys only
  int64_t kv_head;
  int64_t first, count;  // entries of the pack or own keys
  int64_t partial,
      stride;  // where the first chunk's partial has them, from one chunk's to the next
  int64_t chunks;
};

struct PrefixAttentionBackward {
  PrefixAttention forward;                    // arguments and results; of its plan only the views
  Tensor grad_out;                            // [B, Hq, S, Dv]
  const float* grad_lse;                      // [B, Hq, S], dense, or null
  Tensor grad_query, grad_key, grad_value;    // [B, Hq, S, D], [B, Hkv, T, D], [B, Hkv, T, Dv]
  Tensor grad_prefix_key, grad_prefix_value;  // [Hkv, L, D], [Hkv, L, Dv]: zeros on entry
  float* delta;  // [B, Hq, S], dense, or null: sum_d grad_out out - grad_lse, for the sinks

  // The plan.
  const GradientChunk* chunks;
  const GradientSum* sums;
  int64_t block_size;  // queries taken at a time
  bool rows_cut;       // whether a row's queries may stand in several chunks
  float* partials;
};

// Queries taken at a time at most: they and grad_out, both also transposed, dQ and a run of keys
// fit the L2 cache.
constexpr int64_t kGradientBlock = 96;

// Rows of scratch lie an odd number of cache lines apart: 2^n would map a column of them to few
// sets.
constexpr int64_t spread(int64_t n) {
  return padded(n) / kMaxLanes % 2 ? padded(n) : padded(n) + kMaxLanes;
}

// One entry's gradients: of its key, then of its value.
constexpr int64_t gradient_width(int64_t head_dim, int64_t v_dim) {
  return padded(head_dim) + padded(v_dim);
}

// Floats of scratch that a task needs, in the order of the kernel's GradientScratch.
constexpr int64_t gradient_scratch(int64_t block, int64_t own, int64_t head_dim, int64_t v_dim) {
  const int64_t lanes = spread(block + kMaxLanes);
  return 2 * block * spread(head_dim)             // queries and their gradients
         + block * spread(v_dim)                  // grad_out
         + lanes * padded(head_dim)               // queries, transposed
         + lanes * padded(v_dim)                  // grad_out, transposed
         + 3 * kKeyBlock * lanes                  // weights, gradients of scores, bias
         + kKeyBlock * spread(head_dim)           // keys
         + kKeyBlock * spread(v_dim)              // values
         + own * gradient_width(head_dim, v_dim)  // gradients of a row's own keys and values
         + 4 * lanes                              // lse, delta, and the run's first and last key
         + block * 8;                             // each query's ranges of keys
}

// Computes all gradients. All arguments have been checked.
void run_prefix_attention_backward(PrefixAttentionBackward& op, const PrefixAttentionRows& rows,
                                   int threads);

struct PrefixAttentionBackwardPlan {
  int64_t block_size;  // queries taken at a time: whole rows, or a part of one
  int64_t chunk_rows;  // rows in a chunk
  int64_t row_blocks;  // where rows are cut (chunk_rows is 1), blocks of one row in a chunk; else 0
};

// How the queries of each key/value head are split into chunks. `per_row`: stacked queries of a
// row. Chunks cost a partial each, so there are no more than an even load of all threads takes.
// Example: 8 rows of 512 queries, 8 heads, 2 threads: one chunk a head. 3 heads: two chunks of 4
// rows each. One row, one head: two chunks of 3 blocks.
PrefixAttentionBackwardPlan plan_prefix_attention_backward(int64_t batch, int64_t per_row,
                                                           int64_t kv_heads, int threads);

}  // namespace softprompt_fast
