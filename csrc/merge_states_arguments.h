// SPDX-License-Identifier: Apache-2.0
// How the bindings read the arguments of merge_states and of its gradient.
#pragma once

#include "arguments.h"
#include "merge_states.h"

namespace softprompt_fast {

inline int64_t rows_of(const MergeStates& op) { return op.size[0] * op.size[1] * op.size[2]; }

// An `out` of 4 dimensions or an `lse` of 3: stride 0 where the caller's tensor has fewer.
inline Tensor out_tensor(const MergeStates& op, const char* name, pybind11::handle given) {
  const Tensor tensor = as_tensor(name, given, 4, rows_of(op) > 0 && op.v_dim > 0);
  check_dtype(name, tensor, op.out_a.dtype);
  return tensor;
}

inline Tensor lse_tensor(const MergeStates& op, const char* name, pybind11::handle given,
                         bool used = true) {
  const Tensor tensor = as_tensor(name, given, 3, used && rows_of(op) > 0);
  check_dtype(name, tensor, DType::kFloat32);
  return tensor;
}

inline void read_states(MergeStates& op, const pybind11::tuple& sizes, pybind11::handle out_a,
                        pybind11::handle lse_a, pybind11::handle out_b, pybind11::handle lse_b) {
  int64_t* const size[] = {&op.size[0], &op.size[1], &op.size[2], &op.v_dim};
  read_sizes(sizes, size);
  op.out_a = as_tensor("out_a", out_a, 4, rows_of(op) > 0 && op.v_dim > 0);
  check_floating("out_a", op.out_a);
  op.out_b = out_tensor(op, "out_b", out_b);
  op.lse_a = lse_tensor(op, "lse_a", lse_a);
  op.lse_b = lse_tensor(op, "lse_b", lse_b);
}

inline MergeStates as_merge_states(const pybind11::tuple& sizes, pybind11::handle out_a,
                                   pybind11::handle lse_a, pybind11::handle out_b,
                                   pybind11::handle lse_b, pybind11::handle out,
                                   pybind11::handle lse) {
  MergeStates op = {};
  read_states(op, sizes, out_a, lse_a, out_b, lse_b);
  op.out = out_tensor(op, "out", out);
  op.lse = lse_tensor(op, "lse", lse);
  return op;
}

inline MergeStatesGrad as_merge_states_backward(
    const pybind11::tuple& sizes, pybind11::handle grad_out, pybind11::handle grad_lse,
    pybind11::handle out_a, pybind11::handle lse_a, pybind11::handle out_b, pybind11::handle lse_b,
    pybind11::handle grad_a, pybind11::handle grad_lse_a, pybind11::handle grad_b,
    pybind11::handle grad_lse_b) {
  MergeStatesGrad op = {};
  read_states(op, sizes, out_a, lse_a, out_b, lse_b);
  op.grad_out = out_tensor(op, "grad_out", grad_out);
  op.grad_lse = lse_tensor(op, "grad_lse", grad_lse, !grad_lse.is_none());
  op.grad_a = out_tensor(op, "grad_a", grad_a);
  op.grad_b = out_tensor(op, "grad_b", grad_b);
  op.grad_lse_a = lse_tensor(op, "grad_lse_a", grad_lse_a);
  op.grad_lse_b = lse_tensor(op, "grad_lse_b", grad_lse_b);
  return op;
}

}  // namespace softprompt_fast
