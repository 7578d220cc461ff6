// SPDX-License-Identifier: Apache-2.0
// The ops softprompt_fast::prefix_attention_cpu and softprompt_fast::prefix_attention_backward_cpu,
// and what tests ask of their plans.
#include "../prefix_attention_arguments.h"
#include "binding.h"
#include "dispatch.h"
#include "prefix_attention_backward.h"

namespace softprompt_fast {
namespace {

using abi::as_tensor;

// What forward and backward have in common. `out` and `lse` are the caller's to set.
PrefixAttention read_op(const PrefixAttentionCall& call) {
  SOFTPROMPT_FAST_CHECK(call.query.is_cpu(), "query: expected a tensor on the CPU, found ",
                        call.query.describe());
  PrefixAttention op = {};
  op.batch = call.batch;
  op.q_heads = call.q_heads;
  op.kv_heads = call.kv_heads;
  op.groups = call.q_heads / call.kv_heads;
  op.queries = call.queries;
  op.own = call.own;
  op.packed = call.packed;
  op.head_dim = call.head_dim;
  op.v_dim = call.v_dim;
  op.query = as_tensor("query", call.query);
  op.key = as_tensor("key", call.key);
  op.value = as_tensor("value", call.value);
  op.prefix_key = as_tensor("prefix_key", call.prefix_key);
  op.prefix_value = as_tensor("prefix_value", call.prefix_value);
  SOFTPROMPT_FAST_CHECK(op.query.dtype < DType::kInt8, "query: no kernel reads ",
                        call.query.describe());
  SOFTPROMPT_FAST_CHECK(op.prefix_key.dtype == (call.quantized() ? DType::kInt8 : op.query.dtype),
                        "prefix_key: expected int8 beside scales, found ",
                        call.prefix_key.describe());
  op.scale = static_cast<float>(call.scale);
  op.softcap = static_cast<float>(call.softcap);
  op.causal = call.causal;
  op.window = call.window > kFar ? kFar : call.window;
  if (call.bias) {
    op.bias = as_tensor("bias", call.bias);
    SOFTPROMPT_FAST_CHECK(op.bias.dtype < DType::kInt8, "bias: no kernel reads ",
                          call.bias.describe());
    for (int i = 0; i < 3; ++i) {
      if (call.bias.size[i] == 1) op.bias.stride[i] = 0;
    }
    op.bias_columns = call.bias.size[3] - call.own;
  }
  op.scale_block = 1;
  return op;
}

PrefixAttentionRows rows_of(const PrefixAttentionCall& call) {
  call.check_values();
  return {call.offsets, call.index, call.own_start, call.own_end, call.query_start};
}

float* dense_floats(const char* name, const abi::View& view) {
  SOFTPROMPT_FAST_CHECK(
      view.dtype == abi::torch_dtype(DType::kFloat32) && view.is_dense() && view.is_cpu(), name,
      ": expected dense float32, found ", view.describe());
  return static_cast<float*>(view.data);
}

// A result, or what stands for one in the gradient.
Tensor as_result(const char* name, const abi::View& view, std::initializer_list<int64_t> shape,
                 DType dtype) {
  SOFTPROMPT_FAST_CHECK(view.has_shape(shape) && view.is_cpu(), name,
                        ": does not fit the others, found ", view.describe());
  const Tensor tensor = as_tensor(name, view);
  SOFTPROMPT_FAST_CHECK(tensor.dtype == dtype, name, ": expected the dtype of query, found ",
                        view.describe());
  return tensor;
}

void read_results(PrefixAttention& op, const abi::View& out, const abi::View& lse) {
  op.out = as_result("out", out, {op.batch, op.q_heads, op.queries, op.v_dim}, op.query.dtype);
  as_result("lse", lse, {op.batch, op.q_heads, op.queries}, DType::kFloat32);
  op.lse = dense_floats("lse", lse);
}

void run(const PrefixAttentionCall& call, const abi::View& out, const abi::View& lse) {
  PrefixAttention op = read_op(call);
  if (call.sinks) op.sinks = dense_floats("sinks", call.sinks);
  if (call.quantized()) {
    op.prefix_key_scale = dense_floats("prefix_key_scale", call.key_scale);
    op.prefix_value_scale = dense_floats("prefix_value_scale", call.value_scale);
    op.scale_stride = call.key_scale.size[1];
    op.scale_block = call.scale_block;
  }
  read_results(op, out, lse);
  run_prefix_attention(op, rows_of(call), abi::threads());
}

// Arguments: grad_out, grad_lse, those of forward with its results, then the gradients of query,
// key, value, prefix_key and prefix_value (the last two zeros), and delta, which may be left out.
void backward(abi::Value* stack, uint64_t inputs) {
  static const std::string kinds = std::string("T?T") + PrefixAttentionCall::kKinds + "TTRRRRR?R";
  constexpr int kFirst = 2, kOut = kFirst + PrefixAttentionCall::kCount, kGrads = kOut + 2;
  const abi::Arguments given(kinds.c_str(), stack, inputs);
  const PrefixAttentionCall call(given, kFirst);
  SOFTPROMPT_FAST_CHECK(!call.quantized() && !call.sinks,
                        "prefix: expected no 8-bit numbers, and no sinks beside lse");
  PrefixAttentionBackward op = {};
  PrefixAttention& f = op.forward;
  f = read_op(call);
  read_results(f, given.tensor(kOut), given.tensor(kOut + 1));
  const std::initializer_list<int64_t> queries = {f.batch, f.q_heads, f.queries};
  const DType dtype = f.query.dtype;
  op.grad_out =
      as_result("grad_out", given.tensor(0), {f.batch, f.q_heads, f.queries, f.v_dim}, dtype);
  if (const abi::View grad_lse = given.tensor(1)) {
    as_result("grad_lse", grad_lse, queries, DType::kFloat32);
    op.grad_lse = dense_floats("grad_lse", grad_lse);
  }
  const auto grad = [&](int i, const char* name, std::initializer_list<int64_t> shape) {
    return as_result(name, given.tensor(kGrads + i), shape, dtype);
  };
  op.grad_query = grad(0, "grad_query", {f.batch, f.q_heads, f.queries, f.head_dim});
  op.grad_key = grad(1, "grad_key", {f.batch, f.kv_heads, f.own, f.head_dim});
  op.grad_value = grad(2, "grad_value", {f.batch, f.kv_heads, f.own, f.v_dim});
  op.grad_prefix_key = grad(3, "grad_prefix_key", {f.kv_heads, f.packed, f.head_dim});
  op.grad_prefix_value = grad(4, "grad_prefix_value", {f.kv_heads, f.packed, f.v_dim});
  if (const abi::View delta = given.tensor(kGrads + 5)) {
    as_result("delta", delta, queries, DType::kFloat32);
    op.delta = dense_floats("delta", delta);
  }
  run_prefix_attention_backward(op, rows_of(call), abi::threads());
  stack[0] = 1;
}

}  // namespace

void implement_prefix_attention() {
  abi::implement("prefix_attention_cpu", "CPU", &abi::boxed<prefix_attention<run>>);
  abi::implement("prefix_attention_cpu.out", "CPU", &abi::boxed<prefix_attention_out<run>>);
  abi::implement("prefix_attention_backward_cpu", "CPU", &abi::boxed<backward>);
}

void bind_prefix_attention(pybind11::module_& module) {
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
