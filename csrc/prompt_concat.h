// SPDX-License-Identifier: Apache-2.0
// prompt_concat: arguments of forward and backward.
#pragma once

#include "tensor.h"

namespace softprompt_fast {

// A row of the result: `lead` empty slots, entries first..first+size-1 of the pack, the own tokens
// from `start` on, and empty slots up to its end.
struct PromptRow {
  int64_t lead, first, size, start;
};

// What says where the rows' pieces lie.
struct PromptBatch {
  int64_t batch, own, packed, slots, width;
  Index prompt_offsets, prompt_index, own_start;  // each as in the op's contract, or absent
  bool left;                                      // the padding side
  float scale, prompt_scale;
  const PromptRow* rows;  // B of them, which the CPU lays out beforehand
};

struct PromptConcat : PromptBatch {
  int64_t vocabulary;
  const int64_t* ids;  // [B, S] with id_stride, or null
  int64_t id_stride[2];
  Tensor tokens;  // [B, S, H] embeddings, where there are no ids
  Tensor table;   // [V, H]
  Tensor prompt;  // [L, H]
  Tensor out;     // [B, slots + S, H], dense
};

struct PromptConcatGrad : PromptBatch {
  Tensor grad_out;       // [B, slots + S, H]
  Tensor grad_prompt;    // [L, H], dense
  Tensor grad_tokens;    // [B, S, H], dense; data null: not wanted
  const int64_t* order;  // the rows' numbers, those of one prompt next to each other
};

}  // namespace softprompt_fast
