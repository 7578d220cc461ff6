// SPDX-License-Identifier: Apache-2.0
// What the bindings of the CPU kernels share. What is no op gets its tensors as tuples of numbers,
// because the module does not link against torch. Python's side
// (softprompt_fast/backends/cpu/_tensors.py) has checked shapes and dtypes; what can be checked
// from here is checked again, so that only a pointer to less memory than the sizes say can still do
// harm.
#pragma once

#include <pybind11/pybind11.h>

#include "../checks.h"
#include "../tensor.h"
#include "kernels.h"
#include "linear.h"
#include "prefix_attention.h"

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

// (data pointer, dtype code, stride, ...), strides in elements; None: no tensor.
inline Tensor as_tensor(const char* name, pybind11::handle given, int64_t dimensions) {
  Tensor tensor;
  if (given.is_none()) return tensor;
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
  return tensor;
}

// Kernels read a call's tensors as one dtype, which no other than the first one tells them.
inline void check_dtype(const char* name, const Tensor& tensor, DType expected) {
  SOFTPROMPT_FAST_CHECK(!tensor || tensor.dtype == expected, name, ": expected dtype code ",
                        static_cast<int>(expected), ", found ", static_cast<int>(tensor.dtype));
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
void implement_prompt_concat();
void bind_prefix_attention(pybind11::module_& module);
void bind_linear(pybind11::module_& module);
void bind_training(pybind11::module_& module);

}  // namespace softprompt_fast
