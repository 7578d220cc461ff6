// SPDX-License-Identifier: Apache-2.0
// How the bindings read the arguments of prompt_concat and of its gradient.
#pragma once

#include "arguments.h"
#include "prompt_concat.h"

namespace softprompt_fast {

inline PromptRows as_prompt_rows(const pybind11::tuple& given) {
  SOFTPROMPT_FAST_CHECK(given.size() == 3, "rows: expected 3 index tensors, found ", given.size());
  const PromptRows rows = {as_index("prompt_offsets", given[0]), as_index("prompt_index", given[1]),
                           as_index("own_start", given[2])};
  SOFTPROMPT_FAST_CHECK(!rows.prompt_offsets || rows.prompt_offsets.size >= 2,
                        "prompt_offsets: expected at least 2 values, found ",
                        rows.prompt_offsets.size);
  return rows;
}

// out_used: whether `out` must be there.
inline PromptConcat as_prompt_concat(pybind11::handle ids, pybind11::handle tokens,
                                     pybind11::handle table, pybind11::handle prompt,
                                     pybind11::handle out, const pybind11::tuple& sizes,
                                     double scale, double prompt_scale, bool out_used = true) {
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
  op.out =
      as_tensor("out", out, 3, out_used && op.batch > 0 && op.slots + op.own > 0 && op.width > 0);
  SOFTPROMPT_FAST_CHECK(op.ids == nullptr || !op.tokens, "tokens: expected None beside ids");
  SOFTPROMPT_FAST_CHECK(op.ids != nullptr || ids.is_none() || !own,
                        "ids: expected memory, found a null pointer");
  check_floating("tokens", op.tokens);
  check_floating("table", op.table);
  check_floating("prompt", op.prompt);
  check_floating("out", op.out);
  op.scale = static_cast<float>(scale);
  op.prompt_scale = static_cast<float>(prompt_scale);
  return op;
}

inline PromptConcatGrad as_prompt_concat_backward(pybind11::handle grad_out,
                                                  pybind11::handle grad_prompt,
                                                  pybind11::handle grad_tokens,
                                                  const pybind11::tuple& sizes, double scale,
                                                  double prompt_scale) {
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
  op.scale = static_cast<float>(scale);
  op.prompt_scale = static_cast<float>(prompt_scale);
  return op;
}

}  // namespace softprompt_fast
