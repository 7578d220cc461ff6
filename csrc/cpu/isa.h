// SPDX-License-Identifier: Apache-2.0
// All kernels of one instruction set; the body of every isa_*.cpp.
#pragma once

#include "merge_states_kernel.h"
#include "prefix_attention_kernel.h"
#include "prompt_concat_kernel.h"

namespace softprompt_fast {
namespace SOFTPROMPT_FAST_ISA {

const Kernels kKernels = {
    SOFTPROMPT_FAST_ISA_NAME,
    W,
    prefix_attention,
    prefix_attention_merge,
    merge_states,
    merge_states_backward,
    prompt_concat,
    prompt_concat_grad_prompt,
    prompt_concat_grad_tokens,
};

}  // namespace SOFTPROMPT_FAST_ISA
}  // namespace softprompt_fast
