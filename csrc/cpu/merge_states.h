// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "kernels.h"

namespace softprompt_fast {

// `rows` partial attentions of Dv values each, given twice, become one. All dense.
struct MergeStates {
  int64_t rows, v_dim;
  Tensor out_a, out_b, out;  // [rows, Dv], one dtype
  const float *lse_a, *lse_b;
  float* lse;
};

}  // namespace softprompt_fast
