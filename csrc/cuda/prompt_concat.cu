// SPDX-License-Identifier: Apache-2.0
#include "kernels.h"
#include "launch.h"
#include "prompt_concat.cuh"

namespace softprompt_fast {
namespace cuda {
namespace {

// Whether rows of the tensor are dense and begin at multiples of 16 bytes, as 8 elements do.
bool in_vectors(const Tensor& x, int dimensions) {
  if (!x) return true;
  bool fits = (uintptr_t)x.data % 16 == 0 && x.stride[dimensions - 1] == 1;
  for (int i = 0; i < dimensions - 1; ++i) fits = fits && x.stride[i] % 8 == 0;
  return fits;
}

unsigned blocks(int64_t count) {
  if (count > INT32_MAX) throw std::invalid_argument(concat("expected fewer rows, found ", count));
  return (unsigned)count;
}

}  // namespace

void run_prompt_concat(const PromptConcat& op, const Queue& queue) {
  if (op.width == 0) return;
  const int64_t lines = op.batch * (op.slots + op.own);
  const Grid grid{dim3(blocks((lines + kConcatWarps - 1) / kConcatWarps)), 32 * kConcatWarps};
  if (op.width % 8 == 0 && in_vectors(op.tokens, 3) && in_vectors(op.table, 2) &&
      in_vectors(op.prompt, 2) && in_vectors(op.out, 3)) {
    launch<prompt_concat<8>>(queue, grid, op);
  } else {
    launch<prompt_concat<1>>(queue, grid, op);
  }
}

void run_prompt_concat_backward(const PromptConcatGrad& op, const Queue& queue) {
  if (op.width == 0) return;
  const bool vectors = op.width % 8 == 0 && in_vectors(op.grad_out, 3) &&
                       in_vectors(op.grad_prompt, 2) && in_vectors(op.grad_tokens, 3);
  const unsigned size = vectors ? 8 : 1, columns = 32 * size;
  static_assert(kSumWarps * 32 * 8 * sizeof(float) <= kSharedEverywhere, "fits every GPU");
  const Grid sums{dim3(blocks(op.packed * ((op.width + columns - 1) / columns))), 32 * kSumWarps,
                  kSumWarps * columns * (unsigned)sizeof(float)};
  if (vectors) {
    launch<prompt_concat_grad_prompt<8>>(queue, sums, op);
  } else {
    launch<prompt_concat_grad_prompt<1>>(queue, sums, op);
  }
  if (!op.grad_tokens) return;
  const int64_t lines = op.batch * op.own;
  const Grid grid{dim3(blocks((lines + kConcatWarps - 1) / kConcatWarps)), 32 * kConcatWarps};
  if (vectors) {
    launch<prompt_concat_grad_tokens<8>>(queue, grid, op);
  } else {
    launch<prompt_concat_grad_tokens<1>>(queue, grid, op);
  }
}

}  // namespace cuda
}  // namespace softprompt_fast
