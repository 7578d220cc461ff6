// SPDX-License-Identifier: Apache-2.0
// Pieces of a vector's length from rows whose elements may lie apart, and back.
#pragma once

#include "simd.h"

namespace softprompt_fast {
namespace SOFTPROMPT_FAST_ISA {

// Elements p[0], p[stride], ... as floats; at most `count` of them are read, the other lanes are 0.
template <typename Storage>
SOFTPROMPT_FAST_INLINE Vec load_strided(const typename Storage::Element* p, int64_t stride,
                                        int64_t count) {
  if (stride == 1 && count >= W) return Storage::load(p);
  typename Storage::Element gathered[W] = {};
  for (int64_t i = 0; i < W && i < count; ++i) gathered[i] = p[i * stride];
  return Storage::load(gathered);
}

// The first min(count, W) lanes of x to p[0], p[stride], ...
template <typename Storage>
SOFTPROMPT_FAST_INLINE void store_strided(typename Storage::Element* p, int64_t stride,
                                          int64_t count, Vec x) {
  if (stride == 1 && count >= W) return Storage::store(p, x);
  typename Storage::Element row[W];
  Storage::store(row, x);
  for (int64_t i = 0; i < W && i < count; ++i) p[i * stride] = row[i];
}

}  // namespace SOFTPROMPT_FAST_ISA
}  // namespace softprompt_fast
