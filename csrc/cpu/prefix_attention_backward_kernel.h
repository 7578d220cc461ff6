// SPDX-License-Identifier: Apache-2.0
// prefix_attention backward: a task walks its queries a block at a time, and for each block over
// the prefix and then the rows' own keys, as forward does. The weights are computed again from the
// final LSE (FlashAttention, Dao et al., 2022): with p = exp(score - lse) and delta = grad_out .
// out
// - grad_lse, the gradient of a score is p (grad_out . value - delta), whichever keys it is with.
//
// Scores are held transposed, a key a row and a query a lane. Then queries and grad_out are
// transposed once a block, where forward transposes the keys once a run; the sums of dK and dV read
// the scores row by row, and only dQ reads them by column.
#pragma once

#include "prefix_attention_backward.h"
#include "prefix_attention_kernel.h"

namespace softprompt_fast {
namespace SOFTPROMPT_FAST_ISA {

typedef int32_t LooseIntVec __attribute__((vector_size(4 * W), aligned(4), may_alias));
SOFTPROMPT_FAST_INLINE IntVec load(const int32_t* p) {
  return *reinterpret_cast<const LooseIntVec*>(p);
}

// Scratch of one task; prefix_attention_backward.h's gradient_scratch counts it.
struct GradientScratch {
  int64_t lanes;               // row of what holds a query a lane
  float* query;                // [block, spread(D)], times the scale
  float* grad_query;           // [block, spread(D)]
  float* grad_out;             // [block, spread(Dv)]
  float* query_transposed;     // [padded(D), lanes]
  float* grad_out_transposed;  // [padded(Dv), lanes]
  float* weights;              // [kKeyBlock, lanes]
  float* grad_scores;          // [kKeyBlock, lanes]
  float* bias;                 // [kKeyBlock, lanes]
  float* key;                  // [kKeyBlock, spread(D)]
  float* value;                // [kKeyBlock, spread(Dv)]
  float* own;                  // [T, gradient_width]
  float* lse;                  // [lanes]
  float* delta;                // [lanes]
  int32_t* first;              // [lanes]
  int32_t* last;               // [lanes]
  QueryView* views;            // [block]

  GradientScratch(float* memory, int64_t block, const PrefixAttention& op) {
    const int64_t d = spread(op.head_dim), dv = spread(op.v_dim);
    lanes = spread(block + kMaxLanes);
    query = memory;
    grad_query = query + block * d;
    grad_out = grad_query + block * d;
    query_transposed = grad_out + block * dv;
    grad_out_transposed = query_transposed + padded(op.head_dim) * lanes;
    weights = grad_out_transposed + padded(op.v_dim) * lanes;
    grad_scores = weights + kKeyBlock * lanes;
    bias = grad_scores + kKeyBlock * lanes;
    key = bias + kKeyBlock * lanes;
    value = key + kKeyBlock * d;
    own = value + kKeyBlock * dv;
    lse = own + op.own * gradient_width(op.head_dim, op.v_dim);
    delta = lse + lanes;
    first = (int32_t*)(delta + lanes);
    last = first + lanes;
    views = (QueryView*)(last + lanes);
  }
};

SOFTPROMPT_FAST_INLINE void clear(float* p, int64_t count) {
  for (int64_t i = 0; i < count; i += W) store(p + i, Vec{});
}

// What the gradients of a block need of its queries.
inline void open_gradient_block(const PrefixAttentionBackward& op, const QueryBlock& block,
                                const GradientScratch& scratch) {
  const PrefixAttention& forward = op.forward;
  const int64_t query_row = spread(forward.head_dim), grad_row = spread(forward.v_dim);
  const int64_t columns = round_up(forward.head_dim, W), v_columns = round_up(forward.v_dim, W);
  open_block(forward, block, scratch.query, query_row, scratch.views);
  int64_t place = block.first % (forward.queries * forward.groups);
  for (int64_t u = 0; u < block.count; ++u) {
    const int64_t row = forward.views[scratch.views[u].view].row, query = place / forward.groups;
    const int64_t head = block.kv_head * forward.groups + place % forward.groups;
    const auto read = [&](const Tensor& from, float* to) {
      read_row(from.at(row * from.stride[0] + head * from.stride[1] + query * from.stride[2]),
               from.dtype, from.stride[3], forward.v_dim, v_columns, 1.0f, to);
    };
    float *grad = scratch.grad_out + u * grad_row, *out = scratch.value;
    read(op.grad_out, grad);
    read(forward.out, out);
    Vec sums = Vec{};
    for (int64_t i = 0; i < v_columns; i += W) sums += load(grad + i) * load(out + i);
    const int64_t at = (row * forward.q_heads + head) * forward.queries + query;
    const float lse = forward.lse[at];
    const float delta = sum(sums) - (op.grad_lse ? op.grad_lse[at] : 0.0f);
    if (op.delta) op.delta[at] = delta;
    // A query that saw nothing: any weight is exp(score - inf) = 0, where - (-inf) could give NaN.
    scratch.lse[u] = lse == -kInfinity ? kInfinity : lse;
    scratch.delta[u] = lse == -kInfinity ? 0.0f : delta;
    clear(scratch.grad_query + u * query_row, columns);
    if (++place == forward.queries * forward.groups) place = 0;
  }
  for (int64_t u = block.count; u < block.count + W; ++u) scratch.lse[u] = scratch.delta[u] = 0.0f;
  rows_to_lanes(scratch.query, query_row, block.count, columns, scratch.query_transposed,
                scratch.lanes);
  rows_to_lanes(scratch.grad_out, grad_row, block.count, v_columns, scratch.grad_out_transposed,
                scratch.lanes);
}

// Bias of `rows` queries from `at` on with a run of keys, a query a lane.
inline void read_bias(const PrefixAttention& op, const QueryBlock& block, const KeyRun& run,
                      int64_t at, int64_t rows, const GradientScratch& scratch) {
  const Tensor& b = op.bias;
  int64_t place = (block.first + at) % (op.queries * op.groups);
  for (int64_t r = 0; r < rows; ++r) {
    float columns[kKeyBlock];
    const int64_t row = op.views[scratch.views[at + r].view].row;
    const int64_t head = block.kv_head * op.groups + place % op.groups;
    read_row(b.at(row * b.stride[0] + head * b.stride[1] + place / op.groups * b.stride[2] +
                  run.bias_column * b.stride[3]),
             b.dtype, b.stride[3], run.count, round_up(run.count, W), 1.0f, columns);
    for (int64_t i = 0; i < run.count; ++i) scratch.bias[i * scratch.lanes + r] = columns[i];
    if (++place == op.queries * op.groups) place = 0;
  }
}

// Scores become weights, and gradients of weights those of scores; lanes from `at` on.
SOFTPROMPT_FAST_INLINE void differentiate_scores(const PrefixAttention& op, int64_t keys,
                                                 int64_t at, int64_t lanes, bool masked,
                                                 const GradientScratch& scratch) {
  const Vec cap = splat(op.softcap), inverse = splat(op.softcap != 0.0f ? 1.0f / op.softcap : 0.0f);
  for (int64_t i = 0; i < keys; ++i) {
    float* weights = scratch.weights + i * scratch.lanes;
    float* grads = scratch.grad_scores + i * scratch.lanes;
    const IntVec entry = static_cast<int32_t>(i) - IntVec{};
    for (int64_t u = 0; u < lanes; u += W) {
      Vec score = load(weights + u), slope = splat(1.0f);
      if (op.softcap != 0.0f) {
        const Vec t = tanh(score * inverse);
        score = t * cap;
        slope = 1.0f - t * t;
      }
      if (op.bias) score += load(scratch.bias + i * scratch.lanes + u);
      Vec weight = exp(score - load(scratch.lse + at + u));
      if (masked) {
        const IntVec seen = (entry >= load(scratch.first + u)) & (entry < load(scratch.last + u));
        weight = seen ? weight : Vec{};
      }
      const Vec grad = weight * (load(grads + u) - load(scratch.delta + at + u));
      store(weights + u, weight);
      store(grads + u, op.softcap != 0.0f ? grad * slope : grad);
    }
  }
}

// `rows` stacked queries from `at` on and one run of keys: adds to the queries' gradients and to
// those of the run's keys and values, grads [count, gradient_width].
inline void differentiate_run(const PrefixAttention& op, const QueryBlock& block, const KeyRun& run,
                              int64_t at, int64_t rows, const GradientScratch& scratch,
                              float* grads) {
  const int64_t lanes = round_up(rows, W);
  int64_t most = 0, least = run.count;  // keys of the run that a query sees
  for (int64_t r = 0; r < lanes; ++r) {
    const QueryView& view = scratch.views[at + min64(r, rows - 1)];
    const int64_t first = max64((run.prefix ? view.prefix : view.own_first) - run.first, 0);
    const int64_t last = run.prefix ? run.count : min64(view.own_last - run.first, run.count);
    const int64_t seen = max64(last - first, 0);
    scratch.first[r] = static_cast<int32_t>(min64(first, run.count));
    scratch.last[r] = static_cast<int32_t>(max64(last, 0));
    most = max64(most, seen);
    least = min64(least, seen);
  }
  if (most == 0) return;

  const int64_t columns = round_up(op.head_dim, W), v_columns = round_up(op.v_dim, W);
  const int64_t key_row = spread(op.head_dim), value_row = spread(op.v_dim), row = scratch.lanes;
  for (int64_t i = 0; i < run.count; ++i) {
    const int64_t size = size_of(run.dtype);
    read_row((const char*)run.key + i * run.key_row * size, run.dtype, run.key_col, op.head_dim,
             columns, 1.0f, scratch.key + i * key_row);
    read_row((const char*)run.value + i * run.value_row * size, run.dtype, run.value_col, op.v_dim,
             v_columns, 1.0f, scratch.value + i * value_row);
  }
  matmul(run.count, lanes, op.head_dim, scratch.key, key_row, 1, scratch.query_transposed + at, row,
         scratch.weights, row, false);
  matmul(run.count, lanes, op.v_dim, scratch.value, value_row, 1, scratch.grad_out_transposed + at,
         row, scratch.grad_scores, row, false);
  if (op.bias) read_bias(op, block, run, at, rows, scratch);
  differentiate_scores(op, run.count, at, lanes, least < run.count, scratch);

  const int64_t width = gradient_width(op.head_dim, op.v_dim);
  matmul(run.count, columns, rows, scratch.grad_scores, row, 1, scratch.query + at * key_row,
         key_row, grads, width, true);
  matmul(run.count, v_columns, rows, scratch.weights, row, 1, scratch.grad_out + at * value_row,
         value_row, grads + padded(op.head_dim), width, true);
  matmul(rows, columns, run.count, scratch.grad_scores, 1, row, scratch.key, key_row,
         scratch.grad_query + at * key_row, key_row, true);
}

// `entries` of one head's gradients, as summed up, to where the caller wants them.
SOFTPROMPT_FAST_INLINE void write_gradients(const PrefixAttentionBackward& op, bool prefix,
                                            int64_t row, int64_t kv_head, int64_t first,
                                            int64_t count, const float* grads) {
  const int64_t head_dim = op.forward.head_dim, v_dim = op.forward.v_dim;
  const auto write = [&](const Tensor& own, const Tensor& shared, const float* from, int64_t size) {
    const Tensor& to = prefix ? shared : own;
    const int64_t* stride = prefix ? to.stride : to.stride + 1;
    int64_t at = kv_head * stride[0] + first * stride[1];
    if (!prefix) at += row * to.stride[0];
    for (int64_t i = 0; i < count; ++i) {
      write_row(from + i * gradient_width(head_dim, v_dim), size, to.at(at + i * stride[1]),
                to.dtype, stride[2]);
    }
  };
  write(op.grad_key, op.grad_prefix_key, grads, head_dim);
  write(op.grad_value, op.grad_prefix_value, grads + padded(head_dim), v_dim);
}

// The block's queries and the prefix of its rows, grads [prefix_size, gradient_width].
inline void differentiate_prefix(const PrefixAttention& op, const QueryBlock& block,
                                 const GradientScratch& scratch, float* grads) {
  const RowView& any = op.views[block.row_begin];
  int64_t first = any.prefix_size;
  for (int64_t u = 0; u < block.count; ++u) first = min64(first, scratch.views[u].prefix);
  for (int64_t at = first; at < any.prefix_size; at += kKeyBlock) {
    const int64_t count = min64(kKeyBlock, any.prefix_size - at);
    const KeyRun run = prefix_run(op, block.kv_head, any, at, count);
    differentiate_run(op, block, run, 0, block.count, scratch,
                      grads + at * gradient_width(op.head_dim, op.v_dim));
  }
}

// The block's queries [begin, end), of one row, and the row's own keys, grads [T, gradient_width].
inline void differentiate_own(const PrefixAttention& op, const QueryBlock& block, int64_t begin,
                              int64_t end, const GradientScratch& scratch, float* grads) {
  const int64_t row = op.views[scratch.views[begin].view].row;
  int64_t first = op.own, last = 0;
  for (int64_t u = begin; u < end; ++u) {
    first = min64(first, scratch.views[u].own_first);
    last = max64(last, scratch.views[u].own_last);
  }
  for (int64_t at = first; at < last; at += kKeyBlock) {
    const KeyRun run = own_run(op, block.kv_head, row, at, min64(kKeyBlock, last - at));
    differentiate_run(op, block, run, begin, end - begin, scratch,
                      grads + at * gradient_width(op.head_dim, op.v_dim));
  }
}

inline void prefix_attention_backward(const PrefixAttentionBackward& op, int64_t task,
                                      float* memory) {
  const PrefixAttention& forward = op.forward;
  const GradientChunk& chunk = op.chunks[task];
  const QueryBlock& all = chunk.queries;
  const GradientScratch scratch(memory, op.block_size, forward);
  const int64_t width = gradient_width(forward.head_dim, forward.v_dim);
  const int64_t per_row = forward.queries * forward.groups;
  const int64_t prefix_size = forward.views[all.row_begin].prefix_size;
  float* prefix_grads = op.partials + chunk.partial;
  float* own_grads = op.rows_cut ? prefix_grads + prefix_size * width : scratch.own;
  clear(prefix_grads, prefix_size * width);

  QueryBlock block = all;
  for (const int64_t stop = all.first + all.count; block.first < stop; block.first += block.count) {
    block.count = min64(op.block_size, stop - block.first);
    if (per_row > op.block_size) {
      block.count = min64(block.count, per_row - block.first % per_row);
    }
    open_gradient_block(op, block, scratch);
    differentiate_prefix(forward, block, scratch, prefix_grads);
    for (int64_t begin = 0, end; begin < block.count; begin = end) {
      const int64_t place = (block.first + begin) % per_row;
      end = min64(begin + per_row - place, block.count);
      if (place == 0 || block.first + begin == all.first) clear(own_grads, forward.own * width);
      differentiate_own(forward, block, begin, end, scratch, own_grads);
      if (!op.rows_cut && place + end - begin == per_row) {
        write_gradients(op, false, forward.views[scratch.views[begin].view].row, all.kv_head, 0,
                        forward.own, own_grads);
      }
    }
    const Tensor& to = op.grad_query;
    int64_t place = block.first % per_row;
    for (int64_t u = 0; u < block.count; ++u) {
      float* grad = scratch.grad_query + u * spread(forward.head_dim);
      for (int64_t i = 0; i < forward.head_dim; i += W)
        store(grad + i, load(grad + i) * forward.scale);
      const int64_t row = forward.views[scratch.views[u].view].row;
      const int64_t head = all.kv_head * forward.groups + place % forward.groups;
      write_row(
          grad, forward.head_dim,
          to.at(row * to.stride[0] + head * to.stride[1] + place / forward.groups * to.stride[2]),
          to.dtype, to.stride[3]);
      if (++place == per_row) place = 0;
    }
  }
}

// Adds up the chunks' partials of one run of keys, in the first chunk's.
inline void prefix_attention_backward_sum(const PrefixAttentionBackward& op, int64_t task, float*) {
  const GradientSum& run = op.sums[task];
  const int64_t size = run.count * gradient_width(op.forward.head_dim, op.forward.v_dim);
  float* total = op.partials + run.partial;
  for (int64_t chunk = 1; chunk < run.chunks; ++chunk) {
    const float* more = total + chunk * run.stride;
    for (int64_t i = 0; i < size; i += W) store(total + i, load(total + i) + load(more + i));
  }
  write_gradients(op, run.prefix, run.row, run.kv_head, run.first, run.count, total);
}

}  // namespace SOFTPROMPT_FAST_ISA
}  // namespace softprompt_fast
