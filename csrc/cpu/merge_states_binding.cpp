// SPDX-License-Identifier: Apache-2.0
#include "binding.h"
#include "dispatch.h"
#include "merge_states.h"
#include "parallel.h"

namespace softprompt_fast {
namespace {

namespace py = pybind11;

int64_t rows_of(const MergeStates& op) { return op.size[0] * op.size[1] * op.size[2]; }

// An `out` of 4 dimensions or an `lse` of 3: stride 0 where the caller's tensor has fewer.
Tensor out_tensor(const MergeStates& op, const char* name, py::handle given) {
  const Tensor tensor = as_tensor(name, given, 4, rows_of(op) > 0 && op.v_dim > 0);
  check_dtype(name, tensor, op.out_a.dtype);
  return tensor;
}

Tensor lse_tensor(const MergeStates& op, const char* name, py::handle given, bool used = true) {
  const Tensor tensor = as_tensor(name, given, 3, used && rows_of(op) > 0);
  check_dtype(name, tensor, DType::kFloat32);
  return tensor;
}

void read_states(MergeStates& op, const py::tuple& sizes, py::handle out_a, py::handle lse_a,
                 py::handle out_b, py::handle lse_b) {
  int64_t* const size[] = {&op.size[0], &op.size[1], &op.size[2], &op.v_dim};
  read_sizes(sizes, size);
  op.out_a = as_tensor("out_a", out_a, 4, rows_of(op) > 0 && op.v_dim > 0);
  check_floating("out_a", op.out_a);
  op.out_b = out_tensor(op, "out_b", out_b);
  op.lse_a = lse_tensor(op, "lse_a", lse_a);
  op.lse_b = lse_tensor(op, "lse_b", lse_b);
}

template <typename Op>
void run(const Op& op, void (*kernel)(const Op&, int64_t, int64_t), int threads) {
  constexpr int64_t kRows = 256;  // of one task
  const int64_t rows = rows_of(op);
  parallel_for((rows + kRows - 1) / kRows, rows * op.v_dim < 1 << 15 ? 1 : threads,
               [&](int64_t task, int) {
                 const int64_t last = (task + 1) * kRows;
                 kernel(op, task * kRows, last < rows ? last : rows);
               });
}

void merge_states(const py::tuple& sizes, py::handle out_a, py::handle lse_a, py::handle out_b,
                  py::handle lse_b, py::handle out, py::handle lse, int threads) {
  MergeStates op = {};
  read_states(op, sizes, out_a, lse_a, out_b, lse_b);
  op.out = out_tensor(op, "out", out);
  op.lse = lse_tensor(op, "lse", lse);
  check_threads(threads);
  py::gil_scoped_release release;
  run(op, kernels().merge_states, threads);
}

void merge_states_backward(const py::tuple& sizes, py::handle grad_out, py::handle grad_lse,
                           py::handle out_a, py::handle lse_a, py::handle out_b, py::handle lse_b,
                           py::handle grad_a, py::handle grad_lse_a, py::handle grad_b,
                           py::handle grad_lse_b, int threads) {
  MergeStatesGrad op = {};
  read_states(op, sizes, out_a, lse_a, out_b, lse_b);
  op.grad_out = out_tensor(op, "grad_out", grad_out);
  op.grad_lse = lse_tensor(op, "grad_lse", grad_lse, !grad_lse.is_none());
  op.grad_a = out_tensor(op, "grad_a", grad_a);
  op.grad_b = out_tensor(op, "grad_b", grad_b);
  op.grad_lse_a = lse_tensor(op, "grad_lse_a", grad_lse_a);
  op.grad_lse_b = lse_tensor(op, "grad_lse_b", grad_lse_b);
  check_threads(threads);
  py::gil_scoped_release release;
  run(op, kernels().merge_states_backward, threads);
}

}  // namespace

void bind_merge_states(py::module_& module) {
  module.def("merge_states", &merge_states);
  module.def("merge_states_backward", &merge_states_backward);
}

}  // namespace softprompt_fast
