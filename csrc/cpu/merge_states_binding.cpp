// SPDX-License-Identifier: Apache-2.0
#include "binding.h"
#include "dispatch.h"
#include "merge_states.h"
#include "parallel.h"

namespace softprompt_fast {
namespace {

namespace py = pybind11;

constexpr int64_t kRows = 256;  // of one task

void merge_states(py::handle out_a, int64_t lse_a, py::handle out_b, int64_t lse_b, py::handle out,
                  int64_t lse, int64_t rows, int64_t v_dim, int threads) {
  SOFTPROMPT_FAST_CHECK(rows >= 0 && v_dim >= 0, "sizes: expected none below 0, found ", rows, ", ",
                        v_dim);
  MergeStates op;
  op.rows = rows;
  op.v_dim = v_dim;
  const bool used = rows > 0 && v_dim > 0;
  op.out_a = as_tensor("out_a", out_a, 0, used);
  op.out_b = as_tensor("out_b", out_b, 0, used);
  op.out = as_tensor("out", out, 0, used);
  check_floating("out_a", op.out_a);
  check_dtype("out_b", op.out_b, op.out_a.dtype);
  check_dtype("out", op.out, op.out_a.dtype);
  SOFTPROMPT_FAST_CHECK((lse_a && lse_b && lse) || rows == 0,
                        "lse_a, lse_b, lse: expected memory, found a null pointer");
  check_threads(threads);
  op.lse_a = reinterpret_cast<const float*>(lse_a);
  op.lse_b = reinterpret_cast<const float*>(lse_b);
  op.lse = reinterpret_cast<float*>(lse);
  py::gil_scoped_release release;
  const Kernels& isa = kernels();
  parallel_for((rows + kRows - 1) / kRows, rows * v_dim < 1 << 15 ? 1 : threads,
               [&](int64_t task, int) {
                 const int64_t last = (task + 1) * kRows;
                 isa.merge_states(op, task * kRows, last < rows ? last : rows);
               });
}

}  // namespace

void bind_merge_states(py::module_& module) { module.def("merge_states", &merge_states); }

}  // namespace softprompt_fast
