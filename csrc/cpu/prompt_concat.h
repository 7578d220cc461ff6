// SPDX-License-Identifier: Apache-2.0
// prompt_concat: arguments of forward and backward, and where each row's pieces lie.
#pragma once

#include "kernels.h"

namespace softprompt_fast {

// A row of the result: `lead` empty slots, entries first..first+size-1 of the pack, the own tokens
// from `start` on, and empty slots up to its end.
struct PromptRow {
  int64_t lead, first, size, start;
};

struct PromptConcat {
  int64_t batch, own, packed, slots, width, vocabulary;
  const int64_t* ids;  // [B, S] with id_stride, or null
  int64_t id_stride[2];
  Tensor tokens;  // [B, S, H] embeddings, where there are no ids
  Tensor table;   // [V, H]
  Tensor prompt;  // [L, H]
  Tensor out;     // [B, slots + S, H], dense
  float scale, prompt_scale;
  const PromptRow* rows;  // B of them
};

constexpr int64_t kPromptGradColumns = 2048;  // a task's sums at most: 8 KB of the first cache

// A piece of the prompt's gradient that one task sums.
struct PromptGradTask {
  int64_t entry_first, entry_last, column_first, column_last;
  int64_t row_begin, row_end;  // in the order of PromptConcatGrad: the rows that use the entries
};

struct PromptConcatGrad {
  int64_t batch, own, packed, slots, width;
  Tensor grad_out;     // [B, slots + S, H]
  Tensor grad_prompt;  // [L, H], dense
  Tensor grad_tokens;  // [B, S, H], dense; data null: not wanted
  float scale, prompt_scale;
  const PromptRow* rows;  // B of them
  const int64_t* order;   // the rows' numbers, those of one prompt next to each other
};

// Fills in op.rows and writes op.out. Returns the first place of tokens, row * S + column, that is
// read and lies outside the vocabulary (its slot is then 0), or -1. Throws std::invalid_argument
// for an offset, index or start out of range.
int64_t run_prompt_concat(PromptConcat& op, const Index& prompt_offsets, const Index& prompt_index,
                          const Index& own_start, bool left, int threads);

// Fills in op.rows and op.order, and writes op.grad_prompt and op.grad_tokens. Sums are float and
// in an order that does not depend on the number of threads.
void run_prompt_concat_backward(PromptConcatGrad& op, const Index& prompt_offsets,
                                const Index& prompt_index, const Index& own_start, bool left,
                                int threads);

}  // namespace softprompt_fast
