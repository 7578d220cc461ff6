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

// Fills in op.rows and writes op.out. Throws std::out_of_range where an id that is read lies
// outside the vocabulary: the message names the first one, whose slot is then 0. All other values
// are the caller's to check.
void run_prompt_concat(PromptConcat& op, int threads);

// Fills in op.rows and op.order, and writes op.grad_prompt and op.grad_tokens. Sums are float and
// in an order that does not depend on the number of threads.
void run_prompt_concat_backward(PromptConcatGrad& op, int threads);

}  // namespace softprompt_fast
