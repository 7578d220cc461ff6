// SPDX-License-Identifier: Apache-2.0
// How kernels see a tensor. No torch, no standard library.
#pragma once

#include <stdint.h>

namespace softprompt_fast {

enum class DType : int32_t { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2, kInt8 = 3 };

// e4m3, which CUDA kernels alone read: no enumerator, so that the CPU's need no case for it.
constexpr DType kFloat8{4};

constexpr int64_t size_of(DType dtype) {
  return dtype == DType::kFloat32 ? 4 : dtype >= DType::kInt8 ? 1 : 2;
}

// A strided tensor of up to four dimensions; strides count elements.
struct Tensor {
  void* data = nullptr;
  DType dtype = DType::kFloat32;
  int64_t stride[4] = {0, 0, 0, 0};

  constexpr explicit operator bool() const { return data != nullptr; }
  void* at(int64_t offset) const { return (char*)data + offset * size_of(dtype); }
};

// Values of an index tensor, int32 or int64, dense.
struct Index {
  const void* data = nullptr;
  int64_t size = 0;
  bool wide = false;

  constexpr explicit operator bool() const { return data != nullptr; }
  int64_t operator[](int64_t i) const {
    return wide ? ((const int64_t*)data)[i] : ((const int32_t*)data)[i];
  }
};

}  // namespace softprompt_fast
