// SPDX-License-Identifier: Apache-2.0
// The op softprompt_fast::prefix_attention_cuda: a decode step.
#include <pybind11/stl.h>

#include <map>
#include <mutex>
#include <tuple>
#include <vector>

#include "../prefix_attention_arguments.h"
#include "binding.h"

namespace softprompt_fast {
namespace cuda {
namespace {

using abi::as_tensor;

// Throws std::invalid_argument for sizes that no kernel takes.
void check_sizes(const DecodeSizes& s, int64_t head_dim, int64_t v_dim, int device) {
  SOFTPROMPT_FAST_CHECK(
      head_dim > 0 && head_dim <= kMostHeadDim && v_dim > 0 && v_dim <= kMostHeadDim,
      "query, value: expected heads of 1..", kMostHeadDim, ", found ", head_dim, " and ", v_dim);
  for (int64_t size : {s.batch * s.q_heads * s.queries, s.own, s.packed}) {
    SOFTPROMPT_FAST_CHECK(size <= 1 << 29, "expected at most 2^29 queries and keys, found ", size);
  }
  const int64_t there = shared_of_device(device);
  const int64_t needed = shared_of_prefix_attention((int)head_dim, (int)v_dim);
  SOFTPROMPT_FAST_CHECK(needed <= there, "expected ", needed,
                        " bytes of shared memory a block, found ", there);
}

DecodeSizes sizes_of(const PrefixAttentionCall& call) {
  DecodeSizes s = {};
  s.batch = call.batch;
  s.q_heads = call.q_heads;
  s.kv_heads = call.kv_heads;
  s.queries = call.queries;
  s.own = call.own;
  s.packed = call.packed;
  s.prefixes = call.offsets ? call.offsets.size - 1 : 1;
  s.longest = call.longest;
  s.offsets = (bool)call.offsets;
  s.indexed = (bool)call.index;
  s.widened = call.quantized();
  return s;
}

int64_t floats_of(const DecodePlan& plan, int64_t head_dim, int64_t v_dim) {
  return plan.states() * (padded_head_dim(most(head_dim, v_dim)) + 1);
}

// Whether 16 bytes along the last dimension can be copied at once, wherever they begin.
bool in_chunks(const Tensor& tensor, int64_t dimensions, int64_t size) {
  const int64_t chunk = 16 / size_of(tensor.dtype);
  bool fits =
      (uintptr_t)tensor.data % 16 == 0 && tensor.stride[dimensions - 1] == 1 && size % chunk == 0;
  for (int64_t i = 0; i + 1 < dimensions; ++i) fits = fits && tensor.stride[i] % chunk == 0;
  return fits;
}

// Counters for the calls of one stream, all 0, and left so by every call: two streams may run at
// once, so each has its own. A capture has others than the stream that it captures, cleared by the
// graph itself, once: a graph may be replayed on any stream, and beside eager calls.
struct Counters {
  uint64_t capture = 0;
  int64_t count = 0;
  unsigned* data = nullptr;
};
std::mutex counters_mutex;
std::map<std::tuple<int, void*, bool>, Counters>
    counters;  // by device, stream, whether it captures

unsigned* counters_of(const Queue& queue, int64_t count) {
  const uint64_t capture = capture_of(queue);
  const std::lock_guard<std::mutex> lock(counters_mutex);
  Counters& found = counters[{queue.device, queue.stream, capture != 0}];
  if (found.data == nullptr || found.capture != capture || found.count < count) {
    const int64_t enough = most(count, 1024);
    found = {capture, enough, new_counters(enough, queue)};
  }
  return found.data;
}

thread_local int64_t last_workspace = 0;  // floats, for tests

void run(const PrefixAttentionCall& call, const abi::View& out, const abi::View& lse) {
  SOFTPROMPT_FAST_CHECK(!call.bias, "bias: expected none, found ", call.bias.describe());
  SOFTPROMPT_FAST_CHECK(out.has_shape({call.batch, call.q_heads, call.queries, call.v_dim}) &&
                            lse.has_shape({call.batch, call.q_heads, call.queries}) &&
                            out.dtype == call.query.dtype && out.beside(call.query) &&
                            lse.dtype == abi::torch_dtype(DType::kFloat32) && lse.is_dense() &&
                            lse.beside(call.query),
                        "out, lse: do not fit the others, found ", out.describe(), " and ",
                        lse.describe());
  if (kEmulated) call.check_values();
  const Queue queue = queue_of(call.query);
  const DecodeSizes s = sizes_of(call);
  check_sizes(s, call.head_dim, call.v_dim, queue.device);
  PrefixAttentionDecode op = {};
  op.query = as_tensor("query", call.query);
  const DType dtype = op.query.dtype;
  SOFTPROMPT_FAST_CHECK(dtype == DType::kBFloat16 || dtype == DType::kFloat16,
                        "query: expected bfloat16 or float16, found ", call.query.describe());
  op.key = as_tensor("key", call.key);
  op.value = as_tensor("value", call.value);
  op.prefix_key = as_tensor("prefix_key", call.prefix_key);
  op.prefix_value = as_tensor("prefix_value", call.prefix_value);
  SOFTPROMPT_FAST_CHECK(!call.quantized() || size_of(op.prefix_key.dtype) == 1,
                        "prefix_key: expected 8 bits beside scales, found ",
                        call.prefix_key.describe());
  op.out = as_tensor("out", out);
  SOFTPROMPT_FAST_CHECK(op.out.stride[3] == 1, "out: expected dense features, found a stride of ",
                        op.out.stride[3]);
  op.lse = static_cast<float*>(lse.data);
  op.sinks = as_tensor("sinks", call.sinks);
  SOFTPROMPT_FAST_CHECK(op.sinks.dtype < DType::kInt8, "sinks: no kernel reads ",
                        call.sinks.describe());
  op.scale_block = 1;
  if (call.quantized()) {
    op.prefix_key_scale = as_tensor("prefix_key_scale", call.key_scale);
    op.prefix_value_scale = as_tensor("prefix_value_scale", call.value_scale);
    op.scale_block = static_cast<int>(least(call.scale_block, INT32_MAX));
  }
  op.rows = {call.offsets, call.index, call.own_start, call.own_end, call.query_start};
  op.head_dim = (int)call.head_dim;
  op.v_dim = (int)call.v_dim;
  op.vector_query = in_chunks(op.query, 4, op.head_dim);
  op.vector_own = in_chunks(op.key, 4, op.head_dim) && in_chunks(op.value, 4, op.v_dim);
  op.vector_prefix =
      in_chunks(op.prefix_key, 3, op.head_dim) && in_chunks(op.prefix_value, 3, op.v_dim);
  op.scale = static_cast<float>(call.scale);
  op.softcap = static_cast<float>(call.softcap);
  op.causal = call.causal;
  op.window = static_cast<int>(least(call.window, 2 * kFarthest));
  if (lse.numel() == 0) return;

  op.plan = plan_prefix_attention(s, op.head_dim, op.v_dim, queue.device);
  // PyTorch's allocator keeps it for what the stream does next, the kernel first.
  const int64_t floats = floats_of(op.plan, op.head_dim, op.v_dim);
  const abi::NewTensor workspace(call.query, abi::torch_dtype(DType::kFloat32), {floats}, {1});
  last_workspace = floats;
  op.states = static_cast<float*>(workspace.view().data);
  op.state_lse = op.states + floats - op.plan.states();
  op.counters = counters_of(queue, op.plan.units());
  run_prefix_attention(op, queue);
}

void forward(abi::Value* stack, uint64_t inputs) {
  const abi::Arguments given(PrefixAttentionCall::kKinds, stack, inputs);
  const PrefixAttentionCall call(given);
  // As heuristics.stack_queries has it: prefill is Triton's.
  SOFTPROMPT_FAST_CHECK(call.queries <= 1 || call.queries * (call.q_heads / call.kv_heads) <= 64,
                        "query: expected few queries a row, found ", call.query.describe());
  PrefixAttentionResults results(call);
  run(call, results.out.view(), results.lse.view());
  stack[0] = results.out.release();
  stack[1] = results.lse.release();
}

void forward_out(abi::Value* stack, uint64_t inputs) {
  static const std::string kinds = std::string(PrefixAttentionCall::kKinds) + "RR";
  constexpr int kOut = PrefixAttentionCall::kCount;
  const abi::Arguments given(kinds.c_str(), stack, inputs);
  run(PrefixAttentionCall(given), given.tensor(kOut), given.tensor(kOut + 1));
  stack[0] = 1;
}

}  // namespace

void implement_prefix_attention() {
  abi::implement("prefix_attention_cuda", dispatch_key(), &abi::boxed<forward>);
  abi::implement("prefix_attention_cuda.out", dispatch_key(), &abi::boxed<forward_out>);
}

void bind_prefix_attention(pybind11::module_& module) {
  module.def(
      "counters",
      [] {
        const std::lock_guard<std::mutex> lock(counters_mutex);
        std::vector<std::pair<int64_t, int64_t>> found;
        for (const auto& [queue, one] : counters) {
          found.emplace_back(reinterpret_cast<int64_t>(one.data), one.count);
        }
        return found;
      },
      "Address and number of the counters of every stream so far, which calls leave at 0.");
  module.def(
      "prefix_attention_workspace",
      [](const pybind11::tuple& given, bool offsets, bool indexed, int device) {
        DecodeSizes s = {};
        int64_t head_dim = 0, v_dim = 0;
        int64_t* const sizes[] = {&s.batch,  &s.q_heads, &s.kv_heads, &s.queries,  &s.own,
                                  &s.packed, &head_dim,  &v_dim,      &s.prefixes, &s.longest};
        read_sizes(given, sizes);
        SOFTPROMPT_FAST_CHECK(s.batch > 0 && s.queries > 0 && s.kv_heads > 0 && s.q_heads > 0 &&
                                  s.q_heads % s.kv_heads == 0,
                              "sizes: expected rows, queries, and q_heads a multiple of kv_heads");
        s.offsets = offsets;
        s.indexed = indexed;
        check_sizes(s, head_dim, v_dim, device);
        return floats_of(plan_prefix_attention(s, (int)head_dim, (int)v_dim, device), head_dim,
                         v_dim);
      },
      "Floats of the workspace of a call of (B, Hq, Hkv, S, T, L, D, Dv, N, longest prefix).");
  module.def(
      "last_workspace", [] { return last_workspace; },
      "Floats of the workspace of this thread's last call.");
  module.def("shared_of_device", &shared_of_device,
             "Bytes of shared memory that a block may have on a device.");
  module.def("shared_of_prefix_attention", &shared_of_prefix_attention,
             "Bytes of shared memory that a block of prefix_attention takes.");
}

}  // namespace cuda
}  // namespace softprompt_fast
