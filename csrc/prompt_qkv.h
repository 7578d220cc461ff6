// SPDX-License-Identifier: Apache-2.0
// prompt_qkv for few rows: arguments.
#pragma once

#include "prompt_concat.h"

namespace softprompt_fast {

// Rows are normalised, projected and turned; queries, keys and values are written where they stay.
// Everything but cos and sin has one 16-bit dtype.
struct PromptQkv {
  PromptConcat concat;  // where rows come from; without a prompt: slots and packed 0, no ids. Its
                        // `out` is the residual, null where nobody wants it

  enum Norm : int32_t { kNone = 0, kRms = 1, kLayer = 2 };
  Norm norm;
  Tensor norm_weight, norm_bias;  // [H], or null
  float norm_offset, eps;

  int64_t q_heads, kv_heads, head_dim, value_dim;
  Tensor weight[3];  // q, k, v: [heads * dim, H]
  Tensor bias[3];    // [heads * dim], or null
  Tensor cos, sin;   // [B or 1, slots + S, R], stride 0 where 1; or null
  int64_t rotation;  // R, even; 0: none
  bool interleaved;
  Tensor out[3];  // q, k, v: [B, heads, slots + S, dim], any strides
  // Of a cache whose filled part only the device knows: one value, the first place to fill of the
  // `capacity` that k and v then have. Null: k and v are the places themselves.
  Index start;
  int64_t capacity;
};

}  // namespace softprompt_fast
