// SPDX-License-Identifier: Apache-2.0
// The decode kernel with a warpgroup's products, for GPUs of 9.0. setup.py compiles files of this
// name for 9.0a alone, and defines SOFTPROMPT_FAST_SM90A, where its list of GPUs has that.
#include "launch.h"
#include "prefix_attention_decode.cuh"

namespace softprompt_fast {
namespace cuda {

#if defined(SOFTPROMPT_FAST_SM90A) || !defined(__CUDACC__)

bool has_warpgroups(int device) { return is_hopper(device); }

template <int kHeadDim>
void launch_on_warpgroups(const PrefixAttentionDecode& op, const Queue& queue) {
  using Shared = WarpgroupShared<kHeadDim>;
  static_assert(2 * (sizeof(Shared) + (1 << 10)) <= 228 << 10, "two blocks a multiprocessor");
  const Grid grid{dim3((unsigned)op.plan.blocks()), kDecodeThreads, sizeof(Shared)};
  with_16_bits(op.query.dtype, [&](auto type) {
    using T = decltype(type);
    launch<prefix_attention_decode<T, T, kHeadDim, true>>(queue, grid, op);
  });
}

#else

bool has_warpgroups(int) { return false; }

template <int kHeadDim>
void launch_on_warpgroups(const PrefixAttentionDecode&, const Queue&) {}

#endif

template void launch_on_warpgroups<64>(const PrefixAttentionDecode&, const Queue&);
template void launch_on_warpgroups<128>(const PrefixAttentionDecode&, const Queue&);

}  // namespace cuda
}  // namespace softprompt_fast
