// SPDX-License-Identifier: Apache-2.0
#include "../prompt_concat_arguments.h"
#include "binding.h"

namespace softprompt_fast {
namespace cuda {
namespace {

namespace py = pybind11;

void prompt_concat(py::handle ids, py::handle tokens, py::handle table, py::handle prompt,
                   py::handle out, const py::tuple& sizes, const py::tuple& rows, double scale,
                   double prompt_scale, bool left, py::handle queue) {
  run_prompt_concat(as_prompt_concat(ids, tokens, table, prompt, out, sizes, scale, prompt_scale),
                    as_prompt_rows(rows), left, as_queue(queue));
}

void prompt_concat_backward(py::handle grad_out, py::handle grad_prompt, py::handle grad_tokens,
                            const py::tuple& sizes, const py::tuple& rows, double scale,
                            double prompt_scale, bool left, py::handle queue) {
  run_prompt_concat_backward(
      as_prompt_concat_backward(grad_out, grad_prompt, grad_tokens, sizes, scale, prompt_scale),
      as_prompt_rows(rows), left, as_queue(queue));
}

}  // namespace

void bind_prompt_concat(py::module_& module) {
  module.def("prompt_concat", &prompt_concat);
  module.def("prompt_concat_backward", &prompt_concat_backward);
}

}  // namespace cuda
}  // namespace softprompt_fast
