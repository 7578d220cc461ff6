// SPDX-License-Identifier: Apache-2.0
// prompt_concat: the tasks that the CPU splits it into.
#pragma once

#include "../prompt_concat.h"
#include "kernels.h"

namespace softprompt_fast {

constexpr int64_t kPromptGradColumns = 2048;  // a task's sums at most: 8 KB of the first cache

// A piece of the prompt's gradient that one task sums.
struct PromptGradTask {
  int64_t entry_first, entry_last, column_first, column_last;
  int64_t row_begin, row_end;  // in the order of PromptConcatGrad: the rows that use the entries
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
