// SPDX-License-Identifier: Apache-2.0
#include "../prompt_concat_arguments.h"
#include "binding.h"

namespace softprompt_fast {
namespace cuda {
namespace {

namespace py = pybind11;

// Three of something: of q, k and v.
void read_three(const char* name, py::handle given, int64_t dimensions, bool used, DType dtype,
                Tensor (&to)[3]) {
  if (given.is_none()) return;
  PyObject* tuple = as_tuple(name, given, 3, "tensors of q, k and v");
  for (int i = 0; i < 3; ++i) {
    to[i] = as_tensor(name, PyTuple_GET_ITEM(tuple, i), dimensions, used);
    check_dtype(name, to[i], dtype);
  }
}

// norm: (kind, weight, bias, offset, eps). heads: (q_heads, kv_heads, head_dim, value_dim).
// rotation: (cos, sin, R, interleaved) or None. start: where in a cache of `capacity` places k and
// v go on, or None.
void prompt_qkv(py::handle ids, py::handle tokens, py::handle table, py::handle prompt,
                py::handle residual, const py::tuple& sizes, const py::tuple& rows, double scale,
                double prompt_scale, bool left, const py::tuple& norm, const py::tuple& heads,
                py::handle weights, py::handle biases, py::handle rotation, py::handle results,
                py::handle start, int64_t capacity, py::handle queue) {
  PromptQkv op = {};
  op.concat =
      as_prompt_concat(ids, tokens, table, prompt, residual, sizes, scale, prompt_scale, false);
  op.rows = as_prompt_rows(rows);
  op.left = left;
  int64_t* const size[] = {&op.q_heads, &op.kv_heads, &op.head_dim, &op.value_dim};
  read_sizes(heads, size);
  const PromptConcat& concat = op.concat;
  SOFTPROMPT_FAST_CHECK(concat.width % 8 == 0 && op.head_dim % 2 == 0 && op.value_dim % 2 == 0,
                        "sizes: expected a width that 8 divides and even head dimensions, found ",
                        concat.width, ", ", op.head_dim, " and ", op.value_dim);
  const bool used = concat.batch * (concat.slots + concat.own) > 0;
  PyObject* first = as_tuple("results", results, 3, "tensors of q, k and v");
  const DType dtype = as_tensor("results", PyTuple_GET_ITEM(first, 0), 4, used).dtype;
  read_three("results", results, 4, used, dtype, op.out);
  read_three("weights", weights, 2, used, dtype, op.weight);
  SOFTPROMPT_FAST_CHECK(op.weight[0] || !used, "weights: expected three, found None");
  read_three("biases", biases, 1, used, dtype, op.bias);
  for (const Tensor* x : {&concat.tokens, &concat.table, &concat.prompt, &concat.out}) {
    check_dtype("tokens, table, prompt, residual", *x, dtype);
  }
  SOFTPROMPT_FAST_CHECK(norm.size() == 5, "norm: expected (kind, weight, bias, offset, eps)");
  const int kind = norm[0].cast<int>();
  SOFTPROMPT_FAST_CHECK(kind >= 0 && kind <= 2, "norm: expected a kind 0..2, found ", kind);
  op.norm = static_cast<PromptQkv::Norm>(kind);
  op.norm_weight = as_tensor("norm weight", norm[1], 1);
  op.norm_bias = as_tensor("norm bias", norm[2], 1);
  check_dtype("norm weight", op.norm_weight, dtype);
  check_dtype("norm bias", op.norm_bias, dtype);
  op.norm_offset = norm[3].cast<float>();
  op.eps = norm[4].cast<float>();
  if (!rotation.is_none()) {
    PyObject* turn = as_tuple("rotation", rotation, 4, "cos, sin, their size and a flag");
    op.cos = as_tensor("cos", PyTuple_GET_ITEM(turn, 0), 3, used);
    op.sin = as_tensor("sin", PyTuple_GET_ITEM(turn, 1), 3, used);
    check_floating("cos", op.cos);
    check_floating("sin", op.sin);
    op.rotation = as_number("rotation", PyTuple_GET_ITEM(turn, 2));
    op.interleaved = PyObject_IsTrue(PyTuple_GET_ITEM(turn, 3)) == 1;
    SOFTPROMPT_FAST_CHECK(op.rotation >= 0 && op.rotation % 2 == 0 && op.rotation <= op.head_dim,
                          "rotation: expected an even number up to ", op.head_dim, ", found ",
                          op.rotation);
  }
  op.start = as_index("start", start);
  op.capacity = capacity;
  SOFTPROMPT_FAST_CHECK(!op.start || op.start.size == 1, "start: expected one value, found ",
                        op.start.size);
  run_prompt_qkv(op, as_queue(queue));
}

}  // namespace

void bind_prompt_qkv(py::module_& module) { module.def("prompt_qkv", &prompt_qkv); }

}  // namespace cuda
}  // namespace softprompt_fast
