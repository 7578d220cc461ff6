// SPDX-License-Identifier: Apache-2.0
// The ops softprompt_fast::merge_states_cpu and softprompt_fast::merge_states_backward_cpu.
#include "../merge_states_arguments.h"
#include "binding.h"
#include "dispatch.h"
#include "parallel.h"

namespace softprompt_fast {
namespace {

template <typename Op>
void run(const Op& op, void (*kernel)(const Op&, int64_t, int64_t)) {
  constexpr int64_t kRows = 256;  // of one task
  const int64_t rows = rows_of(op);
  parallel_for((rows + kRows - 1) / kRows, rows * op.v_dim < 1 << 15 ? 1 : abi::threads(),
               [&](int64_t task, int) {
                 const int64_t last = (task + 1) * kRows;
                 kernel(op, task * kRows, last < rows ? last : rows);
               });
}

void forward(abi::Value* stack, uint64_t inputs) {
  const abi::Arguments given(kMergeStatesKinds, stack, inputs);
  abi::NewTensor out(given.tensor(0)), lse(given.tensor(1));
  run(read_merge_states(given, out.view(), lse.view()), kernels().merge_states);
  stack[0] = out.release();
  stack[1] = lse.release();
}

void forward_out(abi::Value* stack, uint64_t inputs) {
  const abi::Arguments given(kMergeStatesOutKinds, stack, inputs);
  run(read_merge_states(given, given.tensor(4), given.tensor(5)), kernels().merge_states);
  stack[0] = 1;
}

void backward(abi::Value* stack, uint64_t inputs) {
  const abi::Arguments given(kMergeStatesBackwardKinds, stack, inputs);
  run(read_merge_states_backward(given), kernels().merge_states_backward);
  stack[0] = 1;
}

}  // namespace

void implement_merge_states() {
  abi::implement("merge_states_cpu", "CPU", &abi::boxed<forward>);
  abi::implement("merge_states_cpu.out", "CPU", &abi::boxed<forward_out>);
  abi::implement("merge_states_backward_cpu", "CPU", &abi::boxed<backward>);
}

}  // namespace softprompt_fast
