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

void forward(const MergeStates& op, const abi::View&) { run(op, kernels().merge_states); }

void backward(abi::Value* stack, uint64_t inputs) {
  const abi::Arguments given(kMergeStatesBackwardKinds, stack, inputs);
  run(read_merge_states_backward(given), kernels().merge_states_backward);
  stack[0] = 1;
}

}  // namespace

void implement_merge_states() {
  abi::implement("merge_states_cpu", "CPU", &abi::boxed<merge_states<forward>>);
  abi::implement("merge_states_cpu.out", "CPU", &abi::boxed<merge_states_out<forward>>);
  abi::implement("merge_states_backward_cpu", "CPU", &abi::boxed<backward>);
}

}  // namespace softprompt_fast
