// SPDX-License-Identifier: Apache-2.0
// Python's side: softprompt_fast/backends/cpu/_linear.py.
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <pybind11/stl.h>

#include "binding.h"
#include "dispatch.h"
#include "linear.h"
#include "parallel.h"

namespace softprompt_fast {
namespace {

namespace py = pybind11;

struct Free {
  void operator()(void* p) const { std::free(p); }
};

// Weights of a frozen layer in the layout of linear.h, a copy.
class PackedLinear {
 public:
  // sections: (weight, first row, rows) of each, weights as tuples of binding.h, [N, K].
  PackedLinear(const py::sequence& sections, int64_t in_features, int threads)
      : in_features_(in_features) {
    SOFTPROMPT_FAST_CHECK(in_features > 0, "in_features: expected > 0, found ", in_features);
    SOFTPROMPT_FAST_CHECK(py::len(sections) > 0, "sections: expected at least one");
    std::vector<Tensor> weights;
    first_panel_.push_back(0);
    first_column_.push_back(0);
    for (const py::handle& section : sections) {
      const auto given = py::reinterpret_borrow<py::tuple>(section);
      SOFTPROMPT_FAST_CHECK(given.size() == 3, "sections: expected (weight, first row, rows)");
      Tensor weight = as_tensor("weight", given[0], 2);
      const int64_t first = given[1].cast<int64_t>(), rows = given[2].cast<int64_t>();
      SOFTPROMPT_FAST_CHECK(first >= 0 && rows > 0,
                            "sections: expected a first row >= 0 and rows > 0");
      SOFTPROMPT_FAST_CHECK(weight.dtype != DType::kInt8, "weight: expected a floating dtype");
      SOFTPROMPT_FAST_CHECK(weights.empty() || weight.dtype == weights[0].dtype,
                            "weight: expected one dtype in all sections");
      weight.data = weight.at(first * weight.stride[0]);
      weights.push_back(weight);
      first_panel_.push_back(static_cast<int32_t>(first_panel_.back() + ceil_div(rows, kPanel)));
      first_column_.push_back(static_cast<int32_t>(first_column_.back() + rows));
    }
    dtype_ = weights[0].dtype;
    panel_bytes_ = in_features * kPanel * size_of(dtype_);
    bytes_ = first_panel_.back() * panel_bytes_;
    // Huge pages: a decode step streams all weights once, and would miss the TLB at every 4 KB.
    constexpr size_t kHuge = size_t{2} << 20;
    const size_t alignment = bytes_ >= int64_t{kHuge} ? kHuge : 64;
    memory_.reset(std::aligned_alloc(alignment, ceil_div(bytes_, alignment) * alignment));
    if (!memory_) throw std::bad_alloc();
#if defined(__linux__)
    if (alignment == kHuge) madvise(memory_.get(), ceil_div(bytes_, kHuge) * kHuge, MADV_HUGEPAGE);
#endif
    py::gil_scoped_release release;
    const Kernels& isa = kernels();
    parallel_for(first_panel_.back(), threads, [&](int64_t panel, int) {
      size_t section = 0;
      while (first_panel_[section + 1] <= panel) ++section;
      const int64_t skipped = (panel - first_panel_[section]) * kPanel;
      const int64_t rows = first_column_[section + 1] - first_column_[section] - skipped;
      Tensor weight = weights[section];
      weight.data = weight.at(skipped * weight.stride[0]);
      isa.pack_panel(weight, rows < kPanel ? rows : kPanel, in_features_,
                     static_cast<char*>(memory_.get()) + panel * panel_bytes_);
    });
  }

  PackedWeights weights() const {
    return {memory_.get(),        dtype_,
            in_features_,         first_panel_.data(),
            first_column_.data(), static_cast<int64_t>(first_panel_.size()) - 1};
  }
  int64_t bytes() const { return bytes_; }
  int64_t in_features() const { return in_features_; }
  int64_t out_features() const { return first_column_.back(); }

 private:
  std::unique_ptr<void, Free> memory_;
  std::vector<int32_t> first_panel_, first_column_;
  DType dtype_;
  int64_t in_features_, panel_bytes_, bytes_;
};

// Scratch of one call: normed rows, one intermediate, and a part for each thread.
struct Memory {
  float *normed, *middle, *of_thread;
  int64_t per_thread;

  Memory(int64_t normed_size, int64_t middle_size, int64_t thread_size, int threads)
      : per_thread(ceil_div(thread_size, 16) * 16) {
    const auto carve = [&](Carver carver) {
      normed = carver.take<float>(normed_size);
      middle = carver.take<float>(middle_size);
      of_thread = carver.take<float>(per_thread * threads);
      return carver.used();
    };
    carve(Carver(workspace(carve(Carver()))));
  }
};

// x, or x normed into scratch.
void norm_into(const Tensor& x, int64_t rows, int64_t columns, const Norm& norm, float* normed,
               const Memory& memory, int threads) {
  const NormRows op = {x, columns, norm, normed};
  const Kernels& isa = kernels();
  constexpr int64_t kRows = 8;
  parallel_for(ceil_div(rows, kRows), rows * columns < 1 << 15 ? 1 : threads,
               [&](int64_t task, int thread) {
                 const int64_t last = (task + 1) * kRows;
                 isa.norm_rows(op, task * kRows, last < rows ? last : rows,
                               memory.of_thread + thread * memory.per_thread);
               });
}

// body(first, last, row, rows, thread) over `units` of columns and all rows, in tasks of an even
// size: several a thread, so that one slow core does not hold up the others.
template <typename Body>
void for_tiles(int64_t units, int64_t unit_work, int64_t rows, int threads, Body&& body) {
  const int64_t row_blocks = ceil_div(rows, kRowBlock);
  if (1.0 * units * unit_work * rows < 1 << 16) threads = 1;
  int64_t groups = threads == 1 ? 1 : ceil_div(8 * threads, row_blocks);
  if (groups > units) groups = units;
  parallel_for(row_blocks * groups, threads, [&](int64_t task, int thread) {
    // Row blocks innermost: threads that run side by side then share the panels they read.
    const int64_t group = task / row_blocks, block = task % row_blocks;
    const int64_t first = units * group / groups, last = units * (group + 1) / groups;
    const int64_t row = rows * block / row_blocks, end = rows * (block + 1) / row_blocks;
    body(first, last, row, end - row, thread);
  });
}

void run_linear(const Linear& op, const Memory& memory, int threads) {
  const Kernels& isa = kernels();
  for_tiles(op.weights.panels(), op.weights.in_features * kPanel, op.rows, threads,
            [&](int64_t first, int64_t last, int64_t row, int64_t rows, int thread) {
              isa.linear(op, first, last, row, rows, memory.of_thread + thread * memory.per_thread);
            });
}

int64_t thread_scratch(int64_t columns) {
  const int64_t panels = 2 * kRowBlock * kPanel;
  return columns + kPanel > panels ? columns + kPanel : panels;
}

// x [rows, K] of any storage (strided), or floats to be used as they are.
void linear(py::handle x, int64_t rows, const PackedLinear& layer, py::handle norm, int64_t bias,
            int64_t out, bool add, int threads) {
  const Tensor from = as_tensor("x", x, 2);
  const Norm before = as_norm(norm);
  const int64_t depth = layer.in_features();
  py::gil_scoped_release release;
  const bool direct =
      before.kind == NormKind::kNone && from.dtype == DType::kFloat32 && from.stride[1] == 1;
  const Memory memory(direct ? 0 : rows * depth, 0, thread_scratch(depth), threads);
  Linear op = {};
  op.rows = rows;
  op.weights = layer.weights();
  op.bias = reinterpret_cast<const float*>(bias);
  op.out = reinterpret_cast<float*>(out);
  op.add = add;
  op.x = static_cast<const float*>(from.data);
  op.x_row = from.stride[0];
  if (!direct) {
    norm_into(from, rows, depth, before, memory.normed, memory, threads);
    op.x = memory.normed;
    op.x_row = depth;
  }
  run_linear(op, memory, threads);
}

void gated_mlp(int64_t x, int64_t rows, py::handle norm, const PackedLinear& gate_up,
               int64_t gate_up_bias, const PackedLinear& down, int64_t down_bias, int activation,
               int64_t out, int threads) {
  SOFTPROMPT_FAST_CHECK(activation >= 0 && activation <= 2,
                        "activation: expected a code 0..2, found ", activation);
  const PackedWeights weights = gate_up.weights();
  SOFTPROMPT_FAST_CHECK(weights.sections == 2 && gate_up.out_features() == 2 * down.in_features(),
                        "gate_up: expected two sections of ", down.in_features(), " rows, found ",
                        weights.sections, " sections and ", gate_up.out_features(), " rows");
  const Norm before = as_norm(norm);
  const int64_t depth = gate_up.in_features(), width = down.in_features();
  py::gil_scoped_release release;
  const Memory memory(rows * depth, rows * width, thread_scratch(depth), threads);
  Tensor from;
  from.data = reinterpret_cast<void*>(x);
  from.stride[0] = depth;
  from.stride[1] = 1;
  norm_into(from, rows, depth, before, memory.normed, memory, threads);
  GatedLinear first = {};
  first.linear.rows = rows;
  first.linear.x = memory.normed;
  first.linear.x_row = depth;
  first.linear.weights = weights;
  first.linear.bias = reinterpret_cast<const float*>(gate_up_bias);
  first.activation = static_cast<Activation>(activation);
  first.out = memory.middle;
  const Kernels& isa = kernels();
  for_tiles(weights.first_panel[1], 2 * depth * kPanel, rows, threads,
            [&](int64_t begin, int64_t end, int64_t row, int64_t some, int thread) {
              isa.gated_linear(first, begin, end, row, some,
                               memory.of_thread + thread * memory.per_thread);
            });
  Linear second = {};
  second.rows = rows;
  second.x = memory.middle;
  second.x_row = width;
  second.weights = down.weights();
  second.bias = reinterpret_cast<const float*>(down_bias);
  second.out = reinterpret_cast<float*>(out);
  second.add = true;
  run_linear(second, memory, threads);
}

void qkv(py::handle x, py::tuple sizes, const PackedLinear& layer, py::handle norm, int64_t bias,
         py::handle query, py::handle key, py::handle value, py::handle q_norm, py::handle k_norm,
         int64_t cos, int64_t sin, int64_t rotation_batch, int64_t rotated, bool interleaved,
         int threads) {
  int64_t batch, queries;
  QkvLinear op = {};
  int64_t* const size[] = {&batch, &queries, &op.q_heads, &op.kv_heads};
  read_sizes(sizes, size);
  const Tensor from = as_tensor("x", x, 2);
  const Norm before = as_norm(norm);
  op.queries = queries;
  op.query = as_tensor("query", query, 4);
  op.key = as_tensor("key", key, 4);
  op.value = as_tensor("value", value, 4);
  op.q_norm = as_norm(q_norm);
  op.k_norm = as_norm(k_norm);
  op.cos = reinterpret_cast<const float*>(cos);
  op.sin = reinterpret_cast<const float*>(sin);
  op.rotation_batch = rotation_batch;
  op.rotated = rotated;
  op.interleaved = interleaved;
  Linear& product = op.linear;
  product.rows = batch * queries;
  product.weights = layer.weights();
  product.bias = reinterpret_cast<const float*>(bias);
  const int64_t heads = op.q_heads + 2 * op.kv_heads, depth = layer.in_features();
  SOFTPROMPT_FAST_CHECK(product.weights.sections == heads, "layer: expected a section for each of ",
                        heads, " heads, found ", product.weights.sections);
  int64_t widest = 0;
  for (int64_t head = 0; head < heads; ++head) {
    const int64_t panels =
        product.weights.first_panel[head + 1] - product.weights.first_panel[head];
    if (panels > widest) widest = panels;
  }
  py::gil_scoped_release release;
  const int64_t scratch = kRowBlock * widest * kPanel;
  const Memory memory(product.rows * depth, 0,
                      scratch > thread_scratch(depth) ? scratch : thread_scratch(depth), threads);
  norm_into(from, product.rows, depth, before, memory.normed, memory, threads);
  product.x = memory.normed;
  product.x_row = depth;
  const Kernels& isa = kernels();
  for_tiles(heads, depth * widest * kPanel, product.rows, threads,
            [&](int64_t first, int64_t last, int64_t row, int64_t rows, int thread) {
              for (int64_t head = first; head < last; ++head) {
                isa.qkv_linear(op, head, row, rows, memory.of_thread + thread * memory.per_thread);
              }
            });
}

}  // namespace

void bind_linear(py::module_& module) {
  py::class_<PackedLinear>(module, "PackedLinear")
      .def(py::init<const py::sequence&, int64_t, int>())
      .def_property_readonly("nbytes", &PackedLinear::bytes)
      .def_property_readonly("in_features", &PackedLinear::in_features)
      .def_property_readonly("out_features", &PackedLinear::out_features);
  module.def("norm_rows", [](py::handle x, int64_t rows, int64_t columns, py::handle norm,
                             int64_t out, int threads) {
    const Tensor from = as_tensor("x", x, 2);
    const Norm before = as_norm(norm);
    py::gil_scoped_release release;
    const Memory memory(0, 0, columns + kPanel, threads);
    norm_into(from, rows, columns, before, reinterpret_cast<float*>(out), memory, threads);
  });
  module.def("linear", &linear);
  module.def("gated_mlp", &gated_mlp);
  module.def("qkv", &qkv);
}

}  // namespace softprompt_fast
