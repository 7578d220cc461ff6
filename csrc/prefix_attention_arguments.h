// SPDX-License-Identifier: Apache-2.0
// What the C++ ops of prefix_attention and of its gradient are called with: the contract of
// softprompt_fast/ops/prefix_attention.py, checked.
#pragma once

#include <cmath>
#include <string>

#include "checks.h"
#include "torch_abi.h"

namespace softprompt_fast {

struct PrefixAttentionCall {
  static constexpr const char* kKinds = "TTTTT?T?T?T?T?T?db?i?d?T?T?T?T?i?i";
  static constexpr int kCount = 20;

  abi::View query, key, value, prefix_key, prefix_value;
  abi::View sinks, bias, key_scale, value_scale;
  Index offsets, index, own_start, own_end, query_start;
  int64_t batch, q_heads, kv_heads, queries, own, packed, head_dim, v_dim;
  double scale, softcap;  // softcap 0: none
  bool causal;
  int64_t window;       // 0: none
  int64_t longest;      // prefix that a row uses: a hint, L where there is none
  int64_t scale_block;  // 0: the prefix is not in 8 bits

  // `first`: place of the query among the arguments. Throws std::invalid_argument.
  explicit PrefixAttentionCall(const abi::Arguments& given, int first = 0);

  bool quantized() const { return scale_block > 0; }

  // Values that lie in host memory: inside the pack, the own keys and the bias. query_start may
  // hold anything.
  void check_values() const;
};

inline void PrefixAttentionCall::check_values() const {
  const auto within = [](const char* name, const Index& values, int64_t low, int64_t high) {
    for (int64_t i = 0; i < values.size; ++i) {
      SOFTPROMPT_FAST_CHECK(values[i] >= low && values[i] <= high, name,
                            ": expected values within ", low, "..", high, ", found ", values[i],
                            " in place ", i);
    }
  };
  within("prefix_offsets", offsets, 0, packed);
  int64_t longest = offsets ? 0 : packed;
  for (int64_t n = 0; n + 1 < offsets.size; ++n) {
    const int64_t length = offsets[n + 1] - offsets[n];
    SOFTPROMPT_FAST_CHECK(length >= 0, "prefix_offsets: expected rising values, found ",
                          offsets[n + 1], " behind ", offsets[n]);
    longest = length > longest ? length : longest;
  }
  within("prefix_index", index, -1, offsets ? offsets.size - 2 : 0);
  within("own_start", own_start, 0, own);
  within("own_end", own_end, 0, own);
  SOFTPROMPT_FAST_CHECK(!bias || bias.size[3] - own >= longest, "bias: expected at least ", longest,
                        " columns before the own keys', found ", bias ? bias.size[3] - own : 0);
}

inline PrefixAttentionCall::PrefixAttentionCall(const abi::Arguments& given, int first) {
  const auto tensor = [&](int i) { return given.tensor(first + i); };
  query = tensor(0);
  key = tensor(1);
  value = tensor(2);
  prefix_key = tensor(3);
  prefix_value = tensor(4);
  SOFTPROMPT_FAST_CHECK(query.dimensions == 4 && value.dimensions == 4 &&
                            prefix_key.dimensions == 3 && query.size[3] > 0,
                        "query: expected [B, Hq, S, D] beside value [B, Hkv, T, Dv] and prefix_key "
                        "[Hkv, L, D], found ",
                        query.describe(), ", ", value.describe(), ", ", prefix_key.describe());
  batch = query.size[0];
  q_heads = query.size[1];
  queries = query.size[2];
  head_dim = query.size[3];
  kv_heads = value.size[1];
  own = value.size[2];
  v_dim = value.size[3];
  packed = prefix_key.size[1];
  SOFTPROMPT_FAST_CHECK(kv_heads > 0 && q_heads % kv_heads == 0,
                        "query: expected a multiple of value's ", kv_heads, " heads, found ",
                        q_heads);

  key_scale = tensor(16);
  value_scale = tensor(17);
  scale_block = given.has(first + 18) ? given.integer(first + 18) : 0;
  SOFTPROMPT_FAST_CHECK((bool)key_scale == (bool)value_scale &&
                            (bool)key_scale == given.has(first + 18) && scale_block >= 0 &&
                            (scale_block > 0 || !key_scale),
                        "scales: expected two tensors and a block > 0, or none of them");
  const auto expect = [&](const char* name, const abi::View& x,
                          std::initializer_list<int64_t> shape, int32_t dtype) {
    SOFTPROMPT_FAST_CHECK(x.has_shape(shape) && x.dtype == dtype && x.beside(query), name,
                          ": does not fit the others, found ", x.describe());
  };
  const int32_t stored = quantized() ? prefix_key.dtype : query.dtype;
  expect("key", key, {batch, kv_heads, own, head_dim}, query.dtype);
  expect("value", value, {batch, kv_heads, own, v_dim}, query.dtype);
  expect("prefix_key", prefix_key, {kv_heads, packed, head_dim}, stored);
  expect("prefix_value", prefix_value, {kv_heads, packed, v_dim}, stored);
  if (quantized()) {
    const int64_t blocks = packed / scale_block + (packed % scale_block != 0);
    const int32_t dtype = abi::torch_dtype(DType::kFloat32);
    expect("prefix_key_scale", key_scale, {kv_heads, blocks}, dtype);
    expect("prefix_value_scale", value_scale, {kv_heads, blocks}, dtype);
  }

  const abi::View rows[] = {tensor(5), tensor(6), tensor(7), tensor(8), tensor(9)};
  const int64_t prefixes = rows[0] && rows[0].dimensions == 1 ? rows[0].size[0] : 0;
  SOFTPROMPT_FAST_CHECK(!rows[0] || prefixes >= 2, "prefix_offsets: expected [N + 1], found ",
                        rows[0].describe());
  offsets = abi::as_index("prefix_offsets", rows[0], prefixes, query);
  index = abi::as_index("prefix_index", rows[1], batch, query);
  own_start = abi::as_index("own_start", rows[2], batch, query);
  own_end = abi::as_index("own_end", rows[3], batch, query);
  query_start = abi::as_index("query_start", rows[4], batch, query);

  const auto has = [&](int i) { return given.has(first + i); };
  scale = has(10) ? given.number(first + 10) : std::pow(static_cast<double>(head_dim), -0.5);
  causal = given.flag(first + 11);
  window = has(12) ? given.integer(first + 12) : 0;
  softcap = has(13) ? given.number(first + 13) : 0.0;
  SOFTPROMPT_FAST_CHECK(!has(12) || (window > 0 && causal),
                        "sliding_window: expected none, or > 0 and causal, found ", window);
  SOFTPROMPT_FAST_CHECK(!has(13) || softcap > 0, "softcap: expected none or > 0, found ", softcap);
  longest = has(19) ? given.integer(first + 19) : packed;
  SOFTPROMPT_FAST_CHECK(longest >= 0, "max_prefix_length: expected none or >= 0, found ", longest);

  sinks = tensor(14);
  SOFTPROMPT_FAST_CHECK(!sinks || (sinks.has_shape({q_heads}) && sinks.beside(query)),
                        "sinks: expected [", q_heads, "], found ", sinks.describe());
  bias = tensor(15);
  if (bias) {
    const int64_t most[] = {batch, q_heads, queries};
    bool fits = bias.dimensions == 4 && bias.beside(query);
    for (int i = 0; fits && i < 3; ++i) fits = bias.size[i] == most[i] || bias.size[i] == 1;
    const int64_t width = fits ? bias.size[3] - own : -1;
    fits = fits && (offsets ? width >= (packed > 0) && width <= packed : width == packed);
    SOFTPROMPT_FAST_CHECK(fits, "bias: does not fit the others, found ", bias.describe());
  }
}

// New results of a call: out [B, Hq, S, Dv] of [B, S, Hq, Dv] memory, which is what a model wants
// next, and lse [B, Hq, S].
struct PrefixAttentionResults {
  explicit PrefixAttentionResults(const PrefixAttentionCall& c)
      : out(c.query, c.query.dtype, {c.batch, c.q_heads, c.queries, c.v_dim},
            {c.queries * c.q_heads * c.v_dim, c.v_dim, c.q_heads * c.v_dim, 1}),
        lse(c.query, abi::torch_dtype(DType::kFloat32), {c.batch, c.q_heads, c.queries},
            {c.q_heads * c.queries, c.queries, 1}) {}

  abi::NewTensor out, lse;
};

// The op, by what computes a call on a device.
template <void (*run)(const PrefixAttentionCall&, const abi::View& out, const abi::View& lse)>
void prefix_attention(abi::Value* stack, uint64_t inputs) {
  const abi::Arguments given(PrefixAttentionCall::kKinds, stack, inputs);
  const PrefixAttentionCall call(given);
  PrefixAttentionResults results(call);
  run(call, results.out.view(), results.lse.view());
  stack[0] = results.out.release();
  stack[1] = results.lse.release();
}

// Its form with memory for the results.
template <void (*run)(const PrefixAttentionCall&, const abi::View& out, const abi::View& lse)>
void prefix_attention_out(abi::Value* stack, uint64_t inputs) {
  static const std::string kinds = std::string(PrefixAttentionCall::kKinds) + "RR";
  constexpr int kOut = PrefixAttentionCall::kCount;
  const abi::Arguments given(kinds.c_str(), stack, inputs);
  run(PrefixAttentionCall(given), given.tensor(kOut), given.tensor(kOut + 1));
  stack[0] = 1;
}

}  // namespace softprompt_fast
