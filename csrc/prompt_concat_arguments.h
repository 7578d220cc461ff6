// SPDX-License-Identifier: Apache-2.0
// What the C++ ops of prompt_concat and of its gradient are called with, and prompt_qkv's, whose
// rows come from the same: the contract of softprompt_fast/ops/prompt_concat.py, checked.
#pragma once

#include <string>

#include "checks.h"
#include "prompt_concat.h"
#include "torch_abi.h"

namespace softprompt_fast {

struct PromptConcatCall {
  static constexpr const char* kKinds = "T?T?T?T?T?T?i?d?db";
  static constexpr int kCount = 10;

  abi::View tokens, table, prompt;
  PromptBatch rows;

  // `first`: place of the tokens among the arguments. Throws std::invalid_argument.
  explicit PromptConcatCall(const abi::Arguments& given, int first = 0);

  int64_t length() const { return rows.slots + rows.own; }  // of a row of the result

  PromptConcat forward() const;  // `prompt` and `out` are the caller's to set

 private:
  // Values that lie in host memory. Returns the length of the longest prompt.
  int64_t check_values() const;
};

// A floating tensor of a shape, on the device of another.
inline Tensor read_floating(const char* name, const abi::View& view,
                            std::initializer_list<int64_t> shape, const abi::View& other) {
  SOFTPROMPT_FAST_CHECK(view.has_shape(shape) && view.beside(other), name,
                        ": does not fit the others, found ", view.describe());
  const Tensor tensor = abi::as_tensor(name, view);
  SOFTPROMPT_FAST_CHECK(tensor.dtype < DType::kInt8, name, ": no kernel reads ", view.describe());
  return tensor;
}

inline Tensor read_dense(const char* name, const abi::View& view,
                         std::initializer_list<int64_t> shape, const abi::View& other) {
  SOFTPROMPT_FAST_CHECK(view.is_dense(), name, ": expected a dense tensor, found ", view.describe(),
                        " with strides apart");
  return read_floating(name, view, shape, other);
}

inline PromptConcatCall::PromptConcatCall(const abi::Arguments& given, int first) {
  tokens = given.tensor(first);
  table = given.tensor(first + 1);
  prompt = given.tensor(first + 2);
  SOFTPROMPT_FAST_CHECK(tokens.dimensions == (abi::is_int64(tokens) ? 2 : 3),
                        "tokens: expected int64 [B, S] or floating [B, S, H], found ",
                        tokens.describe());
  SOFTPROMPT_FAST_CHECK(
      prompt ? prompt.dimensions == 2 && prompt.beside(tokens) : tokens.dimensions == 3,
      "prompt: expected [L, H] beside tokens ", tokens.describe(), ", found ", prompt.describe());
  rows = {};
  rows.batch = tokens.size[0];
  rows.own = tokens.size[1];
  rows.packed = prompt ? prompt.size[0] : 0;
  rows.width = prompt ? prompt.size[1] : tokens.size[2];
  const abi::View offsets = given.tensor(first + 3);
  const int64_t values = offsets && offsets.dimensions == 1 ? offsets.size[0] : 0;
  SOFTPROMPT_FAST_CHECK(!offsets || values >= 2, "prompt_offsets: expected [N + 1], found ",
                        offsets.describe());
  rows.prompt_offsets = abi::as_index("prompt_offsets", offsets, values, tokens);
  rows.prompt_index = abi::as_index("prompt_index", given.tensor(first + 4), rows.batch, tokens);
  rows.own_start = abi::as_index("own_start", given.tensor(first + 5), rows.batch, tokens);
  // On a device, values are not read: the length has to be said there.
  const bool known = !offsets || tokens.is_cpu();
  SOFTPROMPT_FAST_CHECK(known || given.has(first + 6),
                        "prompt_length: expected a number beside prompt_offsets on a device");
  const int64_t longest = tokens.is_cpu() ? check_values() : offsets ? 0 : rows.packed;
  rows.slots = given.has(first + 6) ? given.integer(first + 6) : longest;
  constexpr int64_t kMost = int64_t{1} << 40;  // products with strides stay exact
  SOFTPROMPT_FAST_CHECK(rows.slots >= longest && rows.slots <= kMost,
                        "prompt_length: expected at least ", longest, ", found ", rows.slots);
  SOFTPROMPT_FAST_CHECK(rows.own <= kMost && rows.width <= kMost / (length() + 1),
                        "expected rows of at most 2^40 numbers, found ", length(), " times ",
                        rows.width);
  const auto factor = [&](int i) {
    return given.has(first + i) ? static_cast<float>(given.number(first + i)) : 1.0f;
  };
  rows.scale = factor(7);
  rows.prompt_scale = factor(8);
  rows.left = given.flag(first + 9);
}

inline int64_t PromptConcatCall::check_values() const {
  const Index& offsets = rows.prompt_offsets;
  int64_t longest = offsets ? 0 : rows.packed, before = 0;
  for (int64_t n = 0; n < offsets.size; ++n) {
    SOFTPROMPT_FAST_CHECK(offsets[n] >= before && offsets[n] <= rows.packed,
                          "prompt_offsets: expected rising values within 0..", rows.packed,
                          ", found ", offsets[n], " in place ", n, " behind ", before);
    if (n > 0 && offsets[n] - before > longest) longest = offsets[n] - before;
    before = offsets[n];
  }
  const auto within = [](const char* name, const Index& values, int64_t low, int64_t high) {
    for (int64_t b = 0; b < values.size; ++b) {
      SOFTPROMPT_FAST_CHECK(values[b] >= low && values[b] <= high, name,
                            ": expected values within ", low, "..", high, ", found ", values[b],
                            " in row ", b);
    }
  };
  within("prompt_index", rows.prompt_index, -1, offsets ? offsets.size - 2 : 0);
  within("own_start", rows.own_start, 0, rows.own);
  return longest;
}

inline PromptConcat PromptConcatCall::forward() const {
  PromptConcat op = {};
  static_cast<PromptBatch&>(op) = rows;
  const bool ids = abi::is_int64(tokens);
  SOFTPROMPT_FAST_CHECK(ids == (bool)table, "table: expected ", ids ? "one" : "None", " beside ",
                        tokens.describe());
  if (ids) {
    op.ids = static_cast<const int64_t*>(tokens.data);
    op.id_stride[0] = tokens.stride[0];
    op.id_stride[1] = tokens.stride[1];
    op.vocabulary = table.dimensions > 0 ? table.size[0] : 0;
    op.table = read_floating("table", table, {op.vocabulary, op.width}, tokens);
  } else {
    op.tokens = read_floating("tokens", tokens, {op.batch, op.own, op.width}, tokens);
  }
  return op;
}

inline PromptConcat read_prompt_concat(const PromptConcatCall& call, const abi::View& out) {
  PromptConcat op = call.forward();
  op.prompt = read_floating("prompt", call.prompt, {op.packed, op.width}, call.tokens);
  op.out = read_dense("out", out, {op.batch, call.length(), op.width}, call.tokens);
  return op;
}

// The op, by what computes a call on a device. Arguments: the call's and out_dtype.
template <void (*run)(const PromptConcatCall& call, const abi::View& out)>
void prompt_concat(abi::Value* stack, uint64_t inputs) {
  static const std::string kinds = std::string(PromptConcatCall::kKinds) + "?i";
  constexpr int kDType = PromptConcatCall::kCount;
  const abi::Arguments given(kinds.c_str(), stack, inputs);
  const PromptConcatCall call(given);
  const abi::View& embeddings = call.table ? call.table : call.tokens;
  const int64_t width = call.rows.width;
  abi::NewTensor out(
      call.tokens,
      given.has(kDType) ? static_cast<int32_t>(given.integer(kDType)) : embeddings.dtype,
      {call.rows.batch, call.length(), width}, {call.length() * width, width, 1});
  run(call, out.view());
  stack[0] = out.release();
}

// Its form with memory for the result.
template <void (*run)(const PromptConcatCall& call, const abi::View& out)>
void prompt_concat_out(abi::Value* stack, uint64_t inputs) {
  static const std::string kinds = std::string(PromptConcatCall::kKinds) + "R";
  const abi::Arguments given(kinds.c_str(), stack, inputs);
  run(PromptConcatCall(given), given.tensor(PromptConcatCall::kCount));
  stack[0] = 1;
}

// Arguments: grad_out, the call's without a table, and the two results, of which the tokens' is
// not given where they are ids.
inline const std::string kPromptConcatBackwardKinds =
    std::string("T") + PromptConcatCall::kKinds + "R?R";

inline PromptConcatGrad read_prompt_concat_backward(const abi::Arguments& given) {
  constexpr int kGrads = 1 + PromptConcatCall::kCount;
  const PromptConcatCall call(given, 1);
  PromptConcatGrad op = {};
  static_cast<PromptBatch&>(op) = call.rows;
  op.grad_out =
      read_floating("grad_out", given.tensor(0), {op.batch, call.length(), op.width}, call.tokens);
  op.grad_prompt =
      read_dense("grad_prompt", given.tensor(kGrads), {op.packed, op.width}, call.tokens);
  if (given.has(kGrads + 1)) {
    op.grad_tokens = read_dense("grad_tokens", given.tensor(kGrads + 1),
                                {op.batch, op.own, op.width}, call.tokens);
  }
  return op;
}

}  // namespace softprompt_fast
