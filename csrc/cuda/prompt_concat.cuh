// SPDX-License-Identifier: Apache-2.0
// prompt_concat: gather, scale, cast and concatenate in one pass; its gradients. A warp moves a row
// of the hidden size; all three are bound by memory alone.
#pragma once

#include "prompt_rows.cuh"

namespace softprompt_fast {
namespace cuda {

constexpr int kConcatWarps = 4;  // of a block: a row each
constexpr int kSumWarps = 8;     // of a block of the prompt's gradient: they share the batch

// `size` elements an access: 8, or 1 where rows are not dense or not at multiples of 16 bytes.
template <int size>
__global__ void __launch_bounds__(32 * kConcatWarps)
    prompt_concat(const __grid_constant__ PromptConcat op) {
  const int64_t slots = op.slots + op.own;
  const int64_t line = (int64_t)blockIdx.x * kConcatWarps + threadIdx.x / 32;  // of out
  if (line >= op.batch * slots) return;
  const Source from = locate(op, line);
  for (int64_t c = threadIdx.x % 32 * size; c < op.width; c += 32 * size) {
    float x[size] = {};
    if (from.data != nullptr) {
      load_floats(x, from.dtype, as_global(from.data), from.offset + c * from.step);
#pragma unroll
      for (int n = 0; n < size; ++n) x[n] *= from.scale;
    }
    store_floats(op.out, line * op.width + c, x);
  }
}

// An entry's columns, `32 size` of them, are a block's: its warps take the batch's rows in turn and
// their sums meet in shared memory, so the order of additions depends on nothing but the batch.
template <int size>
__global__ void __launch_bounds__(32 * kSumWarps)
    prompt_concat_grad_prompt(const __grid_constant__ PromptConcatGrad op) {
  const int64_t parts = (op.width + 32 * size - 1) / (32 * size);
  const int64_t entry = blockIdx.x / parts;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t c = blockIdx.x % parts * (32 * size) + lane * size;
  float sum[size] = {};
  for (int64_t b = warp; b < op.batch; b += kSumWarps) {
    const PromptRow row = prompt_row(op, b);
    const int64_t place = entry - row.first;
    if (place < 0 || place >= row.size || c >= op.width) continue;
    const int64_t offset = b * op.grad_out.stride[0] + (row.lead + place) * op.grad_out.stride[1];
    float x[size];
    load_floats(x, op.grad_out, offset + c * op.grad_out.stride[2]);
#pragma unroll
    for (int n = 0; n < size; ++n) sum[n] += x[n];
  }
  // [warp][n][lane]: neighbours in a bank each.
  float* sums = (float*)shared_memory();
#pragma unroll
  for (int n = 0; n < size; ++n) sums[(warp * size + n) * 32 + lane] = sum[n];
  __syncthreads();
  if (warp != 0 || c >= op.width) return;
#pragma unroll
  for (int n = 0; n < size; ++n) {
    for (int other = 1; other < kSumWarps; ++other) sum[n] += sums[(other * size + n) * 32 + lane];
    sum[n] *= op.prompt_scale;
  }
  store_floats(op.grad_prompt, entry * op.width + c, sum);
}

template <int size>
__global__ void __launch_bounds__(32 * kConcatWarps)
    prompt_concat_grad_tokens(const __grid_constant__ PromptConcatGrad op) {
  const int64_t line = (int64_t)blockIdx.x * kConcatWarps + threadIdx.x / 32;  // of grad_tokens
  if (line >= op.batch * op.own) return;
  const int64_t b = line / op.own, token = line % op.own;
  const PromptRow row = prompt_row(op, b);
  const int64_t slot = row.lead + row.size + token - row.start;
  const int64_t offset = b * op.grad_out.stride[0] + slot * op.grad_out.stride[1];
  for (int64_t c = threadIdx.x % 32 * size; c < op.width; c += 32 * size) {
    float x[size] = {};
    if (token >= row.start) {  // tokens before it are not read
      load_floats(x, op.grad_out, offset + c * op.grad_out.stride[2]);
#pragma unroll
      for (int n = 0; n < size; ++n) x[n] *= op.scale;
    }
    store_floats(op.grad_tokens, line * op.width + c, x);
  }
}

}  // namespace cuda
}  // namespace softprompt_fast
