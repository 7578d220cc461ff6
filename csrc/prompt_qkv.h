// SPDX-License-Identifier: Apache-2.0
// prompt_qkv for few rows, and the norm of heads behind it: arguments.
#pragma once

#include "prompt_concat.h"

namespace softprompt_fast {

// The rotation of queries and keys, in the pairs (j, j + R / 2), interleaved (2 j, 2 j + 1).
struct Rope {
  Tensor cos, sin;  // [B or 1, tokens, R], stride 0 where 1; any floating dtype; or null
  int64_t size;     // R, even; 0: none
  bool interleaved;
};

// Of a cache whose filled part only the device knows: one value, the first place to fill of the
// `capacity` that keys and values then have. Null: they are the places themselves.
struct CacheStart {
  Index at;
  int64_t capacity;
};

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
  Rope rope;
  Tensor out[3];     // q, k, v: [B, heads, slots + S, dim], any strides
  CacheStart start;  // of k and v
};

// Queries and keys whose heads have an RMS norm, projected and not turned: both in place.
// x * (mean(x^2) + eps)^-1/2 * (offset + weight), then the rotation. All has one 16-bit dtype.
struct HeadNorm {
  int64_t batch, length, head_dim;
  struct Heads {
    int64_t count;
    Tensor values;  // [B, count, S, D], any strides
    Tensor weight;  // [D]
    float offset, eps;
  } of[2];  // q, k
  Rope rope;
  CacheStart start;  // of k
};

}  // namespace softprompt_fast
