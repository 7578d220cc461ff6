// SPDX-License-Identifier: Apache-2.0
// prefix_attention for few queries a row: arguments of the kernel, and what the host knows of it.
#pragma once

#include "prefix_attention_plan.h"

namespace softprompt_fast {
namespace cuda {

constexpr int kDecodeWarps = 4, kDecodeThreads = 32 * kDecodeWarps;
constexpr int kMostHeadDim = 256;

struct PrefixAttentionDecode {
  DecodePlan plan;
  DecodeRows rows;
  Tensor query, key, value;         // [B, Hq, S, D], [B, Hkv, T, D], [B, Hkv, T, Dv]
  Tensor prefix_key, prefix_value;  // [Hkv, L, D], [Hkv, L, Dv]: strides 0, 1, 2
  // Of 8-bit prefixes: [Hkv, ceil(L / scale_block)]; strides 0, 1.
  Tensor prefix_key_scale, prefix_value_scale;
  int scale_block;
  Tensor sinks;  // [Hq] or none
  Tensor out;    // [B, Hq, S, Dv], of [B, S, Hq, Dv] memory
  float* lse;    // [B, Hq, S], dense
  int head_dim, v_dim;
  float scale, softcap;  // softcap 0: none
  bool causal;
  int window;  // 0: none
  // Whether 16 bytes of a tensor's features can be copied at once.
  bool vector_query, vector_own, vector_prefix;
  // The workspace: partial results [B, Hkv, G * S, slots, padded Dv], normalised, and their LSEs in
  // units of log 2. Counters [B, Hkv], zero before and after a call.
  float* states;
  float* state_lse;
  unsigned* counters;
};

// 16 queries a warp and fragment; the accumulators of two fit beside the scores up to heads of 128.
constexpr int decode_fragments(int head_dim) { return head_dim <= 128 ? 2 : 1; }
constexpr int decode_tile(int head_dim) { return 16 * kDecodeWarps * decode_fragments(head_dim); }

// The head dimension of the kernel that serves heads of a size.
constexpr int padded_head_dim(int64_t head_dim) {
  return head_dim <= 64 ? 64 : head_dim <= 96 ? 96 : head_dim <= 128 ? 128 : kMostHeadDim;
}

}  // namespace cuda
}  // namespace softprompt_fast
