// SPDX-License-Identifier: Apache-2.0
#include "binding.h"
#include "dispatch.h"
#include "prefix_attention_backward.h"

namespace softprompt_fast {
namespace {

namespace py = pybind11;

// What forward and backward have in common.
PrefixAttention read_call(py::handle query, py::handle key, py::handle value, py::handle prefix_key,
                          py::handle prefix_value, py::handle out, int64_t lse,
                          const py::tuple& sizes, double scale, bool causal, int64_t window,
                          double softcap, int64_t sinks, py::handle bias, int64_t bias_columns,
                          bool quantized) {
  PrefixAttention op = {};
  int64_t* const size[] = {&op.batch, &op.q_heads, &op.kv_heads, &op.queries,
                           &op.own,   &op.packed,  &op.head_dim, &op.v_dim};
  read_sizes(sizes, size);
  SOFTPROMPT_FAST_CHECK(
      op.kv_heads > 0 && op.q_heads % op.kv_heads == 0 && op.head_dim > 0,
      "sizes: expected q_heads a multiple of kv_heads > 0, and head_dim > 0, found ", op.q_heads,
      ", ", op.kv_heads, ", ", op.head_dim);
  op.groups = op.q_heads / op.kv_heads;
  const bool queries = op.batch > 0 && op.q_heads > 0 && op.queries > 0;
  const bool own = queries && op.own > 0, packed = queries && op.packed > 0, v = op.v_dim > 0;
  op.query = as_tensor("query", query, 4, queries);
  op.key = as_tensor("key", key, 4, own);
  op.value = as_tensor("value", value, 4, own && v);
  op.prefix_key = as_tensor("prefix_key", prefix_key, 3, packed);
  op.prefix_value = as_tensor("prefix_value", prefix_value, 3, packed && v);
  op.out = as_tensor("out", out, 4, queries && v);
  op.lse = reinterpret_cast<float*>(lse);
  SOFTPROMPT_FAST_CHECK(op.lse != nullptr || !queries,
                        "lse: expected memory, found a null pointer");
  op.scale = static_cast<float>(scale);
  op.causal = causal;
  op.window = window > kFar ? kFar : window;
  SOFTPROMPT_FAST_CHECK(window >= 0, "window: expected 0 (none) or more, found ", window);
  op.softcap = static_cast<float>(softcap);
  op.sinks = reinterpret_cast<const float*>(sinks);
  op.bias = as_tensor("bias", bias, 4, !bias.is_none() && (own || packed));
  op.bias_columns = bias_columns;
  op.scale_block = 1;
  const DType dtype = op.query.dtype;
  check_floating("query", op.query);
  check_floating("bias", op.bias);
  check_dtype("key", op.key, dtype);
  check_dtype("value", op.value, dtype);
  check_dtype("out", op.out, dtype);
  check_dtype("prefix_key", op.prefix_key, quantized ? DType::kInt8 : dtype);
  check_dtype("prefix_value", op.prefix_value, quantized ? DType::kInt8 : dtype);
  return op;
}

PrefixAttentionRows read_rows(const PrefixAttention& op, const py::tuple& rows) {
  SOFTPROMPT_FAST_CHECK(rows.size() == 5, "rows: expected 5 index tensors, found ", rows.size());
  const PrefixAttentionRows indexes = {as_index("prefix_offsets", rows[0]),
                                       as_index("prefix_index", rows[1]),
                                       as_index("own_start", rows[2]), as_index("own_end", rows[3]),
                                       as_index("query_start", rows[4])};
  check_rows(op, indexes);
  return indexes;
}

void prefix_attention(py::handle query, py::handle key, py::handle value, py::handle prefix_key,
                      py::handle prefix_value, py::handle out, int64_t lse, py::tuple sizes,
                      py::tuple rows, double scale, bool causal, int64_t window, double softcap,
                      int64_t sinks, py::handle bias, int64_t bias_columns, py::handle scales,
                      int threads) {
  PrefixAttention op =
      read_call(query, key, value, prefix_key, prefix_value, out, lse, sizes, scale, causal, window,
                softcap, sinks, bias, bias_columns, !scales.is_none());
  if (!scales.is_none()) {
    PyObject* given = as_tuple("scales", scales, 4, "two pointers, a stride and a block");
    const auto number = [&](int i) { return as_number("scales", PyTuple_GET_ITEM(given, i)); };
    op.prefix_key_scale = reinterpret_cast<const float*>(number(0));
    op.prefix_value_scale = reinterpret_cast<const float*>(number(1));
    op.scale_stride = number(2);
    op.scale_block = number(3);
    SOFTPROMPT_FAST_CHECK((op.prefix_key_scale && op.prefix_value_scale) || op.packed == 0,
                          "scales: expected memory of both, found a null pointer");
    SOFTPROMPT_FAST_CHECK(op.scale_stride >= 0 && op.scale_block > 0,
                          "scales: expected a stride >= 0 and a block > 0, found ", op.scale_stride,
                          " and ", op.scale_block);
  }
  check_threads(threads);
  const PrefixAttentionRows indexes = read_rows(op, rows);
  py::gil_scoped_release release;
  run_prefix_attention(op, indexes, threads);
}

void prefix_attention_backward(py::handle query, py::handle key, py::handle value,
                               py::handle prefix_key, py::handle prefix_value, py::handle out,
                               int64_t lse, py::tuple sizes, py::tuple rows, double scale,
                               bool causal, int64_t window, double softcap, int64_t sinks,
                               py::handle bias, int64_t bias_columns, py::handle grad_out,
                               int64_t grad_lse, py::tuple grads, int64_t delta, int threads) {
  PrefixAttentionBackward op = {};
  op.forward = read_call(query, key, value, prefix_key, prefix_value, out, lse, sizes, scale,
                         causal, window, softcap, sinks, bias, bias_columns, false);
  const PrefixAttention& f = op.forward;
  const bool queries = f.batch > 0 && f.q_heads > 0 && f.queries > 0;
  const bool own = queries && f.own > 0, packed = queries && f.packed > 0, v = f.v_dim > 0;
  op.grad_out = as_tensor("grad_out", grad_out, 4, queries && v);
  check_threads(threads);
  op.grad_lse = reinterpret_cast<const float*>(grad_lse);
  SOFTPROMPT_FAST_CHECK(grads.size() == 5, "grads: expected 5 tensors, found ", grads.size());
  op.grad_query = as_tensor("grad_query", grads[0], 4, queries);
  op.grad_key = as_tensor("grad_key", grads[1], 4, own);
  op.grad_value = as_tensor("grad_value", grads[2], 4, own && v);
  op.grad_prefix_key = as_tensor("grad_prefix_key", grads[3], 3, packed);
  op.grad_prefix_value = as_tensor("grad_prefix_value", grads[4], 3, packed && v);
  check_dtype("grad_out", op.grad_out, f.query.dtype);
  check_dtype("grad_query", op.grad_query, f.query.dtype);
  check_dtype("grad_key", op.grad_key, f.query.dtype);
  check_dtype("grad_value", op.grad_value, f.query.dtype);
  check_dtype("grad_prefix_key", op.grad_prefix_key, f.query.dtype);
  check_dtype("grad_prefix_value", op.grad_prefix_value, f.query.dtype);
  op.delta = reinterpret_cast<float*>(delta);
  const PrefixAttentionRows indexes = read_rows(op.forward, rows);
  py::gil_scoped_release release;
  run_prefix_attention_backward(op, indexes, threads);
}

}  // namespace

void bind_prefix_attention(py::module_& module) {
  module.def("prefix_attention", &prefix_attention);
  module.def("prefix_attention_backward", &prefix_attention_backward);
  module.def(
      "plan_prefix_attention",
      [](int64_t stacked, int64_t per_row, int64_t kv_heads, int64_t keys, int threads) {
        SOFTPROMPT_FAST_CHECK(
            stacked > 0 && per_row > 0 && kv_heads > 0 && keys >= 0,
            "sizes: expected stacked, per_row, kv_heads > 0 and keys >= 0, found ", stacked, ", ",
            per_row, ", ", kv_heads, ", ", keys);
        check_threads(threads);
        const auto plan = plan_prefix_attention(stacked, per_row, kv_heads, keys, threads);
        return std::make_pair(plan.block_size, plan.splits);
      },
      "Queries a block and runs of keys; see prefix_attention.h.");
  module.def(
      "plan_prefix_attention_backward",
      [](int64_t batch, int64_t per_row, int64_t kv_heads, int threads) {
        SOFTPROMPT_FAST_CHECK(batch > 0 && per_row > 0 && kv_heads > 0,
                              "sizes: expected batch, per_row, kv_heads > 0, found ", batch, ", ",
                              per_row, ", ", kv_heads);
        check_threads(threads);
        const auto plan = plan_prefix_attention_backward(batch, per_row, kv_heads, threads);
        return std::make_tuple(plan.block_size, plan.chunk_rows, plan.row_blocks);
      },
      "Queries a block, rows a chunk and blocks a chunk; see prefix_attention_backward.h.");
}

}  // namespace softprompt_fast
