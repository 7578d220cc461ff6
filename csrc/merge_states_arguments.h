// SPDX-License-Identifier: Apache-2.0
// How the C++ ops of merge_states and of its gradient read their arguments.
#pragma once

#include "checks.h"
#include "merge_states.h"
#include "torch_abi.h"

namespace softprompt_fast {

inline int64_t rows_of(const MergeStates& op) { return op.size[0] * op.size[1] * op.size[2]; }

// Reads tensors of the shape of `out`, [..., Dv], or without its last dimension.
class MergeStatesReader {
 public:
  MergeStatesReader(MergeStates& op, const abi::View& out) : out_(out) {
    SOFTPROMPT_FAST_CHECK(out.dimensions >= 1 && out.dimensions <= 4,
                          "out_a: expected 1 to 4 dimensions, found ", out.describe());
    const int64_t lead = 4 - out.dimensions;
    for (int64_t i = 0; i < 3; ++i) op.size[i] = i < lead ? 1 : out.size[i - lead];
    op.v_dim = out.size[out.dimensions - 1];
    SOFTPROMPT_FAST_CHECK(abi::dtype_of("out_a", out) < DType::kInt8, "out_a: no kernel reads ",
                          out.describe());
  }

  Tensor out(const char* name, const abi::View& x) const {
    check(name, x, out_.dimensions, out_.dtype);
    return abi::as_tensor(name, x, 4);
  }

  Tensor lse(const char* name, const abi::View& x) const {
    check(name, x, out_.dimensions - 1, abi::torch_dtype(DType::kFloat32));
    return abi::as_tensor(name, x, 3);
  }

 private:
  void check(const char* name, const abi::View& x, int64_t dimensions, int32_t dtype) const {
    bool fits = x.dimensions == dimensions && x.dtype == dtype && x.beside(out_);
    for (int64_t i = 0; fits && i < dimensions; ++i) fits = x.size[i] == out_.size[i];
    SOFTPROMPT_FAST_CHECK(fits, name, ": does not fit out_a ", out_.describe(), ", found ",
                          x.describe());
  }

  abi::View out_;
};

// Arguments: out_a, lse_a, out_b, lse_b.
inline MergeStates read_merge_states(const abi::Arguments& given, const abi::View& out,
                                     const abi::View& lse) {
  MergeStates op = {};
  const MergeStatesReader read(op, given.tensor(0));
  op.out_a = read.out("out_a", given.tensor(0));
  op.lse_a = read.lse("lse_a", given.tensor(1));
  op.out_b = read.out("out_b", given.tensor(2));
  op.lse_b = read.lse("lse_b", given.tensor(3));
  op.out = read.out("out", out);
  op.lse = read.lse("lse", lse);
  return op;
}

// The op, by what computes a call on the device of its tensors, one of which is given.
template <void (*run)(const MergeStates& op, const abi::View& any)>
void merge_states(abi::Value* stack, uint64_t inputs) {
  const abi::Arguments given("TTTT", stack, inputs);
  abi::NewTensor out(given.tensor(0)), lse(given.tensor(1));
  run(read_merge_states(given, out.view(), lse.view()), given.tensor(0));
  stack[0] = out.release();
  stack[1] = lse.release();
}

// Its form with memory for the results.
template <void (*run)(const MergeStates& op, const abi::View& any)>
void merge_states_out(abi::Value* stack, uint64_t inputs) {
  const abi::Arguments given("TTTTRR", stack, inputs);
  run(read_merge_states(given, given.tensor(4), given.tensor(5)), given.tensor(0));
  stack[0] = 1;
}

// Arguments: grad_out, grad_lse, out_a, lse_a, out_b, lse_b, and the four results.
inline MergeStatesGrad read_merge_states_backward(const abi::Arguments& given) {
  MergeStatesGrad op = {};
  const MergeStatesReader read(op, given.tensor(2));
  op.grad_out = read.out("grad_out", given.tensor(0));
  if (given.has(1)) op.grad_lse = read.lse("grad_lse", given.tensor(1));
  op.out_a = read.out("out_a", given.tensor(2));
  op.lse_a = read.lse("lse_a", given.tensor(3));
  op.out_b = read.out("out_b", given.tensor(4));
  op.lse_b = read.lse("lse_b", given.tensor(5));
  op.grad_a = read.out("grad_a", given.tensor(6));
  op.grad_lse_a = read.lse("grad_lse_a", given.tensor(7));
  op.grad_b = read.out("grad_b", given.tensor(8));
  op.grad_lse_b = read.lse("grad_lse_b", given.tensor(9));
  return op;
}
constexpr const char* kMergeStatesBackwardKinds = "T?TTTTTRRRR";

}  // namespace softprompt_fast
