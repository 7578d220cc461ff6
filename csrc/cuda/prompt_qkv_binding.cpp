// SPDX-License-Identifier: Apache-2.0
// The op softprompt_fast::prompt_qkv_cuda: rows of a decode step, results where the caller wants
// them.
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
  const DType dtype = abi::dtype_of("query", q);
  SOFTPROMPT_FAST_CHECK(dtype == DType::kBFloat16 || dtype == DType::kFloat16,
                        "query: expected bfloat16 or float16, found ", q.describe());
  const View start = given.tensor(kStart);
  op.start = abi::as_index("start", start, 1, q);
  op.capacity = k.size[2];
  SOFTPROMPT_FAST_CHECK(start || op.capacity == length, "key: expected ", length,
                        " places without a start, found ", op.capacity);
  op.out[0] = read("query", q, {concat.batch, op.q_heads, length, op.head_dim}, q);
  op.out[1] = read("key", k, {concat.batch, op.kv_heads, op.capacity, op.head_dim}, q);
  op.out[2] = read("value", v, {concat.batch, op.kv_heads, op.capacity, op.value_dim}, q);
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
  SOFTPROMPT_FAST_CHECK(given.has(kCos) == given.has(kSin), "cos, sin: expected both or none");
  if (const View cos = given.tensor(kCos)) {
    op.cos = read_angles("cos", cos, concat.batch, length, q);
    op.sin = read_angles("sin", given.tensor(kSin), concat.batch, length, q);
    op.rotation = cos.size[2];
    SOFTPROMPT_FAST_CHECK(op.rotation % 2 == 0 && op.rotation <= op.head_dim,
                          "cos: expected an even number up to ", op.head_dim, ", found ",
                          op.rotation);
    op.interleaved = given.flag(kInterleaved);
  }
  run_prompt_qkv(op, queue_of(q));
  stack[0] = 1;
}

}  // namespace

void implement_prompt_qkv() { abi::implement("prompt_qkv_cuda", dispatch_key(), &abi::boxed<run>); }

}  // namespace cuda
}  // namespace softprompt_fast
