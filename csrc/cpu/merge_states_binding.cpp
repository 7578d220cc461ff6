// SPDX-License-Identifier: Apache-2.0
#include "../merge_states_arguments.h"
#include "binding.h"
#include "dispatch.h"
#include "parallel.h"

namespace softprompt_fast {
namespace {

namespace py = pybind11;

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
  const MergeStates op = as_merge_states(sizes, out_a, lse_a, out_b, lse_b, out, lse);
  check_threads(threads);
  py::gil_scoped_release release;
  run(op, kernels().merge_states, threads);
}

void merge_states_backward(const py::tuple& sizes, py::handle grad_out, py::handle grad_lse,
                           py::handle out_a, py::handle lse_a, py::handle out_b, py::handle lse_b,
                           py::handle grad_a, py::handle grad_lse_a, py::handle grad_b,
                           py::handle grad_lse_b, int threads) {
  const MergeStatesGrad op =
      as_merge_states_backward(sizes, grad_out, grad_lse, out_a, lse_a, out_b, lse_b, grad_a,
                               grad_lse_a, grad_b, grad_lse_b);
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
