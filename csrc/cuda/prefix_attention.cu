// SPDX-License-Identifier: Apache-2.0
#include <stdlib.h>
#include <string.h>

#include "kernels.h"
#include "launch.h"
#include "prefix_attention_decode.cuh"

namespace softprompt_fast {
namespace cuda {

template <int kHeadDim>
void launch_prefix_attention(const PrefixAttentionDecode& op, const Queue& queue);
template <int kHeadDim>
void launch_on_warpgroups(const PrefixAttentionDecode& op, const Queue& queue);
bool has_warpgroups(int device);
extern template void launch_prefix_attention<64>(const PrefixAttentionDecode&, const Queue&);
extern template void launch_prefix_attention<96>(const PrefixAttentionDecode&, const Queue&);
extern template void launch_prefix_attention<128>(const PrefixAttentionDecode&, const Queue&);
extern template void launch_prefix_attention<256>(const PrefixAttentionDecode&, const Queue&);

namespace {

static_assert(sizeof(DecodeShared<128>) <= kSharedEverywhere, "heads up to 128 fit every GPU");

// Calls body(std::integral_constant<int, the head dimension of the kernel>()).
template <typename Body>
auto with_head_dim(int64_t head_dim, Body body) {
  switch (padded_head_dim(head_dim)) {
    case 64:
      return body(std::integral_constant<int, 64>());
    case 96:
      return body(std::integral_constant<int, 96>());
    case 128:
      return body(std::integral_constant<int, 128>());
    default:
      return body(std::integral_constant<int, kMostHeadDim>());
  }
}

// Blocks that run at a time on a multiprocessor: what __launch_bounds__ asks for, where the shared
// memory of two blocks is there, and the 1 KB that the device adds to each.
int resident(int head_dim, int device) {
  const int64_t block = shared_of_prefix_attention(head_dim, head_dim) + (1 << 10);
  const bool two = head_dim <= 128 && 2 * block <= shared_of_processor(device);
  return processors(device) * (two ? 2 : 1);
}

// A number that measurements set by an environment variable: a multiple of `step` from `fewest` to
// `most`, and `standard` where it is not set. Read once, for plans are kept by whoever asked for
// their workspace.
int setting(const char* name, int standard, int step, int fewest, int most) {
  const char* given = getenv(name);
  const int found = given == nullptr ? standard : atoi(given);
  if (given != nullptr && (found < fewest || found % step != 0 || found > most)) {
    throw std::invalid_argument(
        concat(name, ": expected a multiple of ", step, " up to ", most, ", found ", given));
  }
  return found;
}

// Stacked queries of a large tile.
int wanted_tile() {
  constexpr int kMost = decode_tile(kSmallTile);
  static const int tile =
      setting("SOFTPROMPT_FAST_CUDA_TILE", kMost, kSmallTile, kSmallTile, kMost);
  return tile;
}

// Blocks for prefixes beside own items that fill the device; 0: the plan's choice.
int wanted_blocks() {
  static const int blocks = setting("SOFTPROMPT_FAST_CUDA_PREFIX_BLOCKS", 0, 1, 1, 1 << 20);
  return blocks;
}

// Key blocks up to which a row's own keys and its prefix are one item's; 0: they never are.
int wanted_together() {
  static const int blocks = setting("SOFTPROMPT_FAST_CUDA_TOGETHER", kTogether, 1, 0, 1 << 20);
  return blocks;
}

// Key blocks of a prefix item from which on others merge its results.
int wanted_late() {
  static const int blocks = setting("SOFTPROMPT_FAST_CUDA_LATE", kLongShare, 1, 1, 1 << 20);
  return blocks;
}

}  // namespace

std::atomic<bool>& use_wgmma() {
  const char* given = getenv("SOFTPROMPT_FAST_CUDA_WGMMA");
  static std::atomic<bool> use(given == nullptr || strcmp(given, "0") != 0);
  return use;
}

int64_t shared_of_device(int device) { return shared_of_block(device); }

int64_t shared_of_prefix_attention(int head_dim, int v_dim) {
  return with_head_dim(most(head_dim, v_dim),
                       [](auto dim) { return (int64_t)sizeof(DecodeShared<dim()>); });
}

DecodePlan plan_prefix_attention(const DecodeSizes& sizes, int head_dim, int v_dim, int device) {
  const int padded = padded_head_dim(most(head_dim, v_dim));
  const int tile = (int)least(decode_tile(padded), wanted_tile());
  return plan_decode(sizes, tile, resident(padded, device), 4 * (padded + 1), wanted_blocks(),
                     wanted_together(), wanted_late());
}

void run_prefix_attention(const PrefixAttentionDecode& op, const Queue& queue) {
  if (op.plan.blocks() > INT32_MAX) {
    throw std::invalid_argument(concat("expected fewer rows, found ", op.plan.batch));
  }
  const bool on_warpgroups =
      op.prefix_key.dtype == op.query.dtype && use_wgmma() && has_warpgroups(queue.device);
  with_head_dim(most(op.head_dim, op.v_dim), [&](auto dim) {
    if constexpr (dim() == 64 || dim() == 128) {
      if (on_warpgroups) return launch_on_warpgroups<dim()>(op, queue);
    }
    launch_prefix_attention<dim()>(op, queue);
  });
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
