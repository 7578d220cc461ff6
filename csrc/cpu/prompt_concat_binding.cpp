// SPDX-License-Identifier: Apache-2.0
#include "binding.h"
#include "prompt_concat.h"

namespace softprompt_fast {
namespace {

namespace py = pybind11;

struct Rows {
  Index prompt_offsets, prompt_index, own_start;

  explicit Rows(const py::tuple& given) {
    SOFTPROMPT_FAST_CHECK(given.size() == 3, "rows: expected 3 index tensors, found ",
                          given.size());
    prompt_offsets = as_index("prompt_offsets", given[0]);
    prompt_index = as_index("prompt_index", given[1]);
    own_start = as_index("own_start", given[2]);
    SOFTPROMPT_FAST_CHECK(!prompt_offsets || prompt_offsets.size >= 2,
                          "prompt_offsets: expected at least 2 values, found ",
                          prompt_offsets.size);
  }
};

// The first wrong id's place, row * S + column, or -1.
int64_t prompt_concat(py::handle ids, py::handle tokens, py::handle table, py::handle prompt,
                      py::handle out, const py::tuple& sizes, const py::tuple& rows, double scale,
                      double prompt_scale, bool left, int threads) {
  PromptConcat op = {};
  int64_t* const size[] = {&op.batch, &op.own, &op.packed, &op.slots, &op.width, &op.vocabulary};
  read_sizes(sizes, size);
  if (!ids.is_none()) {
    const auto given = py::reinterpret_borrow<py::tuple>(ids);
    op.ids = reinterpret_cast<const int64_t*>(given[0].cast<int64_t>());
    op.id_stride[0] = given[1].cast<int64_t>();
    op.id_stride[1] = given[2].cast<int64_t>();
  }
  op.tokens = as_tensor("tokens", tokens, 3);
  op.table = as_tensor("table", table, 2);
  op.prompt = as_tensor("prompt", prompt, 2);
  op.out = as_tensor("out", out, 3);
  op.scale = static_cast<float>(scale);
  op.prompt_scale = static_cast<float>(prompt_scale);
  const Rows given(rows);
  py::gil_scoped_release release;
  return run_prompt_concat(op, given.prompt_offsets, given.prompt_index, given.own_start, left,
                           threads);
}

void prompt_concat_backward(py::handle grad_out, py::handle grad_prompt, py::handle grad_tokens,
                            const py::tuple& sizes, const py::tuple& rows, double scale,
                            double prompt_scale, bool left, int threads) {
  PromptConcatGrad op = {};
  int64_t* const size[] = {&op.batch, &op.own, &op.packed, &op.slots, &op.width};
  read_sizes(sizes, size);
  op.grad_out = as_tensor("grad_out", grad_out, 3);
  op.grad_prompt = as_tensor("grad_prompt", grad_prompt, 2);
  op.grad_tokens = as_tensor("grad_tokens", grad_tokens, 3);
  op.scale = static_cast<float>(scale);
  op.prompt_scale = static_cast<float>(prompt_scale);
  const Rows given(rows);
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
