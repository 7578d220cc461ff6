// SPDX-License-Identifier: Apache-2.0
// The ops softprompt_fast::prompt_concat_cuda and softprompt_fast::prompt_concat_backward_cuda.
#include "../prompt_concat_arguments.h"
#include "binding.h"

namespace softprompt_fast {
namespace cuda {
namespace {

void forward(abi::Value* stack, uint64_t inputs) {
  const abi::Arguments given(kPromptConcatKinds.c_str(), stack, inputs);
  const PromptConcatCall call(given);
  abi::NewTensor out = new_prompt_concat(call, given);
  run_prompt_concat(read_prompt_concat(call, out.view()), queue_of(call.tokens));
  stack[0] = out.release();
}

void forward_out(abi::Value* stack, uint64_t inputs) {
  const abi::Arguments given(kPromptConcatOutKinds.c_str(), stack, inputs);
  const PromptConcatCall call(given);
  run_prompt_concat(read_prompt_concat(call, given.tensor(PromptConcatCall::kCount)),
                    queue_of(call.tokens));
  stack[0] = 1;
}

void backward(abi::Value* stack, uint64_t inputs) {
  const abi::Arguments given(kPromptConcatBackwardKinds.c_str(), stack, inputs);
  run_prompt_concat_backward(read_prompt_concat_backward(given), queue_of(given.tensor(0)));
  stack[0] = 1;
}

}  // namespace

void implement_prompt_concat() {
  abi::implement("prompt_concat_cuda", dispatch_key(), &abi::boxed<forward>);
  abi::implement("prompt_concat_cuda.out", dispatch_key(), &abi::boxed<forward_out>);
  abi::implement("prompt_concat_backward_cuda", dispatch_key(), &abi::boxed<backward>);
}

}  // namespace cuda
}  // namespace softprompt_fast
