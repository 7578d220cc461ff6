// SPDX-License-Identifier: Apache-2.0
// prefix_attention forward: a task walks its block of stacked queries over the shared prefix and
// then each row's own keys, with one running softmax (Milakov and Gimelshein, 2018; the blocking is
// FlashAttention's, Dao et al., 2022), so that nothing has to be merged unless the keys are split.
#pragma once

#include "prefix_attention.h"
#include "prefix_attention_stacked.h"
#include "tile.h"

namespace softprompt_fast {
namespace SOFTPROMPT_FAST_ISA {

constexpr float kInfinity = __builtin_inff();

// Below this many queries a dot product per key beats transposing the keys: W x W elements cost
// some 4 W shuffles, and a reduction of W sums 2 W.
constexpr int64_t kTransposeRows = 6;

// Ranges of keys that a query sees: prefix entries [prefix, size), own keys [own_first, own_last).
struct QueryView {
  int64_t view;
  int64_t prefix, own_first, own_last;
};

// A run of at most kKeyBlock keys, and what of it each query sees.
struct KeyRun {
  const void* key;
  const void* value;
  DType dtype;
  int64_t key_row, key_col, value_row, value_col;
  const float* key_scale;  // int8: scale of entry i is key_scale[(scale_at + i) / scale_block]
  const float* value_scale;
  int64_t scale_at;
  int64_t first, count;  // in the numbering of the queries' ranges
  int64_t bias_column;
  bool prefix;
};

// Scratch of one task; prefix_attention_scratch counts it.
struct Scratch {
  float* query;       // [block, padded(D)]
  float* state;       // [block, partial_width(Dv)]
  float* scores;      // [block, kKeyBlock], or of a stack [kKeyBlock, lanes]
  float* transposed;  // [padded(D), kKeyBlock]
  float* key;         // [kKeyBlock, padded(D)]
  float* value;       // [kKeyBlock, padded(Dv)]
  float* stack;       // [padded(D) + padded(Dv) + 5, lanes]
  QueryView* views;   // [block]

  Scratch(float* memory, int64_t block, int64_t head_dim, int64_t v_dim) {
    const int64_t lanes = padded(block);
    query = memory;
    state = query + block * padded(head_dim);
    scores = state + block * partial_width(v_dim);
    transposed = scores + lanes * kKeyBlock;
    key = transposed + padded(head_dim) * kKeyBlock;
    value = key + kKeyBlock * padded(head_dim);
    stack = value + kKeyBlock * padded(v_dim);
    views = (QueryView*)(stack + (padded(head_dim) + padded(v_dim) + 5) * lanes);
  }
};

// Rows as floats of `columns` rounded up to W: the memory itself where it already is that.
SOFTPROMPT_FAST_INLINE const float* as_rows(const void* from, DType dtype, int64_t row, int64_t col,
                                            int64_t rows, int64_t columns, const float* scale,
                                            int64_t scale_at, int64_t scale_block, float* scratch,
                                            int64_t scratch_row, int64_t* used_row) {
  if (dtype == DType::kFloat32 && col == 1 && columns % W == 0) {
    *used_row = row;
    return (const float*)from;
  }
  *used_row = scratch_row;
  for (int64_t i = 0; i < rows; ++i) {
    const float factor = scale ? scale[(scale_at + i) / scale_block] : 1.0f;
    const char* source = (const char*)from + i * row * size_of(dtype);
    read_row(source, dtype, col, columns, round_up(columns, W), factor, scratch + i * scratch_row);
  }
  return scratch;
}

// lane i = sum of rows[i]
SOFTPROMPT_FAST_INLINE Vec sum_rows(Vec (&rows)[W]) {
  if constexpr (W == 16) {
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
      exchange<8, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15>(rows[i], rows[i + 8]);
      rows[i] += rows[i + 8];
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      exchange<4, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15>(rows[i], rows[i + 4]);
      rows[i] += rows[i + 4];
    }
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) {
      exchange<2, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15>(rows[i], rows[i + 2]);
      rows[i] += rows[i + 2];
    }
    exchange<1, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15>(rows[0], rows[1]);
    return rows[0] + rows[1];
  } else if constexpr (W == 8) {
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      exchange<4, 0, 1, 2, 3, 4, 5, 6, 7>(rows[i], rows[i + 4]);
      rows[i] += rows[i + 4];
    }
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) {
      exchange<2, 0, 1, 2, 3, 4, 5, 6, 7>(rows[i], rows[i + 2]);
      rows[i] += rows[i + 2];
    }
    exchange<1, 0, 1, 2, 3, 4, 5, 6, 7>(rows[0], rows[1]);
    return rows[0] + rows[1];
  } else {
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) {
      exchange<2, 0, 1, 2, 3>(rows[i], rows[i + 2]);
      rows[i] += rows[i + 2];
    }
    exchange<1, 0, 1, 2, 3>(rows[0], rows[1]);
    return rows[0] + rows[1];
  }
}

SOFTPROMPT_FAST_INLINE Ahead keys_ahead(const PrefixAttention& op, const KeyRun& run) {
  const int64_t size = size_of(run.dtype);
  if (run.count == 0 || run.key_col != 1) return {};
  return {(const char*)run.key, run.key_row * size, run.count, (op.head_dim * size + 63) / 64};
}

SOFTPROMPT_FAST_INLINE Ahead values_ahead(const PrefixAttention& op, const KeyRun& run) {
  const int64_t size = size_of(run.dtype);
  if (run.count == 0 || run.value_col != 1) return {};
  return {(const char*)run.value, run.value_row * size, run.count, (op.v_dim * size + 63) / 64};
}

// scores[rows, count] = query . key for few queries, a dot product a key.
SOFTPROMPT_FAST_INLINE void dot_rows(const float* query, int64_t query_row, int64_t rows,
                                     const float* key, int64_t key_row, int64_t count,
                                     int64_t columns, float* scores, const Ahead& keys,
                                     const Ahead& values) {
  for (int64_t i = 0; i < count; i += W) {
    const float* rows_of_keys[W];
    for (int64_t j = 0; j < W; ++j) rows_of_keys[j] = key + min64(i + j, count - 1) * key_row;
    for (int64_t r = 0; r < rows; ++r) {
      Vec sums[W];
#pragma GCC unroll 16
      for (int j = 0; j < W; ++j) sums[j] = Vec{};
      for (int64_t c = 0; c < columns; c += W) {
        const Vec x = load(query + r * query_row + c);
#pragma GCC unroll 16
        for (int j = 0; j < W; ++j) sums[j] += x * load(rows_of_keys[j] + c);
      }
      for (int64_t j = W * r / rows; j < W * (r + 1) / rows; ++j) {
        keys.fetch(i + j, 0, 1);
        values.fetch(i + j, 0, 1);
      }
      store(scores + r * kKeyBlock + i, sum_rows(sums));
    }
  }
}

// Scores of one query against a run become weights; the state's maximum and sum follow.
SOFTPROMPT_FAST_INLINE void soften(const PrefixAttention& op, const KeyRun& run,
                                   const QueryView& view, int64_t head, int64_t query,
                                   float* scores, float* state, int64_t state_columns) {
  const int64_t count = round_up(run.count, W);
  const int64_t first = max64((run.prefix ? view.prefix : view.own_first) - run.first, 0);
  const int64_t last = run.prefix ? run.count : min64(view.own_last - run.first, run.count);
  if (first >= last) {
    for (int64_t i = 0; i < count; i += W) store(scores + i, Vec{});
    return;
  }
  if (op.softcap != 0.0f) {
    const float inverse = 1.0f / op.softcap;
    for (int64_t i = 0; i < count; i += W) {
      store(scores + i, tanh(load(scores + i) * inverse) * op.softcap);
    }
  }
  if (op.bias) {
    float bias[kKeyBlock];
    const Tensor& b = op.bias;
    const int64_t row = op.views[view.view].row;
    read_row(b.at(row * b.stride[0] + head * b.stride[1] + query * b.stride[2] +
                  run.bias_column * b.stride[3]),
             b.dtype, b.stride[3], run.count, count, 1.0f, bias);
    for (int64_t i = 0; i < count; i += W) store(scores + i, load(scores + i) + load(bias + i));
  }
  for (int64_t i = 0; i < first; ++i) scores[i] = -kInfinity;
  for (int64_t i = last; i < count; ++i) scores[i] = -kInfinity;

  float& highest = state[state_columns];
  float& total = state[state_columns + 1];
  Vec most = load(scores);
  for (int64_t i = W; i < count; i += W) most = vmax(load(scores + i), most);
  const float seen = largest(most);
  if (seen > highest) {
    if (highest > -kInfinity) {
      const Vec fade = exp(splat(highest - seen));
      for (int64_t i = 0; i < state_columns; i += W) store(state + i, load(state + i) * fade);
      total *= fade[0];
    }
    highest = seen;
  }
  // Nothing but -inf so far (a bias may hold it): (-inf) - (-inf) would be NaN.
  const Vec offset = splat(highest > -kInfinity ? highest : 0.0f);
  Vec sums = Vec{};
  for (int64_t i = 0; i < count; i += W) {
    const Vec weight = exp(load(scores + i) - offset);
    store(scores + i, weight);
    sums += weight;
  }
  total += sum(sums);
}

// `rows` stacked queries from `at` on against one run of keys.
inline void attend_run(const PrefixAttention& op, const QueryBlock& block, const KeyRun& run,
                       int64_t at, int64_t rows, const Scratch& scratch, float* state,
                       const KeyRun& after) {
  const int64_t query_row = padded(op.head_dim), state_row = partial_width(op.v_dim);
  const int64_t columns = round_up(op.head_dim, W), v_columns = round_up(op.v_dim, W);
  float* scores = scratch.scores;
  int64_t key_row, value_row;
  const float* key =
      as_rows(run.key, run.dtype, run.key_row, run.key_col, run.count, op.head_dim, run.key_scale,
              run.scale_at, op.scale_block, scratch.key, query_row, &key_row);
  const float* query = scratch.query + at * query_row;
  if (rows < kTransposeRows) {
    dot_rows(query, query_row, rows, key, key_row, run.count, columns, scores,
             keys_ahead(op, after), values_ahead(op, after));
  } else {
    rows_to_lanes(key, key_row, run.count, columns, scratch.transposed, kKeyBlock);
    matmul(rows, round_up(run.count, W), op.head_dim, query, query_row, 1, scratch.transposed,
           kKeyBlock, scores, kKeyBlock, false);
  }
  int64_t place = (block.first + at) % (op.queries * op.groups);
  for (int64_t r = 0; r < rows; ++r) {
    soften(op, run, scratch.views[at + r], block.kv_head * op.groups + place % op.groups,
           place / op.groups, scores + r * kKeyBlock, state + (at + r) * state_row,
           padded(op.v_dim));
    if (++place == op.queries * op.groups) place = 0;
  }
  const float* value = as_rows(run.value, run.dtype, run.value_row, run.value_col, run.count,
                               op.v_dim, run.value_scale, run.scale_at, op.scale_block,
                               scratch.value, padded(op.v_dim), &value_row);
  matmul(rows, v_columns, run.count, scores, kKeyBlock, 1, value, value_row, state + at * state_row,
         state_row, true);
}

// The same for the runs of [first, last), the queries stacked a lane each.
template <typename MakeRun>
inline void attend_stacked(const PrefixAttention& op, int64_t first, int64_t last, int64_t at,
                           int64_t rows, const Scratch& scratch, float* state,
                           const MakeRun& make_run, const KeyRun& following) {
  const int64_t query_row = padded(op.head_dim), state_row = partial_width(op.v_dim);
  const int64_t v_columns = round_up(op.v_dim, W), lanes = round_up(rows, W);
  Stack stack;
  stack.lanes = lanes;
  stack.query = scratch.stack;
  stack.state = stack.query + padded(op.head_dim) * lanes;
  stack.highest = stack.state + padded(op.v_dim) * lanes;
  stack.total = stack.highest + lanes;
  stack.fade = stack.total + lanes;
  stack.first = stack.fade + lanes;
  stack.last = stack.first + lanes;
  stack.scores = scratch.scores;
  rows_to_lanes(scratch.query + at * query_row, query_row, rows, round_up(op.head_dim, W),
                stack.query, lanes);
  rows_to_lanes(state + at * state_row, state_row, rows, v_columns, stack.state, lanes);
  for (int64_t r = 0; r < lanes; ++r) {
    const float* of_row = state + (at + min64(r, rows - 1)) * state_row + padded(op.v_dim);
    stack.highest[r] = of_row[0];
    stack.total[r] = of_row[1];
  }
  for (int64_t begin = first; begin < last; begin += kKeyBlock) {
    const KeyRun run = make_run(begin, min64(kKeyBlock, last - begin));
    bool masked = false, seen = false;
    for (int64_t r = 0; r < lanes; ++r) {
      const QueryView& view = scratch.views[at + min64(r, rows - 1)];
      const int64_t from = max64((run.prefix ? view.prefix : view.own_first) - run.first, 0);
      const int64_t to = run.prefix ? run.count : min64(view.own_last - run.first, run.count);
      stack.first[r] = static_cast<float>(min64(from, run.count));
      stack.last[r] = static_cast<float>(max64(to, 0));
      masked |= from > 0 || to < run.count;
      seen |= from < to;
    }
    if (!seen) continue;
    const int64_t next = begin + kKeyBlock;
    const KeyRun after = next < last ? make_run(next, min64(kKeyBlock, last - next)) : following;
    const Ahead keys = keys_ahead(op, after), values = values_ahead(op, after);
    int64_t key_row, value_row;
    const float* key =
        as_rows(run.key, run.dtype, run.key_row, run.key_col, run.count, op.head_dim, run.key_scale,
                run.scale_at, op.scale_block, scratch.key, query_row, &key_row);
    matmul(run.count, lanes, op.head_dim, key, key_row, 1, stack.query, lanes, stack.scores, lanes,
           false, nullptr, keys.dense());
    soften_stack(stack, run.count, op.softcap, masked, keys.scattered(), values.scattered());
    const float* value = as_rows(run.value, run.dtype, run.value_row, run.value_col, run.count,
                                 op.v_dim, run.value_scale, run.scale_at, op.scale_block,
                                 scratch.value, padded(op.v_dim), &value_row);
    matmul(v_columns, lanes, run.count, value, 1, value_row, stack.scores, lanes, stack.state,
           lanes, true, stack.fade, values.dense());
  }
  lanes_to_rows(stack.state, lanes, rows, v_columns, state + at * state_row, state_row);
  for (int64_t r = 0; r < rows; ++r) {
    float* of_row = state + (at + r) * state_row + padded(op.v_dim);
    of_row[0] = stack.highest[r];
    of_row[1] = stack.total[r];
  }
}

// `rows` stacked queries from `at` on against the keys [first, last), a run at a time; `following`
// is the run that comes after them.
template <typename MakeRun>
inline void attend(const PrefixAttention& op, const QueryBlock& block, int64_t first, int64_t last,
                   int64_t at, int64_t rows, const Scratch& scratch, float* state,
                   const MakeRun& make_run, const KeyRun& following) {
  if (first >= last) return;
  // A bias is read a row a query, which suits the other form.
  if (rows >= kStackedRows && !op.bias) {
    attend_stacked(op, first, last, at, rows, scratch, state, make_run, following);
    return;
  }
  KeyRun run = make_run(first, min64(kKeyBlock, last - first));
  for (int64_t next = first + kKeyBlock; run.count; next += kKeyBlock) {
    const KeyRun after = next < last ? make_run(next, min64(kKeyBlock, last - next)) : KeyRun{};
    attend_run(op, block, run, at, rows, scratch, state, next < last ? after : following);
    run = after;
  }
}

// `count` entries, from `at` on, of the prefix of a row.
SOFTPROMPT_FAST_INLINE KeyRun prefix_run(const PrefixAttention& op, int64_t kv_head,
                                         const RowView& view, int64_t at, int64_t count) {
  const Tensor &k = op.prefix_key, &v = op.prefix_value;
  const int64_t entry = view.prefix_first + at;
  KeyRun run = {};
  run.prefix = true;
  run.dtype = k.dtype;
  run.key_row = k.stride[1], run.key_col = k.stride[2];
  run.value_row = v.stride[1], run.value_col = v.stride[2];
  run.key = k.at(kv_head * k.stride[0] + entry * k.stride[1]);
  run.value = v.at(kv_head * v.stride[0] + entry * v.stride[1]);
  if (op.prefix_key_scale) {
    run.key_scale = op.prefix_key_scale + kv_head * op.scale_stride;
    run.value_scale = op.prefix_value_scale + kv_head * op.scale_stride;
  }
  run.scale_at = entry;
  run.first = run.bias_column = at;
  run.count = count;
  return run;
}

// `count` own keys, from `at` on, of a row of the batch.
SOFTPROMPT_FAST_INLINE KeyRun own_run(const PrefixAttention& op, int64_t kv_head, int64_t row,
                                      int64_t at, int64_t count) {
  const Tensor &k = op.key, &v = op.value;
  KeyRun run = {};
  run.dtype = k.dtype;
  run.key_row = k.stride[2], run.key_col = k.stride[3];
  run.value_row = v.stride[2], run.value_col = v.stride[3];
  run.key = k.at(row * k.stride[0] + kv_head * k.stride[1] + at * k.stride[2]);
  run.value = v.at(row * v.stride[0] + kv_head * v.stride[1] + at * v.stride[2]);
  run.first = at;
  run.bias_column = op.bias_columns + at;
  run.count = count;
  return run;
}

// The part of [first, last) that belongs to one of `parts`, in whole key blocks.
SOFTPROMPT_FAST_INLINE void share(int64_t part, int64_t parts, int64_t* first, int64_t* last) {
  const int64_t blocks = (*last - *first + kKeyBlock - 1) / kKeyBlock;
  const int64_t end = *last;
  *last = min64(end, *first + blocks * (part + 1) / parts * kKeyBlock);
  *first += blocks * part / parts * kKeyBlock;
}

// The state of one query becomes its result.
SOFTPROMPT_FAST_INLINE void finish(const PrefixAttention& op, int64_t row, int64_t head,
                                   int64_t query, float* state) {
  const int64_t columns = padded(op.v_dim);
  float highest = state[columns], total = state[columns + 1], factor = 1.0f;
  if (op.sinks) {
    // One more logit, whose value vector is zero.
    const float sink = op.sinks[head];
    const float both = sink > highest ? sink : highest;
    if (both > -kInfinity) {
      factor = highest > -kInfinity ? exp(splat(highest - both))[0] : 0.0f;
      total = total * factor + exp(splat(sink - both))[0];
      highest = both;
    }
  }
  // Not "total > 0": a NaN has to reach the result.
  const Vec weight = splat(total == 0.0f ? 0.0f : factor / total);
  for (int64_t i = 0; i < columns; i += W) store(state + i, load(state + i) * weight);
  const Tensor& out = op.out;
  write_row(state, op.v_dim,
            out.at(row * out.stride[0] + head * out.stride[1] + query * out.stride[2]), out.dtype,
            out.stride[3]);
  op.lse[(row * op.q_heads + head) * op.queries + query] =
      total == 0.0f ? -kInfinity : highest + __builtin_logf(total);
}

// Read the block's queries, times the scale, to `queries`, and work out what they see.
inline void open_block(const PrefixAttention& op, const QueryBlock& block, float* queries,
                       int64_t query_row, QueryView* views) {
  const int64_t columns = round_up(op.head_dim, W);
  int64_t view = block.row_begin + block.first / (op.queries * op.groups);
  int64_t place = block.first % (op.queries * op.groups);
  for (int64_t u = 0; u < block.count; ++u) {
    const RowView& row = op.views[view];
    const int64_t query = place / op.groups, head = block.kv_head * op.groups + place % op.groups;
    const Tensor& q = op.query;
    read_row(q.at(row.row * q.stride[0] + head * q.stride[1] + query * q.stride[2]), q.dtype,
             q.stride[3], op.head_dim, columns, op.scale, queries + u * query_row);
    const int64_t position = row.query_start + query;
    QueryView& seen = views[u];
    seen.view = view;
    seen.prefix = 0;
    seen.own_first = row.own_first;
    seen.own_last = op.causal ? min64(row.own_last, position + 1) : row.own_last;
    if (op.window) {
      const int64_t absolute = row.prefix_size + position - row.own_first;
      seen.prefix = min64(max64(absolute - op.window + 1, 0), row.prefix_size);
      seen.own_first = max64(seen.own_first, position - op.window + 1);
    }
    if (++place == op.queries * op.groups) place = 0, ++view;
  }
}

inline void prefix_attention(const PrefixAttention& op, int64_t task, float* memory) {
  const QueryBlock& block = op.blocks[task / op.splits];
  const int64_t split = task % op.splits;
  const Scratch scratch(memory, op.block_size, op.head_dim, op.v_dim);
  const int64_t state_row = partial_width(op.v_dim);
  float* state = op.splits == 1 ? scratch.state : op.partials + task * op.block_size * state_row;
  open_block(op, block, scratch.query, padded(op.head_dim), scratch.views);
  for (int64_t u = 0; u < block.count; ++u) {
    for (int64_t i = 0; i < state_row; i += W) store(state + u * state_row + i, Vec{});
    state[u * state_row + padded(op.v_dim)] = -kInfinity;
  }

  // Own keys of the row of query `begin`, of which this task has [first, last).
  const auto own_keys = [&](int64_t begin, int64_t* end, int64_t* first, int64_t* last) {
    const int64_t view = scratch.views[begin].view;
    *first = op.own, *last = 0;
    for (*end = begin; *end < block.count && scratch.views[*end].view == view; ++*end) {
      *first = min64(*first, scratch.views[*end].own_first);
      *last = max64(*last, scratch.views[*end].own_last);
    }
    if (*first < *last) share(split, op.splits, first, last);
  };
  const auto own_keys_run = [&](int64_t begin, int64_t at, int64_t count) {
    return own_run(op, block.kv_head, op.views[scratch.views[begin].view].row, at, count);
  };
  // The first of them, to be fetched before its turn.
  const auto first_own_run = [&](int64_t begin) {
    int64_t end, first, last;
    if (begin == block.count) return KeyRun{};
    own_keys(begin, &end, &first, &last);
    return first < last ? own_keys_run(begin, first, min64(kKeyBlock, last - first)) : KeyRun{};
  };

  const RowView& any = op.views[block.row_begin];
  if (any.prefix_size) {
    int64_t first = any.prefix_size, last = any.prefix_size;
    for (int64_t u = 0; u < block.count; ++u) first = min64(first, scratch.views[u].prefix);
    share(split, op.splits, &first, &last);
    const auto make_run = [&](int64_t at, int64_t count) {
      return prefix_run(op, block.kv_head, any, at, count);
    };
    // Nobody asked for the first of them before.
    const KeyRun run = make_run(first, min64(kKeyBlock, last - first));
    const Ahead keys = keys_ahead(op, run), values = values_ahead(op, run);
    for (int64_t i = 0; i < kKeyBlock; ++i) keys.fetch(i, 0, 1);
    for (int64_t i = 0; i < kKeyBlock; ++i) values.fetch(i, 0, 1);
    attend(op, block, first, last, 0, block.count, scratch, state, make_run, first_own_run(0));
  }
  for (int64_t begin = 0, end; begin < block.count; begin = end) {
    int64_t first, last;
    own_keys(begin, &end, &first, &last);
    const auto make_run = [&](int64_t at, int64_t count) { return own_keys_run(begin, at, count); };
    attend(op, block, first, last, begin, end - begin, scratch, state, make_run,
           first_own_run(end));
  }

  if (op.splits > 1) return;
  int64_t place = block.first % (op.queries * op.groups);
  for (int64_t u = 0; u < block.count; ++u) {
    finish(op, op.views[scratch.views[u].view].row, block.kv_head * op.groups + place % op.groups,
           place / op.groups, state + u * state_row);
    if (++place == op.queries * op.groups) place = 0;
  }
}

// The splits of one block, in their order, become its results.
inline void prefix_attention_merge(const PrefixAttention& op, int64_t index, float*) {
  const QueryBlock& block = op.blocks[index];
  const int64_t state_row = partial_width(op.v_dim), columns = padded(op.v_dim);
  int64_t view = block.row_begin + block.first / (op.queries * op.groups);
  int64_t place = block.first % (op.queries * op.groups);
  for (int64_t u = 0; u < block.count; ++u) {
    float* state = op.partials + (index * op.splits * op.block_size + u) * state_row;
    for (int64_t split = 1; split < op.splits; ++split) {
      const float* other = state + split * op.block_size * state_row;
      const float highest = state[columns] > other[columns] ? state[columns] : other[columns];
      const float offset = highest > -kInfinity ? highest : 0.0f;  // as in soften
      const Vec mine = exp(splat(state[columns] - offset));
      const Vec theirs = exp(splat(other[columns] - offset));
      for (int64_t i = 0; i < columns; i += W) {
        store(state + i, load(state + i) * mine + load(other + i) * theirs);
      }
      state[columns] = highest;
      state[columns + 1] = state[columns + 1] * mine[0] + other[columns + 1] * theirs[0];
    }
    finish(op, op.views[view].row, block.kv_head * op.groups + place % op.groups, place / op.groups,
           state);
    if (++place == op.queries * op.groups) place = 0, ++view;
  }
}

}  // namespace SOFTPROMPT_FAST_ISA
}  // namespace softprompt_fast
