// SPDX-License-Identifier: Apache-2.0
// What the dispatcher knows of an instruction set: plain structs of pointers and strides, and one
// table of functions per isa_*.cpp. No torch, no standard library.
#pragma once

#include <stdint.h>

namespace softprompt_fast {

enum class DType : int32_t { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2, kInt8 = 3 };

constexpr int64_t size_of(DType dtype) {
  return dtype == DType::kFloat32 ? 4 : dtype == DType::kInt8 ? 1 : 2;
}

// A strided tensor of up to four dimensions; strides count elements.
struct Tensor {
  void* data = nullptr;
  DType dtype = DType::kFloat32;
  int64_t stride[4] = {0, 0, 0, 0};

  explicit operator bool() const { return data != nullptr; }
  void* at(int64_t offset) const { return (char*)data + offset * size_of(dtype); }
};

struct PrefixAttention;  // prefix_attention.h
struct GatedLinear;      // linear.h
struct Linear;
struct NormRows;
struct QkvLinear;
struct MergeStates;  // merge_states.h

struct Kernels {
  const char* isa;
  int lanes;
  // One task of the plan (see prefix_attention.h); scratch is the thread's own.
  void (*prefix_attention)(const PrefixAttention& op, int64_t task, float* scratch);
  void (*prefix_attention_merge)(const PrefixAttention& op, int64_t block, float* scratch);
  void (*pack_panel)(const Tensor& w, int64_t rows, int64_t columns, void* panel);
  void (*norm_rows)(const NormRows& op, int64_t first, int64_t last, float* scratch);
  void (*linear)(const Linear& op, int64_t first, int64_t last, int64_t row, int64_t rows,
                 float* scratch);
  void (*gated_linear)(const GatedLinear& op, int64_t first, int64_t last, int64_t row,
                       int64_t rows, float* scratch);
  void (*qkv_linear)(const QkvLinear& op, int64_t head, int64_t row, int64_t rows, float* scratch);
  void (*merge_states)(const MergeStates& op, int64_t first, int64_t last);
};

// Those compiled into this binary; null where the processor's family has no such instruction set.
const Kernels* portable_kernels();
const Kernels* avx2_kernels();
const Kernels* avx512_kernels();
const Kernels* neon_kernels();

}  // namespace softprompt_fast
