// SPDX-License-Identifier: Apache-2.0
#include "kernels.h"
#include "launch.h"

namespace softprompt_fast {
namespace cuda {

template <int kHeadDim>
void launch_prefix_attention(const PrefixAttentionDecode& op, const Queue& queue);
extern template void launch_prefix_attention<64>(const PrefixAttentionDecode&, const Queue&);
extern template void launch_prefix_attention<96>(const PrefixAttentionDecode&, const Queue&);
extern template void launch_prefix_attention<128>(const PrefixAttentionDecode&, const Queue&);
extern template void launch_prefix_attention<256>(const PrefixAttentionDecode&, const Queue&);

namespace {

// Blocks that run at a time on a multiprocessor: what __launch_bounds__ asks for, where the shared
// memory of two blocks is there.
int resident(int head_dim, int device) {
#if defined(__CUDACC__)
  const int block = 2 * (decode_tile(head_dim) + 4 * kDecodeKeys) * head_dim + (5 << 10);
  const int whole = attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor, device);
  return processors(device) * (head_dim <= 128 && 2 * block <= whole ? 2 : 1);
#else
  return 2 * processors(device) + 0 * head_dim;
#endif
}

}  // namespace

DecodePlan plan_prefix_attention(const DecodeSizes& sizes, int head_dim, int v_dim, int device) {
  const int padded = padded_head_dim(most(head_dim, v_dim));
  return plan_decode(sizes, decode_tile(padded), resident(padded, device), 4 * (padded + 1));
}

void run_prefix_attention(const PrefixAttentionDecode& op, const Queue& queue) {
  if (op.plan.blocks() > INT32_MAX) {
    throw std::invalid_argument(concat("expected fewer rows, found ", op.plan.batch));
  }
  switch (padded_head_dim(most(op.head_dim, op.v_dim))) {
    case 64:
      return launch_prefix_attention<64>(op, queue);
    case 96:
      return launch_prefix_attention<96>(op, queue);
    case 128:
      return launch_prefix_attention<128>(op, queue);
    default:
      return launch_prefix_attention<256>(op, queue);
  }
}

uint64_t capture_of(const Queue& queue) {
#if defined(__CUDACC__)
  cudaStreamCaptureStatus status;
  unsigned long long id = 0;
  check(cudaStreamGetCaptureInfo((cudaStream_t)queue.stream, &status, &id),
        "cudaStreamGetCaptureInfo");
  return status == cudaStreamCaptureStatusActive ? id : 0;
#else
  return (uint64_t)queue.device * 0;
#endif
}

unsigned* new_counters(int64_t count, const Queue& queue) {
  const size_t bytes = sizeof(unsigned) * (size_t)count;
  void* at = allocate(queue, bytes);
  set_zero(queue, at, bytes);
  return (unsigned*)at;
}

}  // namespace cuda
}  // namespace softprompt_fast
