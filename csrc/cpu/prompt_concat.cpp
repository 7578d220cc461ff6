// SPDX-License-Identifier: Apache-2.0
// The host side of prompt_concat: where each row's pieces lie, and how the work is shared out.
#include "prompt_concat.h"

#include <algorithm>
#include <atomic>
#include <limits>
#include <stdexcept>
#include <vector>

#include "../checks.h"
#include "dispatch.h"
#include "parallel.h"
#include "prefix_attention.h"

namespace softprompt_fast {
namespace {

constexpr int64_t kMinColumns = 256;  // of a line that several tasks share
constexpr int64_t kTask = 1 << 15;    // elements of one task
constexpr int64_t kSerial = 1 << 16;  // elements below which a second thread is not worth waking

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The prompts of a pack, and which of them a row uses.
struct Prompts {
  const PromptBatch& op;

  int64_t count() const { return op.prompt_offsets ? op.prompt_offsets.size - 1 : 1; }
  int64_t first(int64_t prompt) const { return op.prompt_offsets ? op.prompt_offsets[prompt] : 0; }
  int64_t end(int64_t prompt) const {
    return op.prompt_offsets ? op.prompt_offsets[prompt + 1] : op.packed;
  }
  int64_t of(int64_t row) const { return op.prompt_index ? op.prompt_index[row] : 0; }
};

// Sets op.rows, which stay until this thread's next call.
void place_rows(PromptBatch& op) {
  thread_local std::vector<PromptRow> rows;  // kept, so that a later call need not allocate
  rows.resize(op.batch);
  const Prompts prompts = {op};
  for (int64_t b = 0; b < op.batch; ++b) {
    const int64_t prompt = prompts.of(b), start = op.own_start ? op.own_start[b] : 0;
    const int64_t first = prompt < 0 ? 0 : prompts.first(prompt);
    const int64_t size = prompt < 0 ? 0 : prompts.end(prompt) - first;
    rows[b] = {start + (op.left ? op.slots - size : 0), first, size, start};
  }
  op.rows = rows.data();
}

// Run body(first, last) over 0..count-1 in tasks of about kTask elements, `width` to each.
template <typename Body>
void for_lines(int64_t count, int64_t width, int threads, const Body& body) {
  if (count * width < kSerial) threads = 1;
  const int64_t step = std::max<int64_t>(1, kTask / width);
  parallel_for(ceil_div(count, step), threads,
               [&](int64_t task, int) { body(task * step, std::min(count, (task + 1) * step)); });
}

}  // namespace

void run_prompt_concat(PromptConcat& op, int threads) {
  if (op.width == 0) return;
  place_rows(op);
  constexpr int64_t kNone = std::numeric_limits<int64_t>::max();
  std::atomic<int64_t> wrong{kNone};
  const Kernels& isa = kernels();
  for_lines(op.batch * (op.slots + op.own), op.width, threads, [&](int64_t first, int64_t last) {
    const int64_t found = isa.prompt_concat(op, first, last);
    int64_t least = wrong;
    while (found >= 0 && found < least && !wrong.compare_exchange_weak(least, found)) {
    }
  });
  if (wrong == kNone) return;
  const int64_t row = wrong / op.own, column = wrong % op.own;
  throw std::out_of_range(
      concat("tokens: id ", op.ids[row * op.id_stride[0] + column * op.id_stride[1]], " in row ",
             row, ", column ", column, " is outside the vocabulary of ", op.vocabulary, " tokens"));
}

void run_prompt_concat_backward(PromptConcatGrad& op, int threads) {
  thread_local std::vector<int64_t> order, begins;  // where in order the rows of a prompt begin
  thread_local std::vector<PromptGradTask> tasks;
  if (op.width == 0) return;
  place_rows(op);
  const Prompts prompts = {op};
  const Kernels& isa = kernels();
  if (op.grad_tokens) {
    for_lines(op.batch * op.own, op.width, threads,
              [&](int64_t first, int64_t last) { isa.prompt_concat_grad_tokens(op, first, last); });
  }

  // Rows sorted by their prompt; those without one are in no list.
  begins.assign(prompts.count() + 1, 0);
  for (int64_t b = 0; b < op.batch; ++b) {
    if (prompts.of(b) >= 0) ++begins[prompts.of(b) + 1];
  }
  for (int64_t i = 0; i < prompts.count(); ++i) begins[i + 1] += begins[i];
  order.resize(begins.back());
  // From the last row back, so that each prompt's rows stand in their own order; begins[i + 1]
  // moves from where the rows of prompt i end to where they begin.
  for (int64_t b = op.batch - 1; b >= 0; --b) {
    if (prompts.of(b) >= 0) order[--begins[prompts.of(b) + 1]] = b;
  }
  op.order = order.data();

  // Whole lines where they fit, for the sake of long reads; pieces of them where entries are few.
  const int64_t few = ceil_div(4 * threads, std::max<int64_t>(1, op.packed));
  const int64_t blocks = std::max(ceil_div(op.width, kPromptGradColumns),
                                  std::min(ceil_div(op.width, kMinColumns), few));
  const int64_t columns = (ceil_div(op.width, blocks) + kMaxLanes - 1) / kMaxLanes * kMaxLanes;
  int64_t work = 0;
  tasks.clear();
  const auto add = [&](int64_t entry, int64_t end, int64_t row_begin, int64_t row_end) {
    const int64_t cost = std::max<int64_t>(1, row_end - row_begin) * columns;  // of an entry
    const int64_t step = std::max<int64_t>(1, kTask / cost);
    work += (end - entry) * cost;
    for (; entry < end; entry += step) {
      for (int64_t column = 0; column < op.width; column += columns) {
        tasks.push_back({entry, std::min(end, entry + step), column,
                         std::min(op.width, column + columns), row_begin, row_end});
      }
    }
  };
  // Entries before, between and behind the prompts belong to none: their gradient is 0.
  const int64_t count = prompts.count();
  add(0, prompts.first(0), 0, 0);
  for (int64_t i = 0; i < count; ++i) {
    const int64_t end = i + 1 < count ? begins[i + 2] : static_cast<int64_t>(order.size());
    add(prompts.first(i), prompts.end(i), begins[i + 1], end);
  }
  add(prompts.end(count - 1), op.packed, 0, 0);
  const PromptGradTask* list = tasks.data();  // this thread's; each has its own `tasks`
  parallel_for(static_cast<int64_t>(tasks.size()), work * blocks < kSerial ? 1 : threads,
               [&](int64_t task, int) { isa.prompt_concat_grad_prompt(op, list[task]); });
}

}  // namespace softprompt_fast
