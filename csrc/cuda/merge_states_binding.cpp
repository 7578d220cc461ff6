// SPDX-License-Identifier: Apache-2.0
#include "../merge_states_arguments.h"
#include "binding.h"

namespace softprompt_fast {
namespace cuda {
namespace {

namespace py = pybind11;

void merge_states(const py::tuple& sizes, py::handle out_a, py::handle lse_a, py::handle out_b,
                  py::handle lse_b, py::handle out, py::handle lse, py::handle queue) {
  run_merge_states(as_merge_states(sizes, out_a, lse_a, out_b, lse_b, out, lse), as_queue(queue));
}

void merge_states_backward(const py::tuple& sizes, py::handle grad_out, py::handle grad_lse,
                           py::handle out_a, py::handle lse_a, py::handle out_b, py::handle lse_b,
                           py::handle grad_a, py::handle grad_lse_a, py::handle grad_b,
                           py::handle grad_lse_b, py::handle queue) {
  run_merge_states_backward(as_merge_states_backward(sizes, grad_out, grad_lse, out_a, lse_a, out_b,
                                                     lse_b, grad_a, grad_lse_a, grad_b, grad_lse_b),
                            as_queue(queue));
}

}  // namespace

void bind_merge_states(py::module_& module) {
  module.def("merge_states", &merge_states);
  module.def("merge_states_backward", &merge_states_backward);
}

}  // namespace cuda
}  // namespace softprompt_fast
