// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "../merge_states.h"
#include "strided.h"

namespace softprompt_fast {
namespace SOFTPROMPT_FAST_ISA {

// Call body(offset) for rows first..last-1, where offset(tensor) counts elements to a row's first.
template <typename Body>
SOFTPROMPT_FAST_INLINE void for_rows(const MergeStates& op, int64_t first, int64_t last,
                                     Body&& body) {
  int64_t k = first % op.size[2], j = first / op.size[2] % op.size[1],
          i = first / op.size[2] / op.size[1];
  for (int64_t row = first; row < last; ++row) {
    body([&](const Tensor& x) { return i * x.stride[0] + j * x.stride[1] + k * x.stride[2]; });
    if (++k < op.size[2]) continue;
    k = 0;
    if (++j < op.size[1]) continue;
    j = 0;
    ++i;
  }
}

// What two log-sum-exps a and b merge to, and the shares e^(a - lse) and e^(b - lse), taken from
// their difference alone: a large lse has no digits left for it.
struct Shares {
  float a, b, lse;
};

SOFTPROMPT_FAST_INLINE Shares shares(float a, float b) {
  constexpr float infinity = __builtin_inff();
  if (a == -infinity && b == -infinity) return {0.0f, 0.0f, -infinity};  // both states are empty
  const float highest = a > b ? a : b, lowest = a > b ? b : a;
  const float ratio = exp(splat(lowest - highest))[0];
  const float major = 1.0f / (1.0f + ratio), minor = ratio * major;
  const float lse = highest + __builtin_log1pf(ratio);
  return a > b ? Shares{major, minor, lse} : Shares{minor, major, lse};
}

inline void merge_states(const MergeStates& op, int64_t first, int64_t last) {
  with_storage(op.out.dtype, [&](auto storage) {
    typedef decltype(storage) Storage;
    typedef typename Storage::Element Element;
    const int64_t v_dim = op.v_dim;
    for_rows(op, first, last, [&](auto offset) {
      const Shares share = shares(*(const float*)op.lse_a.at(offset(op.lse_a)),
                                  *(const float*)op.lse_b.at(offset(op.lse_b)));
      *(float*)op.lse.at(offset(op.lse)) = share.lse;
      const auto* from_a = (const Element*)op.out_a.at(offset(op.out_a));
      const auto* from_b = (const Element*)op.out_b.at(offset(op.out_b));
      auto* to = (Element*)op.out.at(offset(op.out));
      const int64_t col_a = op.out_a.stride[3], col_b = op.out_b.stride[3], col = op.out.stride[3];
      for (int64_t c = 0; c < v_dim; c += W) {
        const Vec x = load_strided<Storage>(from_a + c * col_a, col_a, v_dim - c);
        const Vec y = load_strided<Storage>(from_b + c * col_b, col_b, v_dim - c);
        store_strided<Storage>(to + c * col, col, v_dim - c, x * share.a + y * share.b);
      }
    });
  });
}

// With w_x = exp(lse_x - lse): d out / d out_x = w_x, d lse / d lse_x = w_x, and d out / d lse_a =
// w_a (out_a - out) = w_a w_b (out_a - out_b), the last form because out may be rounded to 16 bits;
// for lse_b it is the opposite.
inline void merge_states_backward(const MergeStatesGrad& op, int64_t first, int64_t last) {
  with_storage(op.out_a.dtype, [&](auto storage) {
    typedef decltype(storage) Storage;
    typedef typename Storage::Element Element;
    const int64_t v_dim = op.v_dim;
    for_rows(op, first, last, [&](auto offset) {
      const Shares share = shares(*(const float*)op.lse_a.at(offset(op.lse_a)),
                                  *(const float*)op.lse_b.at(offset(op.lse_b)));
      const auto* from = (const Element*)op.grad_out.at(offset(op.grad_out));
      const auto* from_a = (const Element*)op.out_a.at(offset(op.out_a));
      const auto* from_b = (const Element*)op.out_b.at(offset(op.out_b));
      auto* to_a = (Element*)op.grad_a.at(offset(op.grad_a));
      auto* to_b = (Element*)op.grad_b.at(offset(op.grad_b));
      const int64_t col = op.grad_out.stride[3], col_a = op.out_a.stride[3],
                    col_b = op.out_b.stride[3], to_col_a = op.grad_a.stride[3],
                    to_col_b = op.grad_b.stride[3];
      Vec dot = {};
      for (int64_t c = 0; c < v_dim; c += W) {
        const int64_t rest = v_dim - c;
        const Vec grad = load_strided<Storage>(from + c * col, col, rest);
        const Vec a = load_strided<Storage>(from_a + c * col_a, col_a, rest);
        const Vec b = load_strided<Storage>(from_b + c * col_b, col_b, rest);
        dot += grad * (a - b);
        store_strided<Storage>(to_a + c * to_col_a, to_col_a, rest, grad * share.a);
        store_strided<Storage>(to_b + c * to_col_b, to_col_b, rest, grad * share.b);
      }
      const float along = sum(dot) * (share.a * share.b);
      const float upstream =
          op.grad_lse ? *(const float*)op.grad_lse.at(offset(op.grad_lse)) : 0.0f;
      *(float*)op.grad_lse_a.at(offset(op.grad_lse_a)) = along + share.a * upstream;
      *(float*)op.grad_lse_b.at(offset(op.grad_lse_b)) = -along + share.b * upstream;
    });
  });
}

}  // namespace SOFTPROMPT_FAST_ISA
}  // namespace softprompt_fast
