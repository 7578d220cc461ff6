// SPDX-License-Identifier: Apache-2.0
// The ops softprompt_fast::prompt_qkv_cuda, for rows of a decode step, results where the caller
// wants them, and softprompt_fast::head_norm_cuda behind it.
#include "../torch_abi.h"
#include "binding.h"

namespace softprompt_fast {
namespace cuda {
namespace {

using abi::as_tensor;
using abi::View;

// Places of the arguments.
enum : int {
  kTokens,
  kTable,
  kPrompt,
  kOffsets,
  kIndex,
  kOwnStart,
  kLength,
  kScale,
  kPromptScale,
  kLeft,
  kWeights,
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
constexpr const char* kKinds = "T?T?T?T?T?TiddbTTT?T?T?Tiii?T?Tdd?T?Tb?TRRR?R";

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
  const abi::Arguments given(kKinds, stack, inputs);
  const View tokens = given.tensor(kTokens), table = given.tensor(kTable);
  const View prompt = given.tensor(kPrompt), q = given.tensor(kResults);
  const View k = given.tensor(kResults + 1), v = given.tensor(kResults + 2);
  SOFTPROMPT_FAST_CHECK(tokens.dimensions == (table ? 2 : 3) && q.dimensions == 4 &&
                            k.dimensions == 4 && v.dimensions == 4,
                        "tokens: expected [B, S] ids with a table, or [B, S, H], found ",
                        tokens.describe());
  PromptQkv op = {};
  PromptConcat& concat = op.concat;
  concat.batch = tokens.size[0];
  concat.own = tokens.size[1];
  concat.slots = given.integer(kLength);
  SOFTPROMPT_FAST_CHECK(concat.slots >= 0 && (prompt ? prompt.dimensions == 2 : concat.slots == 0),
                        "prompt: expected [L, H] where there are slots, found ", prompt.describe());
  concat.packed = prompt ? prompt.size[0] : 0;
  const View& source = prompt ? prompt : tokens;
  concat.width = source.size[source.dimensions - 1];
  const int64_t length = concat.slots + concat.own;
  if (table) {
    SOFTPROMPT_FAST_CHECK(abi::is_int64(tokens) && tokens.beside(q) && prompt,
                          "tokens: expected int64 ids and a prompt, found ", tokens.describe());
    concat.ids = static_cast<const int64_t*>(tokens.data);
    concat.id_stride[0] = tokens.stride[0];
    concat.id_stride[1] = tokens.stride[1];
    concat.vocabulary = table.size[0];
    concat.table = read("table", table, {concat.vocabulary, concat.width}, q);
  } else {
    concat.tokens = read("tokens", tokens, {concat.batch, concat.own, concat.width}, q);
  }
  concat.prompt = read("prompt", prompt, {concat.packed, concat.width}, q);
  concat.out = read("residual", given.tensor(kResidual), {concat.batch, length, concat.width}, q);
  concat.scale = static_cast<float>(given.number(kScale));
  concat.prompt_scale = static_cast<float>(given.number(kPromptScale));
  const View offsets = given.tensor(kOffsets);
  const int64_t prompts = offsets && offsets.dimensions == 1 ? offsets.size[0] : 0;
  SOFTPROMPT_FAST_CHECK(!offsets || prompts >= 2, "prompt_offsets: expected [N + 1], found ",
                        offsets.describe());
  op.rows = {abi::as_index("prompt_offsets", offsets, prompts, q),
             abi::as_index("prompt_index", given.tensor(kIndex), concat.batch, q),
             abi::as_index("own_start", given.tensor(kOwnStart), concat.batch, q)};
  op.left = given.flag(kLeft);

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
