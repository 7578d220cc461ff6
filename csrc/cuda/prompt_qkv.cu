// SPDX-License-Identifier: Apache-2.0
#include "kernels.h"
#include "launch.h"
#include "prompt_qkv.cuh"

namespace softprompt_fast {
namespace cuda {
namespace {

// Few rows leave registers for nothing but the weights, and many small blocks read them best; with
// more rows a block takes more columns, for each block reads all rows again.
template <typename T, int row_tiles, int groups>
void run(const PromptQkv& op, const Queue& queue) {
  using Shared = QkvShared<row_tiles, groups>;
  static_assert(sizeof(Shared) <= kSharedEverywhere, "fits every GPU");
  const int64_t lines = op.concat.batch * (op.concat.slots + op.concat.own);
  const int64_t pairs = ((op.q_heads + op.kv_heads) * op.head_dim + op.kv_heads * op.value_dim) / 2;
  const auto blocks = [](int64_t count, int64_t a_block) {
    return (unsigned)((count + a_block - 1) / a_block);
  };
  const Grid grid{dim3(blocks(pairs, 8 * groups), blocks(lines, Shared::kRows)), kQkvThreads,
                  (unsigned)sizeof(Shared)};
  launch<prompt_qkv<T, row_tiles, groups>>(queue, grid, op);
}

}  // namespace

void run_prompt_qkv(const PromptQkv& op, const Queue& queue) {
  const int64_t lines = op.concat.batch * (op.concat.slots + op.concat.own);
  if (lines > 1 << 16) {
    throw std::invalid_argument(concat("expected at most 65536 rows, found ", lines));
  }
  if (lines == 0) return;
  with_16_bits(op.out[0].dtype, [&](auto type) {
    using T = decltype(type);
    if (lines <= 16) {
      run<T, 1, 1>(op, queue);
    } else if (lines <= 32) {
      run<T, 2, 2>(op, queue);
    } else {
      run<T, 4, 2>(op, queue);
    }
  });
}

void run_head_norm(const HeadNorm& op, const Queue& queue) {
  if (op.head_dim > 256) {
    throw std::invalid_argument(concat("expected heads of at most 256, found ", op.head_dim));
  }
  const int64_t items = op.batch * op.length * (op.of[0].count + op.of[1].count);
  if (items > INT32_MAX - kQkvWarps) {
    throw std::invalid_argument(concat("expected fewer heads, found ", items));
  }
  const Grid grid{dim3((unsigned)((items + kQkvWarps - 1) / kQkvWarps)), kQkvThreads};
  with_16_bits(op.of[0].values.dtype, [&](auto type) {
    using T = decltype(type);
    if (op.head_dim <= 64) {
      launch<head_norm<T, 1>>(queue, grid, op);
    } else if (op.head_dim <= 128) {
      launch<head_norm<T, 2>>(queue, grid, op);
    } else {
      launch<head_norm<T, 4>>(queue, grid, op);
    }
  });
}

}  // namespace cuda
}  // namespace softprompt_fast
