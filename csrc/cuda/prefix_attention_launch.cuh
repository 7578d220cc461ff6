// SPDX-License-Identifier: Apache-2.0
// Launches the kernels of one head dimension. A file each (prefix_attention_d*.cu), so that they
// compile side by side.
#pragma once

#include "launch.h"
#include "prefix_attention_decode.cuh"

namespace softprompt_fast {
namespace cuda {

template <int kHeadDim>
void launch_prefix_attention(const PrefixAttentionDecode& op, const Queue& queue) {
  const Grid grid{dim3((unsigned)op.plan.blocks()), kDecodeThreads, sizeof(DecodeShared<kHeadDim>)};
  with_16_bits(op.query.dtype, [&](auto type) {
    using T = decltype(type);
    if (op.prefix_key.dtype == DType::kInt8) {
      launch<prefix_attention_decode<T, int8_t, kHeadDim, false>>(queue, grid, op);
    } else if (op.prefix_key.dtype == kFloat8) {
      launch<prefix_attention_decode<T, Float8, kHeadDim, false>>(queue, grid, op);
    } else {
      launch<prefix_attention_decode<T, T, kHeadDim, false>>(queue, grid, op);
    }
  });
}

}  // namespace cuda
}  // namespace softprompt_fast
