// SPDX-License-Identifier: Apache-2.0
// Python's side: softprompt_fast/backends/cpu/_training.py.
#include "binding.h"
#include "dispatch.h"
#include "parallel.h"
#include "training.h"

namespace softprompt_fast {
namespace {

namespace py = pybind11;

float* floats(const char* name, py::handle given, int64_t dimensions, Tensor& tensor) {
  tensor = as_tensor(name, given, dimensions);
  check_dtype(name, tensor, DType::kFloat32);
  return static_cast<float*>(tensor.data);
}

// Sizes (rows, depth, columns), and x [rows, depth], b [depth, columns], out [rows, columns].
Product as_product(const py::tuple& sizes, py::handle x, py::handle b, int64_t bias,
                   py::handle out) {
  Product op = {};
  int64_t* const size[] = {&op.rows, &op.depth, &op.columns};
  read_sizes(sizes, size);
  Tensor tensor;
  op.x = floats("x", x, 2, tensor);
  op.x_row = tensor.stride[0];
  SOFTPROMPT_FAST_CHECK(tensor.stride[1] == 1, "x: expected dense rows");
  op.w = floats("b", b, 2, tensor);
  op.w_depth = tensor.stride[0];
  op.w_column = tensor.stride[1];
  SOFTPROMPT_FAST_CHECK(op.w_depth == 1 || op.w_column == 1, "b: expected a stride of 1, found ",
                        op.w_depth, " and ", op.w_column);
  op.bias = reinterpret_cast<const float*>(bias);
  if (!out.is_none()) {
    op.out = floats("out", out, 2, tensor);
    op.out_row = tensor.stride[0];
    SOFTPROMPT_FAST_CHECK(tensor.stride[1] == 1, "out: expected dense rows");
  }
  return op;
}

// body(first, last, row, rows, scratch) over panels and rows: all rows at once where the panels
// make enough tasks, so that no panel is gathered twice. `copies` panels are gathered for each.
template <typename Body>
void for_panels(const Product& op, int64_t copies, int threads, Body&& body) {
  if (op.rows == 0 || op.columns == 0) return;
  const int64_t panels = ceil_div(op.columns, kPanel);
  const int64_t most = 4 * kGatheredDepth / (copies * (op.depth > 0 ? op.depth : 1));
  if (1.0 * op.rows * op.depth * op.columns < 1 << 16) threads = 1;
  int64_t group = panels / (4 * threads);
  group = group > most ? most : group;
  if (group < 1) group = 1;
  // As many for each thread: 18 panels by two would be 9 tasks, 5 of them one thread's.
  int64_t groups = ceil_div(ceil_div(panels, group), threads) * threads;
  if (groups > panels) groups = panels;
  int64_t parts = ceil_div(2 * threads, groups);
  const int64_t blocks = ceil_div(op.rows, 2 * kRowBlock);
  if (parts > blocks) parts = blocks;
  const int64_t size = copies * (group * op.depth + kRowBlock) * kPanel;
  float* memory = static_cast<float*>(workspace(sizeof(float) * size * threads));
  parallel_for(groups * parts, threads, [&](int64_t task, int thread) {
    const int64_t at = task / parts, part = task % parts;
    const int64_t first = panels * at / groups, last = panels * (at + 1) / groups;
    const int64_t row = op.rows * part / parts, end = op.rows * (part + 1) / parts;
    body(first, last, row, end - row, memory + thread * size);
  });
}

void product(py::tuple sizes, py::handle x, py::handle b, int64_t bias, py::handle out, bool add,
             int threads) {
  const Product op = as_product(sizes, x, b, bias, out);
  check_threads(threads);
  py::gil_scoped_release release;
  const Kernels& isa = kernels();
  const int64_t blocks = op.depth > 0 ? ceil_div(op.depth, kGatheredDepth) : 1;
  for (int64_t block = 0; block < blocks; ++block) {
    const int64_t k = op.depth * block / blocks;
    Product part = op;
    part.depth = op.depth * (block + 1) / blocks - k;
    part.x += k;
    part.w += k * op.w_depth;
    part.add = add || block > 0;
    if (block > 0) part.bias = nullptr;
    for_panels(part, 1, threads,
               [&](int64_t first, int64_t last, int64_t row, int64_t rows, float* scratch) {
                 isa.product(part, first, last, row, rows, scratch);
               });
  }
}

Activation as_activation(int code) {
  SOFTPROMPT_FAST_CHECK(code >= 0 && code <= 2, "activation: expected a code 0..2, found ", code);
  return static_cast<Activation>(code);
}

void gated_product(py::tuple sizes, py::handle x, py::handle gate, int64_t gate_bias, py::handle up,
                   int64_t up_bias, int activation, py::handle gate_out, py::handle up_out,
                   int64_t out, int threads) {
  GatedProduct op = {};
  op.gate = as_product(sizes, x, gate, gate_bias, gate_out);
  op.up = as_product(sizes, x, up, up_bias, up_out);
  op.activation = as_activation(activation);
  op.out = reinterpret_cast<float*>(out);
  check_threads(threads);
  py::gil_scoped_release release;
  const Kernels& isa = kernels();
  for_panels(op.gate, 2, threads,
             [&](int64_t first, int64_t last, int64_t row, int64_t rows, float* scratch) {
               isa.gated_product(op, first, last, row, rows, scratch);
             });
}

void gated_product_backward(py::tuple sizes, py::handle x, py::handle b, int activation,
                            int64_t gate, int64_t up, int64_t grad_gate, int64_t grad_up,
                            int threads) {
  GatedProductBackward op = {};
  op.product = as_product(sizes, x, b, 0, py::none());
  op.activation = as_activation(activation);
  op.gate = reinterpret_cast<const float*>(gate);
  op.up = reinterpret_cast<const float*>(up);
  op.grad_gate = reinterpret_cast<float*>(grad_gate);
  op.grad_up = reinterpret_cast<float*>(grad_up);
  check_threads(threads);
  py::gil_scoped_release release;
  const Kernels& isa = kernels();
  for_panels(op.product, 1, threads,
             [&](int64_t first, int64_t last, int64_t row, int64_t rows, float* scratch) {
               isa.gated_product_backward(op, first, last, row, rows, scratch);
             });
}

// body(first, last) over rows of `columns` elements.
template <typename Body>
void for_rows(int64_t rows, int64_t columns, int threads, Body&& body) {
  check_threads(threads);
  constexpr int64_t kElements = 1 << 14;  // of a task
  const int64_t step = columns >= kElements ? 1 : kElements / (columns > 0 ? columns : 1);
  parallel_for(ceil_div(rows, step), threads, [&](int64_t task, int) {
    const int64_t end = (task + 1) * step;
    body(task * step, end < rows ? end : rows);
  });
}

void norm_rows_backward(int64_t x, int64_t grad, int64_t rows, int64_t columns, py::handle norm,
                        int64_t out, bool add, int threads) {
  NormRowsBackward op = {};
  op.columns = columns;
  op.norm = as_norm(norm);
  SOFTPROMPT_FAST_CHECK(op.norm.kind == NormKind::kRms, "norm: expected an RMS norm");
  op.x = reinterpret_cast<const float*>(x);
  op.grad = reinterpret_cast<const float*>(grad);
  op.out = reinterpret_cast<float*>(out);
  op.add = add;
  py::gil_scoped_release release;
  const Kernels& isa = kernels();
  for_rows(rows, columns, threads,
           [&](int64_t first, int64_t last) { isa.norm_rows_backward(op, first, last); });
}

void rotate_rows(int64_t x, int64_t rows, int64_t heads, int64_t head_dim, int64_t cos, int64_t sin,
                 int64_t rotated, bool transposed, int threads) {
  SOFTPROMPT_FAST_CHECK(rotated >= 0 && rotated <= head_dim && rotated % 2 == 0,
                        "rotated: expected an even number up to ", head_dim, ", found ", rotated);
  RotateRows op = {};
  op.x = reinterpret_cast<float*>(x);
  op.heads = heads;
  op.head_dim = head_dim;
  op.cos = reinterpret_cast<const float*>(cos);
  op.sin = reinterpret_cast<const float*>(sin);
  op.rotated = rotated;
  op.transposed = transposed;
  py::gil_scoped_release release;
  const Kernels& isa = kernels();
  for_rows(rows, heads * head_dim, threads,
           [&](int64_t first, int64_t last) { isa.rotate_rows(op, first, last); });
}

void cross_entropy_rows(int64_t logits, int64_t rows, int64_t columns, py::handle labels,
                        int64_t weights, int64_t losses, bool gradient, int threads) {
  const Index index = as_index("labels", labels);
  SOFTPROMPT_FAST_CHECK(index.size == rows && (index.wide || rows == 0), "labels: expected ", rows,
                        " of int64, found ", index.size);
  CrossEntropyRows op = {};
  op.logits = reinterpret_cast<float*>(logits);
  op.columns = columns;
  op.labels = static_cast<const int64_t*>(index.data);
  op.weights = reinterpret_cast<const float*>(weights);
  op.losses = reinterpret_cast<float*>(losses);
  op.gradient = gradient;
  for (int64_t row = 0; row < rows; ++row) {
    SOFTPROMPT_FAST_CHECK(op.labels[row] < columns, "labels: expected values below ", columns,
                          ", found ", op.labels[row], " in place ", row);
  }
  py::gil_scoped_release release;
  const Kernels& isa = kernels();
  for_rows(rows, columns, threads,
           [&](int64_t first, int64_t last) { isa.cross_entropy_rows(op, first, last); });
}

}  // namespace

void bind_training(py::module_& module) {
  module.def("product", &product);
  module.def("gated_product", &gated_product);
  module.def("gated_product_backward", &gated_product_backward);
  module.def("norm_rows_backward", &norm_rows_backward);
  module.def("rotate_rows", &rotate_rows);
  module.def("cross_entropy_rows", &cross_entropy_rows);
}

}  // namespace softprompt_fast
