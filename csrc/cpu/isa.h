// SPDX-License-Identifier: Apache-2.0
// All kernels of one instruction set; the body of every isa_*.cpp.
#pragma once

#include "linear_kernel.h"
#include "merge_states_kernel.h"
#include "prefix_attention_kernel.h"

namespace softprompt_fast {
namespace SOFTPROMPT_FAST_ISA {

const Kernels kKernels = {
    SOFTPROMPT_FAST_ISA_NAME,
    W,
    prefix_attention,
    prefix_attention_merge,
    pack_panel,
    norm_rows,
    linear,
    gated_linear,
    qkv_linear,
    merge_states,
};

}  // namespace SOFTPROMPT_FAST_ISA
}  // namespace softprompt_fast
