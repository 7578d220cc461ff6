// SPDX-License-Identifier: Apache-2.0
// The ops softprompt_fast::prompt_qkv_cuda, for rows of a decode step, results where the caller
// wants them, and softprompt_fast::head_norm_cuda behind it.
#include "../prompt_concat_arguments.h"
#include "binding.h"

namespace softprompt_fast {
namespace cuda {
namespace {

using abi::as_tensor;
using abi::View;

// Places of the arguments behind those of prompt_concat.
enum : int {
  kWeights = PromptConcatCall::kCount,
  kBiases = kWeights + 3,
  kQHeads = kBiases + 3,
  kKvHeads,
  kNorm,
  kNormWeight,
  kNormBias,
  kNormOffset,
  kEps,
  kCos,
  kSin,
  kInterleaved,
  kStart,
  kResults,
  kResidual = kResults + 3,
};
const std::string kKinds = std::string(PromptConcatCall::kKinds) + "TTT?T?T?Tiii?T?Tdd?T?Tb?TRRR?R";

// One of the tensors that the kernel multiplies, writes or adds: of its one 16-bit dtype.
Tensor read(const char* name, const View& x, std::initializer_list<int64_t> shape,
            const View& like) {
  if (!x) return {};
  SOFTPROMPT_FAST_CHECK(x.has_shape(shape) && x.dtype == like.dtype && x.beside(like), name,
                        ": does not fit the others, found ", x.describe());
  return as_tensor(name, x);
}

// [B or 1, length, R], of which a row's stride is 0 where all rows share them.
Tensor read_angles(const char* name, const View& x, int64_t batch, int64_t length,
                   const View& like) {
  SOFTPROMPT_FAST_CHECK(x.dimensions == 3 && (x.size[0] == batch || x.size[0] == 1) &&
                            x.size[1] == length && x.beside(like),
                        name, ": does not fit the others, found ", x.describe());
  Tensor tensor = as_tensor(name, x);
  SOFTPROMPT_FAST_CHECK(tensor.dtype < DType::kInt8, name, ": no kernel reads ", x.describe());
  if (x.size[0] == 1) tensor.stride[0] = 0;
  return tensor;
}

Rope read_rope(const View& cos, const View& sin, int64_t batch, int64_t length, int64_t head_dim,
               const View& like) {
  SOFTPROMPT_FAST_CHECK(bool(cos) == bool(sin), "cos, sin: expected both or none");
  if (!cos) return {};
  Rope rope = {read_angles("cos", cos, batch, length, like),
               read_angles("sin", sin, batch, length, like), cos.size[2], false};
  SOFTPROMPT_FAST_CHECK(rope.size % 2 == 0 && rope.size <= head_dim && sin.size[2] == rope.size,
                        "cos, sin: expected an even number up to ", head_dim, ", found ", rope.size,
                        " and ", sin.size[2]);
  return rope;
}

CacheStart read_start(const View& start, const View& key, int64_t length) {
  SOFTPROMPT_FAST_CHECK(start || key.size[2] == length, "key: expected ", length,
                        " places without a start, found ", key.size[2]);
  return {abi::as_index("start", start, 1, key), key.size[2]};
}

void check_16_bits(const View& query) {
  const DType dtype = abi::dtype_of("query", query);
  SOFTPROMPT_FAST_CHECK(dtype == DType::kBFloat16 || dtype == DType::kFloat16,
                        "query: expected bfloat16 or float16, found ", query.describe());
}

void run(abi::Value* stack, uint64_t inputs) {
  const abi::Arguments given(kKinds.c_str(), stack, inputs);
  const PromptConcatCall call(given);
  const View q = given.tensor(kResults), k = given.tensor(kResults + 1);
  const View v = given.tensor(kResults + 2);
  SOFTPROMPT_FAST_CHECK(q.dimensions == 4 && k.dimensions == 4 && v.dimensions == 4,
                        "query, key, value: expected four dimensions, found ", q.describe(), ", ",
                        k.describe(), " and ", v.describe());
  SOFTPROMPT_FAST_CHECK(call.prompt || call.rows.slots == 0, "prompt: expected one for ",
                        call.rows.slots, " slots, found None");
  PromptQkv op = {};
  PromptConcat& concat = op.concat;
  concat = call.forward();
  const int64_t length = call.length();
  const View& source = call.table ? call.table : call.tokens;
  SOFTPROMPT_FAST_CHECK(source.dtype == q.dtype && source.beside(q),
                        "tokens, table: expected the dtype of query, found ", source.describe());
  concat.prompt = read("prompt", call.prompt, {concat.packed, concat.width}, q);
  concat.out = read("residual", given.tensor(kResidual), {concat.batch, length, concat.width}, q);

  op.q_heads = given.integer(kQHeads);
  op.kv_heads = given.integer(kKvHeads);
  op.head_dim = q.size[3];
  op.value_dim = v.size[3];
  SOFTPROMPT_FAST_CHECK(concat.width % 8 == 0 && op.head_dim % 2 == 0 && op.value_dim % 2 == 0 &&
                            op.q_heads > 0 && op.kv_heads > 0,
                        "expected heads, a width that 8 divides and even head dimensions, found ",
                        op.q_heads, ", ", op.kv_heads, ", ", concat.width, ", ", op.head_dim,
                        " and ", op.value_dim);
  check_16_bits(q);
  op.start = read_start(given.tensor(kStart), k, length);
  op.out[0] = read("query", q, {concat.batch, op.q_heads, length, op.head_dim}, q);
  op.out[1] = read("key", k, {concat.batch, op.kv_heads, op.start.capacity, op.head_dim}, q);
  op.out[2] = read("value", v, {concat.batch, op.kv_heads, op.start.capacity, op.value_dim}, q);
  const int64_t rows[] = {op.q_heads * op.head_dim, op.kv_heads * op.head_dim,
                          op.kv_heads * op.value_dim};
  for (int i = 0; i < 3; ++i) {
    op.weight[i] = read("weight", given.tensor(kWeights + i), {rows[i], concat.width}, q);
    op.bias[i] = read("bias", given.tensor(kBiases + i), {rows[i]}, q);
    SOFTPROMPT_FAST_CHECK((bool)op.bias[i] == (bool)op.bias[0], "bias: expected three or none");
  }
  const int64_t norm = given.integer(kNorm);
  SOFTPROMPT_FAST_CHECK(norm >= 0 && norm <= 2, "norm: expected a kind 0..2, found ", norm);
  op.norm = static_cast<PromptQkv::Norm>(norm);
  op.norm_weight = read("norm_weight", given.tensor(kNormWeight), {concat.width}, q);
  op.norm_bias = read("norm_bias", given.tensor(kNormBias), {concat.width}, q);
  op.norm_offset = static_cast<float>(given.number(kNormOffset));
  op.eps = static_cast<float>(given.number(kEps));
  op.rope = read_rope(given.tensor(kCos), given.tensor(kSin), concat.batch, length, op.head_dim, q);
  op.rope.interleaved = given.flag(kInterleaved);
  run_prompt_qkv(op, queue_of(q));
  stack[0] = 1;
}

// query, key, weight, offset and eps of q's norm, of k's, cos, sin, start
constexpr const char* kHeadNormKinds = "RRTddTddTT?T";

void run_norm(abi::Value* stack, uint64_t inputs) {
  const abi::Arguments given(kHeadNormKinds, stack, inputs);
  const View q = given.tensor(0), k = given.tensor(1);
  SOFTPROMPT_FAST_CHECK(q.dimensions == 4 && k.dimensions == 4 && q.size[3] % 2 == 0,
                        "query, key: expected [B, heads, S, D] with an even D, found ",
                        q.describe(), " and ", k.describe());
  check_16_bits(q);
  HeadNorm op = {};
  op.batch = q.size[0];
  op.length = q.size[2];
  op.head_dim = q.size[3];
  op.start = read_start(given.tensor(10), k, op.length);
  const auto heads = [&](const char* name, const View& x, int64_t places, int norm) {
    return HeadNorm::Heads{x.size[1], read(name, x, {op.batch, x.size[1], places, op.head_dim}, q),
                           read("weight", given.tensor(norm), {op.head_dim}, q),
                           static_cast<float>(given.number(norm + 1)),
                           static_cast<float>(given.number(norm + 2))};
  };
  op.of[0] = heads("query", q, op.length, 2);
  op.of[1] = heads("key", k, op.start.capacity, 5);
  const View cos = given.tensor(8), sin = given.tensor(9);
  op.rope = read_rope(cos, sin, op.batch, op.length, op.head_dim, q);
  SOFTPROMPT_FAST_CHECK(op.rope.size > 0 && cos.dtype == q.dtype && sin.dtype == q.dtype,
                        "cos, sin: expected angles in the others' dtype, found ", cos.describe(),
                        " and ", sin.describe());
  run_head_norm(op, queue_of(q));
  stack[0] = 1;
}

}  // namespace

void implement_prompt_qkv() {
  abi::implement("prompt_qkv_cuda", dispatch_key(), &abi::boxed<run>);
  abi::implement("head_norm_cuda", dispatch_key(), &abi::boxed<run_norm>);
}

}  // namespace cuda
}  // namespace softprompt_fast
