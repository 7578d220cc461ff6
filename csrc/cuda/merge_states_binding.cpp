// SPDX-License-Identifier: Apache-2.0
// The ops softprompt_fast::merge_states_cuda and softprompt_fast::merge_states_backward_cuda.
#include "../merge_states_arguments.h"
#include "binding.h"

namespace softprompt_fast {
namespace cuda {
namespace {

void run(const MergeStates& op, const abi::View& any) { run_merge_states(op, queue_of(any)); }

void backward(abi::Value* stack, uint64_t inputs) {
  const abi::Arguments given(kMergeStatesBackwardKinds, stack, inputs);
  run_merge_states_backward(read_merge_states_backward(given), queue_of(given.tensor(0)));
  stack[0] = 1;
}

}  // namespace

void implement_merge_states() {
  abi::implement("merge_states_cuda", dispatch_key(), &abi::boxed<merge_states<run>>);
  abi::implement("merge_states_cuda.out", dispatch_key(), &abi::boxed<merge_states_out<run>>);
  abi::implement("merge_states_backward_cuda", dispatch_key(), &abi::boxed<backward>);
}

}  // namespace cuda
}  // namespace softprompt_fast
