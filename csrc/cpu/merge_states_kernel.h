// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "merge_states.h"
#include "tile.h"

namespace softprompt_fast {
namespace SOFTPROMPT_FAST_ISA {

inline void merge_states(const MergeStates& op, int64_t first, int64_t last) {
  constexpr float infinity = __builtin_inff();
  for (int64_t row = first; row < last; ++row) {
    const float a = op.lse_a[row], b = op.lse_b[row];
    const float highest = a > b ? a : b;
    float weight_a = 0.0f, weight_b = 0.0f;
    op.lse[row] = -infinity;
    if (highest != -infinity) {  // else both states are empty; a NaN is no empty state
      weight_a = exp(splat(a - highest))[0];
      weight_b = exp(splat(b - highest))[0];
      op.lse[row] = highest + __builtin_logf(weight_a + weight_b);
      const float total = weight_a + weight_b;
      weight_a /= total;
      weight_b /= total;
    }
    with_storage(op.out.dtype, [&](auto storage) {
      typedef decltype(storage) Storage;
      typedef typename Storage::Element Element;
      const auto* from_a = (const Element*)op.out_a.data + row * op.v_dim;
      const auto* from_b = (const Element*)op.out_b.data + row * op.v_dim;
      auto* to = (Element*)op.out.data + row * op.v_dim;
      int64_t i = 0;
      for (; i + W <= op.v_dim; i += W) {
        Storage::store(to + i,
                       Storage::load(from_a + i) * weight_a + Storage::load(from_b + i) * weight_b);
      }
      if (i < op.v_dim) {
        const int64_t rest = op.v_dim - i;
        store_some<Storage>(to + i,
                            load_some<Storage>(from_a + i, rest) * weight_a +
                                load_some<Storage>(from_b + i, rest) * weight_b,
                            rest);
      }
    });
  }
}

}  // namespace SOFTPROMPT_FAST_ISA
}  // namespace softprompt_fast
