// SPDX-License-Identifier: Apache-2.0
// What the bindings share: tensors arrive as tuples of numbers, because the module does not link
// against torch. Python's side (softprompt_fast/backends/cpu/_tensors.py) has checked shapes and
// dtypes; what can be checked from here is checked again.
#pragma once

#include <pybind11/pybind11.h>

#include "../checks.h"
#include "kernels.h"
#include "prefix_attention.h"

namespace softprompt_fast {

// (data pointer, dtype code, stride, ...), strides in elements; None: no tensor.
inline Tensor as_tensor(const char* name, pybind11::handle given, int64_t dimensions) {
  Tensor tensor;
  if (given.is_none()) return tensor;
  PyObject* tuple = given.ptr();
  SOFTPROMPT_FAST_CHECK(PyTuple_Check(tuple) && PyTuple_GET_SIZE(tuple) == dimensions + 2, name,
                        ": expected a tuple of a pointer, a dtype code and ", dimensions,
                        " strides");
  const auto number = [&](int64_t place) {
    const int64_t value = PyLong_AsLongLong(PyTuple_GET_ITEM(tuple, place));
    if (value == -1 && PyErr_Occurred()) throw pybind11::error_already_set();
    return value;
  };
  tensor.data = reinterpret_cast<void*>(number(0));
  const int64_t dtype = number(1);
  SOFTPROMPT_FAST_CHECK(dtype >= 0 && dtype <= 3, name, ": expected a dtype code 0..3, found ",
                        dtype);
  tensor.dtype = static_cast<DType>(dtype);
  for (int64_t i = 0; i < dimensions; ++i) {
    tensor.stride[i] = number(2 + i);
    SOFTPROMPT_FAST_CHECK(tensor.stride[i] >= 0, name, ": expected no negative stride, found ",
                          tensor.stride[i], " in dimension ", i);
  }
  return tensor;
}

// (data pointer, length, whether the values are int64); None: no tensor.
inline Index as_index(const char* name, pybind11::handle given) {
  Index index;
  if (given.is_none()) return index;
  PyObject* tuple = given.ptr();
  SOFTPROMPT_FAST_CHECK(PyTuple_Check(tuple) && PyTuple_GET_SIZE(tuple) == 3, name,
                        ": expected a tuple of a pointer, a length and a flag");
  index.data = PyLong_AsVoidPtr(PyTuple_GET_ITEM(tuple, 0));
  index.size = PyLong_AsLongLong(PyTuple_GET_ITEM(tuple, 1));
  index.wide = PyObject_IsTrue(PyTuple_GET_ITEM(tuple, 2)) == 1;
  if (PyErr_Occurred()) throw pybind11::error_already_set();
  return index;
}

template <size_t N>
void read_sizes(const pybind11::tuple& given, int64_t* const (&sizes)[N]) {
  SOFTPROMPT_FAST_CHECK(given.size() == N, "sizes: expected ", N, " numbers, found ", given.size());
  for (size_t i = 0; i < N; ++i) {
    *sizes[i] = given[i].cast<int64_t>();
    SOFTPROMPT_FAST_CHECK(*sizes[i] >= 0, "sizes: expected none below 0, found ", *sizes[i],
                          " in place ", i);
  }
}

// One function per op, in <op>_binding.cpp.
void bind_prefix_attention(pybind11::module_& module);
void bind_linear(pybind11::module_& module);
void bind_merge_states(pybind11::module_& module);
void bind_prompt_concat(pybind11::module_& module);

}  // namespace softprompt_fast
