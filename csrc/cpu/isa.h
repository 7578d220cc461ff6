// SPDX-License-Identifier: Apache-2.0
// All kernels of one instruction set; the body of every isa_*.cpp.
#pragma once

#include "linear_kernel.h"
#include "merge_states_kernel.h"
#include "prefix_attention_backward_kernel.h"
#include "prefix_attention_kernel.h"
#include "prompt_concat_kernel.h"
#include "training_kernel.h"

namespace softprompt_fast {
namespace SOFTPROMPT_FAST_ISA {

const Kernels kKernels = {
    SOFTPROMPT_FAST_ISA_NAME,
    prefix_attention,
    prefix_attention_merge,
    prefix_attention_backward,
    prefix_attention_backward_sum,
    merge_states,
    merge_states_backward,
    prompt_concat,
    prompt_concat_grad_prompt,
    prompt_concat_grad_tokens,
    pack_panel,
    norm_rows,
    linear,
    gated_linear,
    qkv_linear,
    product,
    gated_product,
    gated_product_backward,
    norm_rows_backward,
    rotate_rows,
    cross_entropy_rows,
};

}  // namespace SOFTPROMPT_FAST_ISA
}  // namespace softprompt_fast
