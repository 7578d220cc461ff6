// SPDX-License-Identifier: Apache-2.0
// What the dispatcher knows of an instruction set: plain structs of pointers and strides, and one
// table of functions per isa_*.cpp. No torch, no standard library.
#pragma once

#include <stdint.h>

#include "../tensor.h"

namespace softprompt_fast {

struct PrefixAttention;          // prefix_attention.h
struct PrefixAttentionBackward;  // prefix_attention_backward.h
struct MergeStates;              // merge_states.h
struct MergeStatesGrad;
struct PromptConcat;  // prompt_concat.h
struct PromptConcatGrad;
struct PromptGradTask;
struct GatedLinear;  // linear.h
struct Linear;
struct NormRows;
struct QkvLinear;
struct Product;  // training.h
struct GatedProduct;
struct GatedProductBackward;
struct NormRowsBackward;
struct RotateRows;
struct CrossEntropyRows;

struct Kernels {
  const char* isa;
  // One task of a plan (see the ops' headers); scratch is the thread's own.
  void (*prefix_attention)(const PrefixAttention& op, int64_t task, float* scratch);
  void (*prefix_attention_merge)(const PrefixAttention& op, int64_t block, float* scratch);
  void (*prefix_attention_backward)(const PrefixAttentionBackward& op, int64_t task,
                                    float* scratch);
  void (*prefix_attention_backward_sum)(const PrefixAttentionBackward& op, int64_t task,
                                        float* scratch);
  // Runs of rows, slots or tokens first..last-1.
  void (*merge_states)(const MergeStates& op, int64_t first, int64_t last);
  void (*merge_states_backward)(const MergeStatesGrad& op, int64_t first, int64_t last);
  int64_t (*prompt_concat)(const PromptConcat& op, int64_t first, int64_t last);
  void (*prompt_concat_grad_prompt)(const PromptConcatGrad& op, const PromptGradTask& task);
  void (*prompt_concat_grad_tokens)(const PromptConcatGrad& op, int64_t first, int64_t last);
  void (*pack_panel)(const Tensor& w, int64_t rows, int64_t columns, void* panel);
  void (*norm_rows)(const NormRows& op, int64_t first, int64_t last, float* scratch);
  // Panels first..last-1, or one head, for some rows.
  void (*linear)(const Linear& op, int64_t first, int64_t last, int64_t row, int64_t rows,
                 float* scratch);
  void (*gated_linear)(const GatedLinear& op, int64_t first, int64_t last, int64_t row,
                       int64_t rows, float* scratch);
  void (*qkv_linear)(const QkvLinear& op, int64_t head, int64_t row, int64_t rows, float* scratch);
  void (*product)(const Product& op, int64_t first, int64_t last, int64_t row, int64_t rows,
                  float* scratch);
  void (*gated_product)(const GatedProduct& op, int64_t first, int64_t last, int64_t row,
                        int64_t rows, float* scratch);
  void (*gated_product_backward)(const GatedProductBackward& op, int64_t first, int64_t last,
                                 int64_t row, int64_t rows, float* scratch);
  void (*norm_rows_backward)(const NormRowsBackward& op, int64_t first, int64_t last);
  void (*rotate_rows)(const RotateRows& op, int64_t first, int64_t last);
  void (*cross_entropy_rows)(const CrossEntropyRows& op, int64_t first, int64_t last);
};

// Those compiled into this binary; null where the processor's family has no such instruction set.
const Kernels* portable_kernels();
const Kernels* avx2_kernels();
const Kernels* avx512_kernels();
const Kernels* neon_kernels();

}  // namespace softprompt_fast
