// SPDX-License-Identifier: Apache-2.0
#include "binding.h"

namespace softprompt_fast {
namespace cuda {
namespace {

namespace py = pybind11;

struct Call {
  DecodeSizes sizes = {};
  int64_t head_dim = 0, v_dim = 0;
};

// (B, Hq, Hkv, S, T, L, D, Dv, N, longest prefix), and whether prefix_offsets and prefix_index were
// given.
Call read_call(const py::tuple& given, bool offsets, bool indexed) {
  Call call;
  DecodeSizes& s = call.sizes;
  int64_t* const sizes[] = {&s.batch,  &s.q_heads,     &s.kv_heads, &s.queries,  &s.own,
                            &s.packed, &call.head_dim, &call.v_dim, &s.prefixes, &s.longest};
  read_sizes(given, sizes);
  SOFTPROMPT_FAST_CHECK(s.batch > 0 && s.queries > 0 && s.kv_heads > 0 && s.q_heads > 0 &&
                            s.q_heads % s.kv_heads == 0,
                        "sizes: expected rows, queries, and q_heads a multiple of kv_heads, found ",
                        s.batch, ", ", s.queries, ", ", s.q_heads, ", ", s.kv_heads);
  SOFTPROMPT_FAST_CHECK(call.head_dim > 0 && call.head_dim <= kMostHeadDim && call.v_dim > 0 &&
                            call.v_dim <= kMostHeadDim,
                        "sizes: expected heads of 1..", kMostHeadDim, ", found ", call.head_dim,
                        " and ", call.v_dim);
  for (int64_t size : {s.batch * s.q_heads * s.queries, s.own, s.packed}) {
    SOFTPROMPT_FAST_CHECK(size <= 1 << 29, "sizes: expected at most 2^29 queries and keys, found ",
                          size);
  }
  s.offsets = offsets;
  s.indexed = indexed;
  return call;
}

// Whether 16 bytes along the last dimension can be copied at once, wherever they begin.
bool in_chunks(const Tensor& tensor, int64_t dimensions, int64_t size) {
  const int64_t chunk = 16 / size_of(tensor.dtype);
  bool fits =
      (uintptr_t)tensor.data % 16 == 0 && tensor.stride[dimensions - 1] == 1 && size % chunk == 0;
  for (int64_t i = 0; i + 1 < dimensions; ++i) fits = fits && tensor.stride[i] % chunk == 0;
  return fits;
}

void prefix_attention(const py::tuple& sizes, py::handle query, py::handle key, py::handle value,
                      py::handle prefix_key, py::handle prefix_value, py::handle out, int64_t lse,
                      const py::tuple& rows, double scale, bool causal, int64_t window,
                      double softcap, py::handle sinks, py::handle scales, int64_t workspace,
                      int64_t counters, py::handle queue_) {
  SOFTPROMPT_FAST_CHECK(rows.size() == 5, "rows: expected 5 index tensors, found ", rows.size());
  const Queue queue = as_queue(queue_);
  PrefixAttentionDecode op = {};
  op.rows = {as_index("prefix_offsets", rows[0]), as_index("prefix_index", rows[1]),
             as_index("own_start", rows[2]), as_index("own_end", rows[3]),
             as_index("query_start", rows[4])};
  const Call call = read_call(sizes, (bool)op.rows.prefix_offsets, (bool)op.rows.prefix_index);
  const DecodeSizes& s = call.sizes;
  SOFTPROMPT_FAST_CHECK(!op.rows.prefix_offsets || op.rows.prefix_offsets.size == s.prefixes + 1,
                        "prefix_offsets: expected ", s.prefixes + 1, " numbers, found ",
                        op.rows.prefix_offsets.size);
  for (const Index& index :
       {op.rows.prefix_index, op.rows.own_start, op.rows.own_end, op.rows.query_start}) {
    SOFTPROMPT_FAST_CHECK(!index || index.size == s.batch, "rows: expected ", s.batch,
                          " numbers, found ", index.size);
  }
  op.plan = plan_prefix_attention(s, (int)call.head_dim, (int)call.v_dim, queue.device);
  op.head_dim = (int)call.head_dim;
  op.v_dim = (int)call.v_dim;

  op.query = as_tensor("query", query, 4, true);
  const DType dtype = op.query.dtype;
  SOFTPROMPT_FAST_CHECK(dtype == DType::kBFloat16 || dtype == DType::kFloat16,
                        "query: expected dtype code 1 or 2, found ", static_cast<int>(dtype));
  op.key = as_tensor("key", key, 4, s.own > 0);
  op.value = as_tensor("value", value, 4, s.own > 0);
  op.prefix_key = as_tensor("prefix_key", prefix_key, 3, s.packed > 0, kFloat8);
  op.prefix_value = as_tensor("prefix_value", prefix_value, 3, s.packed > 0, kFloat8);
  op.out = as_tensor("out", out, 4, true);
  op.lse = reinterpret_cast<float*>(lse);
  op.sinks = as_tensor("sinks", sinks, 1);
  const DType stored = scales.is_none() ? dtype : op.prefix_key.dtype;
  SOFTPROMPT_FAST_CHECK(scales.is_none() || size_of(stored) == 1,
                        "prefix_key: expected dtype code 3 or 4 beside scales, found ",
                        static_cast<int>(stored));
  check_dtype("key", op.key, dtype);
  check_dtype("value", op.value, dtype);
  check_dtype("out", op.out, dtype);
  check_dtype("prefix_key", op.prefix_key, stored);
  check_dtype("prefix_value", op.prefix_value, stored);
  check_floating("sinks", op.sinks);
  op.prefix_key.dtype = stored;  // of no memory too: it chooses the kernel
  SOFTPROMPT_FAST_CHECK(op.out.stride[3] == 1, "out: expected dense features, found a stride of ",
                        op.out.stride[3]);
  op.scale_block = 1;
  if (!scales.is_none()) {
    PyObject* given = as_tuple("scales", scales, 3, "two tensors and a block");
    op.prefix_key_scale =
        as_tensor("prefix_key_scale", PyTuple_GET_ITEM(given, 0), 2, s.packed > 0);
    op.prefix_value_scale =
        as_tensor("prefix_value_scale", PyTuple_GET_ITEM(given, 1), 2, s.packed > 0);
    check_dtype("prefix_key_scale", op.prefix_key_scale, DType::kFloat32);
    check_dtype("prefix_value_scale", op.prefix_value_scale, DType::kFloat32);
    const int64_t block = as_number("scales", PyTuple_GET_ITEM(given, 2));
    SOFTPROMPT_FAST_CHECK(block > 0, "scales: expected a block > 0, found ", block);
    op.scale_block = static_cast<int>(least(block, INT32_MAX));
  }
  op.vector_query = in_chunks(op.query, 4, op.head_dim);
  op.vector_own = in_chunks(op.key, 4, op.head_dim) && in_chunks(op.value, 4, op.v_dim);
  op.vector_prefix =
      in_chunks(op.prefix_key, 3, op.head_dim) && in_chunks(op.prefix_value, 3, op.v_dim);

  op.scale = static_cast<float>(scale);
  op.softcap = static_cast<float>(softcap);
  op.causal = causal;
  SOFTPROMPT_FAST_CHECK(window >= 0, "window: expected 0 (none) or more, found ", window);
  op.window = static_cast<int>(least(window, 2 * kFarthest));
  op.states = reinterpret_cast<float*>(workspace);
  op.state_lse = op.states + op.plan.states() * padded_head_dim(most(op.head_dim, op.v_dim));
  op.counters = reinterpret_cast<unsigned*>(counters);
  SOFTPROMPT_FAST_CHECK(workspace && counters && workspace % 16 == 0 && op.lse,
                        "workspace: expected memory at multiples of 16 bytes, found ", workspace);
  run_prefix_attention(op, queue);
}

}  // namespace

void bind_prefix_attention(py::module_& module) {
  module.def("prefix_attention", &prefix_attention);
  module.def(
      "prefix_attention_workspace",
      [](const py::tuple& sizes, bool offsets, bool indexed, int device) {
        const Call call = read_call(sizes, offsets, indexed);
        const DecodePlan plan =
            plan_prefix_attention(call.sizes, (int)call.head_dim, (int)call.v_dim, device);
        return std::make_pair(
            plan.states() * (padded_head_dim(most(call.head_dim, call.v_dim)) + 1), plan.units());
      },
      "Floats of the workspace that a call needs, and counters, which have to be 0.");
  module.def("shared_of_device", &shared_of_device,
             "Bytes of shared memory that a block may have on a device.");
  module.def("shared_of_prefix_attention", &shared_of_prefix_attention,
             "Bytes of shared memory that a block of prefix_attention takes.");
  module.def(
      "capture", [](py::handle queue) { return capture_of(as_queue(queue)); },
      "A number for the capture that a stream takes part in; 0: none.");
  module.def(
      "counters",
      [](int64_t count, py::handle queue) {
        SOFTPROMPT_FAST_CHECK(count > 0 && count <= 1 << 29, "counters: expected 1..2^29, found ",
                              count);
        return reinterpret_cast<int64_t>(new_counters(count, as_queue(queue)));
      },
      "The address of new counters, which the stream clears next and nobody frees.");
}

}  // namespace cuda
}  // namespace softprompt_fast
