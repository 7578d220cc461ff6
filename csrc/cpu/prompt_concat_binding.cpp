// SPDX-License-Identifier: Apache-2.0
#include "../prompt_concat_arguments.h"
#include "binding.h"
#include "prompt_concat.h"

namespace softprompt_fast {
namespace {

namespace py = pybind11;

// The first wrong id's place, row * S + column, or -1.
int64_t prompt_concat(py::handle ids, py::handle tokens, py::handle table, py::handle prompt,
                      py::handle out, const py::tuple& sizes, const py::tuple& rows, double scale,
                      double prompt_scale, bool left, int threads) {
  PromptConcat op = as_prompt_concat(ids, tokens, table, prompt, out, sizes, scale, prompt_scale);
  check_threads(threads);
  const PromptRows given = as_prompt_rows(rows);
  py::gil_scoped_release release;
  return run_prompt_concat(op, given.prompt_offsets, given.prompt_index, given.own_start, left,
                           threads);
}

void prompt_concat_backward(py::handle grad_out, py::handle grad_prompt, py::handle grad_tokens,
                            const py::tuple& sizes, const py::tuple& rows, double scale,
                            double prompt_scale, bool left, int threads) {
  PromptConcatGrad op =
      as_prompt_concat_backward(grad_out, grad_prompt, grad_tokens, sizes, scale, prompt_scale);
  check_threads(threads);
  const PromptRows given = as_prompt_rows(rows);
  py::gil_scoped_release release;
  run_prompt_concat_backward(op, given.prompt_offsets, given.prompt_index, given.own_start, left,
                             threads);
}

}  // namespace

void bind_prompt_concat(py::module_& module) {
  module.def("prompt_concat", &prompt_concat);
  module.def("prompt_concat_backward", &prompt_concat_backward);
}

}  // namespace softprompt_fast
