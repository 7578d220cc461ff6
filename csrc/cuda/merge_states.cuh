// SPDX-License-Identifier: Apache-2.0
// merge_states: one pass, a row's columns shared out over neighbouring lanes of a warp.
#pragma once

#include "../merge_states.h"
#include "device.cuh"

namespace softprompt_fast {
namespace cuda {

constexpr int kMergeThreads = 256;

template <typename Op>
struct MergeParams {
  Op op;
  int rows;
  int lanes;  // of a row: a power of two up to 32
};

// What two log-sum-exps merge to, and the shares e^(a - lse) and e^(b - lse). They come from the
// difference alone, for a large lse has no digits left; a NaN on either side is in it.
struct Shares {
  float a, b, lse;
};

__device__ __forceinline__ Shares shares(float a, float b) {
  if (a == -INFINITY && b == -INFINITY) return {0.0f, 0.0f, -INFINITY};  // both states are empty
  const float difference = a - b;
  const float ratio = expf(-fabsf(difference));
  const float larger = 1.0f / (1.0f + ratio), smaller = ratio * larger;
  const float lse = (a > b ? a : b) + log1pf(ratio);
  return difference >= 0.0f ? Shares{larger, smaller, lse} : Shares{smaller, larger, lse};
}

// This thread's row, and where it begins in a tensor.
struct MergeRow {
  int i, j, k;

  template <typename Op>
  __device__ MergeRow(const MergeParams<Op>& p, int row) {
    const int size1 = (int)p.op.size[1], size2 = (int)p.op.size[2];
    k = row % size2;
    j = row / size2 % size1;
    i = row / size2 / size1;
  }
  __device__ int64_t operator()(const Tensor& x) const {
    return i * x.stride[0] + j * x.stride[1] + k * x.stride[2];
  }
};

// Elements c..c + size - 1 of a row, as floats; those at `count` and behind are 0.
template <int size, typename T>
__device__ __forceinline__ void load_columns(float (&to)[size], const T* row, int64_t stride,
                                             int c) {
  if constexpr (size == 1) {
    to[0] = to_float(row[c * stride]);
  } else {
    const auto x = load_vector<size>(row + c);
#pragma unroll
    for (int n = 0; n < size; ++n) to[n] = to_float(x.at[n]);
  }
}

template <int size, typename T>
__device__ __forceinline__ void store_columns(T* row, int64_t stride, int c,
                                              const float (&from)[size]) {
  if constexpr (size == 1) {
    row[c * stride] = from_float<T>(from[0]);
  } else {
    Vector<T, size> x;
#pragma unroll
    for (int n = 0; n < size; ++n) x.at[n] = from_float<T>(from[n]);
    store_vector(row + c, x);
  }
}

// `size` elements an access: 1 for any strides, else rows are dense and lie at multiples of it.
template <typename T, int size>
__global__ void __launch_bounds__(kMergeThreads)
    merge_states(const __grid_constant__ MergeParams<MergeStates> p) {
  const MergeStates& op = p.op;
  const int row = (int)((blockIdx.x * kMergeThreads + threadIdx.x) / p.lanes);
  if (row >= p.rows) return;
  const int lane = threadIdx.x % p.lanes;
  const MergeRow at(p, row);
  const Shares share = shares(((const float*)op.lse_a.data)[at(op.lse_a)],
                              ((const float*)op.lse_b.data)[at(op.lse_b)]);
  if (lane == 0) ((float*)op.lse.data)[at(op.lse)] = share.lse;
  const T* from_a = (const T*)op.out_a.data + at(op.out_a);
  const T* from_b = (const T*)op.out_b.data + at(op.out_b);
  T* to = (T*)op.out.data + at(op.out);
  for (int c = lane * size; c < (int)op.v_dim; c += p.lanes * size) {
    float a[size], b[size];
    load_columns(a, from_a, op.out_a.stride[3], c);
    load_columns(b, from_b, op.out_b.stride[3], c);
#pragma unroll
    for (int n = 0; n < size; ++n) a[n] = share.a * a[n] + share.b * b[n];
    store_columns(to, op.out.stride[3], c, a);
  }
}

// With w_x = e^(lse_x - lse): d out / d out_x = w_x, d lse / d lse_x = w_x, and d out / d lse_a =
// w_a (out_a - out) = w_a w_b (out_a - out_b), the last form because out may be rounded to 16 bits.
template <typename T, int size>
__global__ void __launch_bounds__(kMergeThreads)
    merge_states_backward(const __grid_constant__ MergeParams<MergeStatesGrad> p) {
  const MergeStatesGrad& op = p.op;
  const int row = (int)((blockIdx.x * kMergeThreads + threadIdx.x) / p.lanes);
  const int lane = threadIdx.x % p.lanes;
  const bool exists = row < p.rows;  // the sum below is a whole warp's
  const MergeRow at(p, exists ? row : 0);
  Shares share = {};
  float along = 0.0f;
  if (exists) {
    share = shares(((const float*)op.lse_a.data)[at(op.lse_a)],
                   ((const float*)op.lse_b.data)[at(op.lse_b)]);
    const T* from = (const T*)op.grad_out.data + at(op.grad_out);
    const T* from_a = (const T*)op.out_a.data + at(op.out_a);
    const T* from_b = (const T*)op.out_b.data + at(op.out_b);
    T* to_a = (T*)op.grad_a.data + at(op.grad_a);
    T* to_b = (T*)op.grad_b.data + at(op.grad_b);
    for (int c = lane * size; c < (int)op.v_dim; c += p.lanes * size) {
      float grad[size], a[size], b[size];
      load_columns(grad, from, op.grad_out.stride[3], c);
      load_columns(a, from_a, op.out_a.stride[3], c);
      load_columns(b, from_b, op.out_b.stride[3], c);
#pragma unroll
      for (int n = 0; n < size; ++n) {
        along += grad[n] * (a[n] - b[n]);
        a[n] = share.a * grad[n];
        b[n] = share.b * grad[n];
      }
      store_columns(to_a, op.grad_a.stride[3], c, a);
      store_columns(to_b, op.grad_b.stride[3], c, b);
    }
  }
  for (int bit = p.lanes / 2; bit > 0; bit /= 2) along += __shfl_xor_sync(kAllLanes, along, bit);
  if (!exists || lane != 0) return;
  along *= share.a * share.b;
  const float upstream = op.grad_lse ? ((const float*)op.grad_lse.data)[at(op.grad_lse)] : 0.0f;
  ((float*)op.grad_lse_a.data)[at(op.grad_lse_a)] = along + share.a * upstream;
  ((float*)op.grad_lse_b.data)[at(op.grad_lse_b)] = -along + share.b * upstream;
}

}  // namespace cuda
}  // namespace softprompt_fast
