// SPDX-License-Identifier: Apache-2.0
// What the bindings of the CPU kernels share, on top of ../arguments.h.
#pragma once

#include "../arguments.h"
#include "kernels.h"
#include "linear.h"
#include "prefix_attention.h"

namespace softprompt_fast {

inline void check_threads(int threads) {
  constexpr int kMost = 4096;  // a plan multiplies with it
  SOFTPROMPT_FAST_CHECK(threads >= 1 && threads <= kMost, "threads: expected 1..", kMost,
                        ", found ", threads);
}

// (kind, weight pointer, bias pointer, offset, eps) or None.
inline Norm as_norm(pybind11::handle given) {
  Norm norm;
  if (given.is_none()) return norm;
  const auto tuple = pybind11::reinterpret_borrow<pybind11::tuple>(given);
  SOFTPROMPT_FAST_CHECK(tuple.size() == 5, "norm: expected (kind, weight, bias, offset, eps)");
  const int kind = tuple[0].cast<int>();
  SOFTPROMPT_FAST_CHECK(kind >= 0 && kind <= 2, "norm: expected a kind 0..2, found ", kind);
  norm.kind = static_cast<NormKind>(kind);
  norm.weight = reinterpret_cast<const float*>(tuple[1].cast<int64_t>());
  norm.bias = reinterpret_cast<const float*>(tuple[2].cast<int64_t>());
  norm.offset = tuple[3].cast<float>();
  norm.eps = tuple[4].cast<float>();
  return norm;
}

// In <op>_binding.cpp: `implement` gives PyTorch's dispatcher the kernels of an op, `bind` gives
// Python what is no op, or is called below one.
void implement_merge_states();
void implement_prefix_attention();
void bind_prefix_attention(pybind11::module_& module);
void bind_linear(pybind11::module_& module);
void bind_prompt_concat(pybind11::module_& module);
void bind_training(pybind11::module_& module);

}  // namespace softprompt_fast
