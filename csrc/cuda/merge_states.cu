// SPDX-License-Identifier: Apache-2.0
#include "kernels.h"
#include "launch.h"
#include "merge_states.cuh"

namespace softprompt_fast {
namespace cuda {
namespace {

template <typename Op>
int64_t rows_of(const Op& op) {
  return op.size[0] * op.size[1] * op.size[2];
}

// Calls body(MergeParams, Grid), for which `size` elements are one access.
template <int size, typename Op, typename Body>
void with_grid(const Op& op, Body body) {
  const int64_t rows = rows_of(op);
  if (rows > INT32_MAX / 32)
    throw std::invalid_argument(concat("expected fewer rows, found ", rows));
  int lanes = 1;
  while (lanes < 32 && lanes * size < op.v_dim) lanes *= 2;
  const unsigned a_block = kMergeThreads / lanes;
  body(MergeParams<Op>{op, (int)rows, lanes},
       Grid{dim3((unsigned)((rows + a_block - 1) / a_block)), kMergeThreads});
}

// Whether all rows of the tensors are dense and begin at multiples of 16 bytes.
template <typename T, typename... Tensors>
bool in_vectors(int64_t v_dim, const Tensors&... tensors) {
  constexpr int64_t kSize = 16 / sizeof(T);
  const auto fits = [&](const Tensor& x) {
    return (uintptr_t)x.data % 16 == 0 && x.stride[3] == 1 && x.stride[0] % kSize == 0 &&
           x.stride[1] % kSize == 0 && x.stride[2] % kSize == 0;
  };
  return v_dim % kSize == 0 && (fits(tensors) && ...);
}

}  // namespace

void run_merge_states(const MergeStates& op, const Queue& queue) {
  if (rows_of(op) == 0) return;
  with_type(op.out.dtype, [&](auto type) {
    using T = decltype(type);
    const auto run = [&](auto size) {
      with_grid<size()>(op, [&](const auto& params, const Grid& grid) {
        launch<merge_states<T, size()>>(queue, grid, params);
      });
    };
    if (in_vectors<T>(op.v_dim, op.out_a, op.out_b, op.out)) {
      run(std::integral_constant<int, 16 / sizeof(T)>());
    } else {
      run(std::integral_constant<int, 1>());
    }
  });
}

void run_merge_states_backward(const MergeStatesGrad& op, const Queue& queue) {
  if (rows_of(op) == 0) return;
  with_type(op.out_a.dtype, [&](auto type) {
    using T = decltype(type);
    const auto run = [&](auto size) {
      with_grid<size()>(op, [&](const auto& params, const Grid& grid) {
        launch<merge_states_backward<T, size()>>(queue, grid, params);
      });
    };
    if (in_vectors<T>(op.v_dim, op.grad_out, op.out_a, op.out_b, op.grad_a, op.grad_b)) {
      run(std::integral_constant<int, 16 / sizeof(T)>());
    } else {
      run(std::integral_constant<int, 1>());
    }
  });
}

}  // namespace cuda
}  // namespace softprompt_fast
