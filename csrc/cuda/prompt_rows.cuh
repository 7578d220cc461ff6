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
__device__ __forceinline__ void load_floats(float (&to)[size], DType dtype, const void* data,
                                            int64_t offset) {
  switch (dtype) {
    case DType::kBFloat16:
      return load_as((const BFloat16*)data + offset, to);
    case DType::kFloat16:
      return load_as((const Half*)data + offset, to);
    default:
      return load_as((const float*)data + offset, to);
  }
}
template <int size>
__device__ __forceinline__ void load_floats(float (&to)[size], const Tensor& x, int64_t offset) {
  load_floats(to, x.dtype, x.data, offset);
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

// The pieces of row b of the batch.
__device__ __forceinline__ PromptRow prompt_row(const PromptBatch& op, int64_t b) {
  const int64_t which = op.prompt_index ? load_index(op.prompt_index, b) : 0;
  PromptRow row = {0, 0, op.packed, op.own_start ? load_index(op.own_start, b) : 0};
  if (op.prompt_offsets) {
    const int64_t safe = which < 0 ? 0 : which;
    row.first = load_index(op.prompt_offsets, safe);
    row.size = load_index(op.prompt_offsets, safe + 1) - row.first;
  }
  if (which < 0) row.size = 0;
  row.lead = row.start + (op.left ? op.slots - row.size : 0);
  return row;
}

// Where a line of the result, counted over batch and slots, comes from.
struct Source {
  const void* data;  // null: zeros
  DType dtype;
  int64_t offset, step;  // of its first element and between neighbours
  float scale;
};

__device__ __forceinline__ Source locate(const PromptConcat& op, int64_t line) {
  const int64_t slots = op.slots + op.own, b = line / slots;
  const PromptRow row = prompt_row(op, b);
  const int64_t place = line % slots - row.lead, entry = row.first + place;
  const int64_t token = place - row.size + row.start;
  // The comparison with the pack keeps offsets that promise too much from being followed.
  if (place >= 0 && place < row.size && entry >= 0 && entry < op.packed) {
    return {op.prompt.data, op.prompt.dtype, entry * op.prompt.stride[0], op.prompt.stride[1],
            op.prompt_scale};
  }
  if (place < row.size || place < 0 || token >= op.own) return {};
  if (op.ids == nullptr) {
    return {op.tokens.data, op.tokens.dtype, b * op.tokens.stride[0] + token * op.tokens.stride[1],
            op.tokens.stride[2], op.scale};
  }
  const int64_t id = op.ids[b * op.id_stride[0] + token * op.id_stride[1]];
  const bool known = id >= 0 && id < op.vocabulary;
  device_assert(known, "a token id is outside the table");
  if (!known) return {};
  return {op.table.data, op.table.dtype, id * op.table.stride[0], op.table.stride[1], op.scale};
}

}  // namespace cuda
}  // namespace softprompt_fast
