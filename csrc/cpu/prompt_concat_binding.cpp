// SPDX-License-Identifier: Apache-2.0
// The ops softprompt_fast::prompt_concat_cpu and softprompt_fast::prompt_concat_backward_cpu.
#include "../prompt_concat_arguments.h"
#include "binding.h"
#include "prompt_concat.h"

namespace softprompt_fast {
namespace {

void run(PromptConcat op) { run_prompt_concat(op, abi::threads()); }

void forward(abi::Value* stack, uint64_t inputs) {
  const abi::Arguments given(kPromptConcatKinds.c_str(), stack, inputs);
  const PromptConcatCall call(given);
  abi::NewTensor out = new_prompt_concat(call, given);
  run(read_prompt_concat(call, out.view()));
  stack[0] = out.release();
}

void forward_out(abi::Value* stack, uint64_t inputs) {
  const abi::Arguments given(kPromptConcatOutKinds.c_str(), stack, inputs);
  run(read_prompt_concat(PromptConcatCall(given), given.tensor(PromptConcatCall::kCount)));
  stack[0] = 1;
}

void backward(abi::Value* stack, uint64_t inputs) {
  const abi::Arguments given(kPromptConcatBackwardKinds.c_str(), stack, inputs);
  PromptConcatGrad op = read_prompt_concat_backward(given);
  run_prompt_concat_backward(op, abi::threads());
  stack[0] = 1;
}

}  // namespace

void implement_prompt_concat() {
  abi::implement("prompt_concat_cpu", "CPU", &abi::boxed<forward>);
  abi::implement("prompt_concat_cpu.out", "CPU", &abi::boxed<forward_out>);
  abi::implement("prompt_concat_backward_cpu", "CPU", &abi::boxed<backward>);
}

}  // namespace softprompt_fast
