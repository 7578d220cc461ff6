// SPDX-License-Identifier: Apache-2.0
// The ops softprompt_fast::prompt_concat_cpu and softprompt_fast::prompt_concat_backward_cpu.
#include "../prompt_concat_arguments.h"
#include "binding.h"
#include "prompt_concat.h"

namespace softprompt_fast {
namespace {

void run(const PromptConcatCall& call, const abi::View& out) {
  PromptConcat op = read_prompt_concat(call, out);
  run_prompt_concat(op, abi::threads());
}

void backward(abi::Value* stack, uint64_t inputs) {
  const abi::Arguments given(kPromptConcatBackwardKinds.c_str(), stack, inputs);
  PromptConcatGrad op = read_prompt_concat_backward(given);
  run_prompt_concat_backward(op, abi::threads());
  stack[0] = 1;
}

}  // namespace

void implement_prompt_concat() {
  abi::implement("prompt_concat_cpu", "CPU", &abi::boxed<prompt_concat<run>>);
  abi::implement("prompt_concat_cpu.out", "CPU", &abi::boxed<prompt_concat_out<run>>);
  abi::implement("prompt_concat_backward_cpu", "CPU", &abi::boxed<backward>);
}

}  // namespace softprompt_fast
