// SPDX-License-Identifier: Apache-2.0
// The ops softprompt_fast::merge_states_cuda and softprompt_fast::merge_states_backward_cuda.
#include "../merge_states_arguments.h"
#include "binding.h"

namespace softprompt_fast {
namespace cuda {
namespace {

void forward(abi::Value* stack, uint64_t inputs) {
  const abi::Arguments given(kMergeStatesKinds, stack, inputs);
  abi::NewTensor out(given.tensor(0)), lse(given.tensor(1));
  run_merge_states(read_merge_states(given, out.view(), lse.view()), queue_of(given.tensor(0)));
  stack[0] = out.release();
  stack[1] = lse.release();
}

void forward_out(abi::Value* stack, uint64_t inputs) {
  const abi::Arguments given(kMergeStatesOutKinds, stack, inputs);
  run_merge_states(read_merge_states(given, given.tensor(4), given.tensor(5)),
                   queue_of(given.tensor(0)));
  stack[0] = 1;
}

void backward(abi::Value* stack, uint64_t inputs) {
  const abi::Arguments given(kMergeStatesBackwardKinds, stack, inputs);
  run_merge_states_backward(read_merge_states_backward(given), queue_of(given.tensor(0)));
  stack[0] = 1;
}

}  // namespace

void implement_merge_states() {
  abi::implement("merge_states_cuda", dispatch_key(), &abi::boxed<forward>);
  abi::implement("merge_states_cuda.out", dispatch_key(), &abi::boxed<forward_out>);
  abi::implement("merge_states_backward_cuda", dispatch_key(), &abi::boxed<backward>);
}

}  // namespace cuda
}  // namespace softprompt_fast
