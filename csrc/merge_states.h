// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "tensor.h"

namespace softprompt_fast {

// Partial attentions of two sets of keys become one. An `out` is [n0, n1, n2, Dv], all of one
// dtype; an `lse` is float [n0, n1, n2]; a row is one place in [n0, n1, n2].
struct MergeStates {
  int64_t size[3], v_dim;
  Tensor out_a, lse_a, out_b, lse_b;
  Tensor out, lse;
};

// Gradients of out_a, lse_a, out_b and lse_b from those of out and, where it has data, lse.
// `out` and `lse` have none: the shares come from lse_a and lse_b.
struct MergeStatesGrad : MergeStates {
  Tensor grad_out, grad_lse;
  Tensor grad_a, grad_lse_a, grad_b, grad_lse_b;
};

}  // namespace softprompt_fast
