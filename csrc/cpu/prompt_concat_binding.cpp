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
    PyObject* given = as_tuple("ids", ids, 3, "a pointer and strides");
    const auto number = [&](int i) { return as_number("ids", PyTuple_GET_ITEM(given, i)); };
    op.ids = reinterpret_cast<const int64_t*>(number(0));
    op.id_stride[0] = number(1);
    op.id_stride[1] = number(2);
    SOFTPROMPT_FAST_CHECK(op.id_stride[0] >= 0 && op.id_stride[1] >= 0,
                          "ids: expected no negative stride, found ", op.id_stride[0], " and ",
                          op.id_stride[1]);
  }
  const bool own = op.batch > 0 && op.own > 0 && op.width > 0;
  op.tokens = as_tensor("tokens", tokens, 3, own && ids.is_none());
  op.table = as_tensor("table", table, 2, own && !ids.is_none() && op.vocabulary > 0);
  op.prompt = as_tensor("prompt", prompt, 2, op.packed > 0 && op.width > 0);
  op.out = as_tensor("out", out, 3, op.batch > 0 && op.slots + op.own > 0 && op.width > 0);
  SOFTPROMPT_FAST_CHECK(op.ids == nullptr || !op.tokens, "tokens: expected None beside ids");
  SOFTPROMPT_FAST_CHECK(op.ids != nullptr || ids.is_none() || !own,
                        "ids: expected memory, found a null pointer");
  check_floating("tokens", op.tokens);
  check_floating("table", op.table);
  check_floating("prompt", op.prompt);
  check_floating("out", op.out);
  check_threads(threads);
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
  const bool out = op.batch > 0 && op.slots + op.own > 0 && op.width > 0;
  op.grad_out = as_tensor("grad_out", grad_out, 3, out);
  op.grad_prompt = as_tensor("grad_prompt", grad_prompt, 2, op.packed > 0 && op.width > 0);
  op.grad_tokens = as_tensor("grad_tokens", grad_tokens, 3);
  check_floating("grad_out", op.grad_out);
  check_floating("grad_prompt", op.grad_prompt);
  check_floating("grad_tokens", op.grad_tokens);
  check_threads(threads);
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
