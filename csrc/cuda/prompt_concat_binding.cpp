// SPDX-License-Identifier: Apache-2.0
// The ops softprompt_fast::prompt_concat_cuda and softprompt_fast::prompt_concat_backward_cuda.
#include "../prompt_concat_arguments.h"
#include "binding.h"

namespace softprompt_fast {
namespace cuda {
namespace {

void run(const PromptConcatCall& call, const abi::View& out) {
  run_prompt_concat(read_prompt_concat(call, out), queue_of(call.tokens));
}

void backward(abi::Value* stack, uint64_t inputs) {
  const abi::Arguments given(kPromptConcatBackwardKinds.c_str(), stack, inputs);
  run_prompt_concat_backward(read_prompt_concat_backward(given), queue_of(given.tensor(0)));
  stack[0] = 1;
}

}  // namespace

void implement_prompt_concat() {
  abi::implement("prompt_concat_cuda", dispatch_key(), &abi::boxed<prompt_concat<run>>);
  abi::implement("prompt_concat_cuda.out", dispatch_key(), &abi::boxed<prompt_concat_out<run>>);
  abi::implement("prompt_concat_backward_cuda", dispatch_key(), &abi::boxed<backward>);
}

}  // namespace cuda
}  // namespace softprompt_fast
