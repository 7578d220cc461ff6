// SPDX-License-Identifier: Apache-2.0
// Where a row of "virtual tokens, then own tokens" comes from, and loads and stores of any floating
// dtype: what the kernels of prompt_concat and of the decode step share.
#pragma once

#include "../prompt_concat.h"
#include "device.cuh"

namespace softprompt_fast {
namespace cuda {

// ---- any floating dtype: whole warps see one, so the branch costs next to nothing ----

template <typename T, int size>
__device__ __forceinline__ void load_as(const T* p, float (&to)[size]) {
  if constexpr (size == 1) {
    to[0] = to_float(p[0]);
  } else {
    constexpr int kPart = 16 / sizeof(T) < size ? 16 / sizeof(T) : size;
#pragma unroll
    for (int first = 0; first < size; first += kPart) {
      const auto part = load_vector<kPart>(p + first);
#pragma unroll
      for (int n = 0; n < kPart; ++n) to[first + n] = to_float(part.at[n]);
    }
  }
}

template <typename T, int size>
__device__ __forceinline__ void store_as(T* p, const float (&from)[size]) {
  if constexpr (size == 1) {
    p[0] = from_float<T>(from[0]);
  } else {
    constexpr int kPart = 16 / sizeof(T) < size ? 16 / sizeof(T) : size;
#pragma unroll
    for (int first = 0; first < size; first += kPart) {
      Vector<T, kPart> part;
#pragma unroll
      for (int n = 0; n < kPart; ++n) part.at[n] = from_float<T>(from[first + n]);
      store_vector(p + first, part);
    }
  }
}

// `size` neighbours from element `offset` on.
template <int size>
__device__ __forceinline__ void load_floats(float (&to)[size], const Tensor& x, int64_t offset) {
  switch (x.dtype) {
    case DType::kBFloat16:
      return load_as((const BFloat16*)x.data + offset, to);
    case DType::kFloat16:
      return load_as((const Half*)x.data + offset, to);
    default:
      return load_as((const float*)x.data + offset, to);
  }
}

template <int size>
__device__ __forceinline__ void store_floats(const Tensor& x, int64_t offset,
                                             const float (&from)[size]) {
  switch (x.dtype) {
    case DType::kBFloat16:
      return store_as((BFloat16*)x.data + offset, from);
    case DType::kFloat16:
      return store_as((Half*)x.data + offset, from);
    default:
      return store_as((float*)x.data + offset, from);
  }
}

// ---- rows ----

// The pieces of row b of the batch. Op: PromptConcat or PromptConcatGrad.
template <typename Op>
__device__ __forceinline__ PromptRow prompt_row(const Op& op, const PromptRows& rows, bool left,
                                                int64_t b) {
  const int64_t which = rows.prompt_index ? load_index(rows.prompt_index, b) : 0;
  PromptRow row = {0, 0, op.packed, rows.own_start ? load_index(rows.own_start, b) : 0};
  if (rows.prompt_offsets) {
    const int64_t safe = which < 0 ? 0 : which;
    row.first = load_index(rows.prompt_offsets, safe);
    row.size = load_index(rows.prompt_offsets, safe + 1) - row.first;
  }
  if (which < 0) row.size = 0;
  row.lead = row.start + (left ? op.slots - row.size : 0);
  return row;
}

}  // namespace cuda
}  // namespace softprompt_fast
