// SPDX-License-Identifier: Apache-2.0
// What the bindings share: tensors arrive as tuples of numbers, because no module links against
// torch. Python's side (softprompt_fast/backends/cpu/_tensors.py, .../cuda/_runtime.py) has checked
// shapes and dtypes; what can be checked from here is checked again, so that only a pointer to less
// memory than the sizes say can still do harm.
#pragma once

#include <pybind11/pybind11.h>

#include "checks.h"
#include "tensor.h"

namespace softprompt_fast {

// The tuple's items, of which there must be `items`.
inline PyObject* as_tuple(const char* name, pybind11::handle given, int64_t items,
                          const char* meaning) {
  PyObject* tuple = given.ptr();
  SOFTPROMPT_FAST_CHECK(PyTuple_Check(tuple), name, ": expected None or a tuple of ", meaning,
                        ", found ", Py_TYPE(tuple)->tp_name);
  SOFTPROMPT_FAST_CHECK(PyTuple_GET_SIZE(tuple) == items, name, ": expected a tuple of ", meaning,
                        " (", items, " items), found ", PyTuple_GET_SIZE(tuple), " items");
  return tuple;
}

inline int64_t as_number(const char* name, PyObject* given) {
  SOFTPROMPT_FAST_CHECK(PyLong_Check(given), name, ": expected an integer, found ",
                        Py_TYPE(given)->tp_name);
  const int64_t value = PyLong_AsLongLong(given);
  if (value == -1 && PyErr_Occurred()) throw pybind11::error_already_set();
  return value;
}

// (data pointer, dtype code, stride, ...), strides in elements; None: no tensor. `used`: a kernel
// will touch it, so there must be memory; without, an empty tensor's null pointer is fine.
inline Tensor as_tensor(const char* name, pybind11::handle given, int64_t dimensions,
                        bool used = false) {
  Tensor tensor;
  if (!given.is_none()) {
    PyObject* tuple = as_tuple(name, given, dimensions + 2, "a pointer, a dtype code and strides");
    const auto number = [&](int64_t i) { return as_number(name, PyTuple_GET_ITEM(tuple, i)); };
    tensor.data = reinterpret_cast<void*>(number(0));
    const int64_t dtype = number(1);
    constexpr int64_t kLast = static_cast<int64_t>(DType::kInt8);
    SOFTPROMPT_FAST_CHECK(dtype >= 0 && dtype <= kLast, name, ": expected a dtype code 0..", kLast,
                          ", found ", dtype);
    tensor.dtype = static_cast<DType>(dtype);
    for (int64_t i = 0; i < dimensions; ++i) {
      tensor.stride[i] = number(2 + i);
      SOFTPROMPT_FAST_CHECK(tensor.stride[i] >= 0, name, ": expected no negative stride, found ",
                            tensor.stride[i], " in dimension ", i);
    }
  }
  SOFTPROMPT_FAST_CHECK(tensor || !used, name, ": expected a tensor with memory, found ",
                        given.is_none() ? "None" : "a null pointer");
  return tensor;
}

// Kernels read a call's tensors as one dtype, which no other than the first one tells them.
inline void check_dtype(const char* name, const Tensor& tensor, DType expected) {
  SOFTPROMPT_FAST_CHECK(!tensor || tensor.dtype == expected, name, ": expected dtype code ",
                        static_cast<int>(expected), ", found ", static_cast<int>(tensor.dtype));
}

inline void check_floating(const char* name, const Tensor& tensor) {
  SOFTPROMPT_FAST_CHECK(tensor.dtype != DType::kInt8, name,
                        ": expected a floating dtype code 0..2, found ",
                        static_cast<int>(tensor.dtype));
}

// (data pointer, length, whether the values are int64); None: no tensor.
inline Index as_index(const char* name, pybind11::handle given) {
  Index index;
  if (given.is_none()) return index;
  PyObject* tuple = as_tuple(name, given, 3, "a pointer, a length and a flag");
  index.data = reinterpret_cast<const void*>(as_number(name, PyTuple_GET_ITEM(tuple, 0)));
  index.size = as_number(name, PyTuple_GET_ITEM(tuple, 1));
  index.wide = as_number(name, PyTuple_GET_ITEM(tuple, 2)) != 0;
  SOFTPROMPT_FAST_CHECK(index.size >= 0 && (index.size == 0 || index), name,
                        ": expected a length >= 0 and memory for it, found length ", index.size,
                        index ? "" : " and a null pointer");
  return index;
}

template <size_t N>
void read_sizes(const pybind11::tuple& given, int64_t* const (&sizes)[N]) {
  constexpr int64_t kMost = int64_t{1} << 40;  // products of a few with strides of a few stay exact
  SOFTPROMPT_FAST_CHECK(given.size() == N, "sizes: expected ", N, " numbers, found ", given.size());
  for (size_t i = 0; i < N; ++i) {
    *sizes[i] = as_number("sizes", PyTuple_GET_ITEM(given.ptr(), i));
    SOFTPROMPT_FAST_CHECK(*sizes[i] >= 0 && *sizes[i] <= kMost,
                          "sizes: expected numbers within 0..", kMost, ", found ", *sizes[i],
                          " in place ", i);
  }
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace softprompt_fast
