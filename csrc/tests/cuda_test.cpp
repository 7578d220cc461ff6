// SPDX-License-Identifier: Apache-2.0
// The emulator of CUDA kernels, against PTX's documented layouts and plain loops, and with planted
// faults that it has to find. Built and run by tests/test_cuda_emulator.py.
#include <stdio.h>

#include <functional>
#include <random>

#include "../cuda/launch.h"
#include "../cuda/warpgroup.cuh"

using namespace softprompt_fast;
using namespace softprompt_fast::cuda;

namespace {

int failures = 0;

void expect(bool good, const char* what) {
  if (!good) {
    printf("FAILED: %s\n", what);
    ++failures;
  }
}

void expect_fault(const char* what, const char* message, const std::function<void()>& call) {
  for (int attempt = 0; attempt < 20; ++attempt) {
    try {
      call();
    } catch (const std::runtime_error& error) {
      if (std::string(error.what()).find(message) == std::string::npos) {
        printf("%s: %s\n", what, error.what());
        expect(false, what);
      }
      return;
    }
  }
  printf("not found: ");
  expect(false, what);
}

std::mt19937 generator(0);
float uniform() { return std::uniform_real_distribution<float>(-1.0f, 1.0f)(generator); }

// ---- numbers ----

void numbers() {
  for (int bits = 0; bits < 1 << 16; ++bits) {
    const float half = to_float(Half{(uint16_t)bits}), brain = to_float(BFloat16{(uint16_t)bits});
    expect(std::isnan(half) || from_float<Half>(half).bits == bits, "fp16 comes back");
    expect(std::isnan(brain) || from_float<BFloat16>(brain).bits == bits, "bf16 comes back");
  }
  expect(from_float<Half>(1.0f + 0x1p-11f).bits == 0x3C00, "fp16 ties to even, down");
  expect(from_float<Half>(1.0f + 0x3p-11f).bits == 0x3C02, "fp16 ties to even, up");
  expect(from_float<Half>(65519.0f).bits == 0x7BFF, "fp16's largest");
  expect(from_float<Half>(65520.0f).bits == 0x7C00, "fp16 overflows");
  expect(from_float<Half>(0x1.8p-25f).bits == 1, "fp16's smallest");
  expect(from_float<BFloat16>(1.0f + 0x1p-8f).bits == 0x3F80, "bf16 ties to even, down");
  expect(from_float<BFloat16>(1.0f + 0x3p-8f).bits == 0x3F82, "bf16 ties to even, up");
  expect(std::isnan(to_float(from_float<Half>(NAN))), "fp16 NaN");
  expect(std::isnan(to_float(from_float<BFloat16>(NAN))), "bf16 NaN");
  expect(to_float(Float8{0x7E}) == 448.0f && to_float(Float8{0x81}) == -0x1p-9f, "e4m3");
  expect(std::isnan(to_float(Float8{0x7F})) && to_float(Float8{0x38}) == 1.0f, "e4m3");
  const float2 pair = unpack2<Half>(pack2<Half>(1.5f, -2.0f));
  expect(pair.x == 1.5f && pair.y == -2.0f && pack2<Half>(1.5f, 0.0f) == 0x3E00, "pairs");
}

// ---- a product through cp.async, ldmatrix and mma, every thread as on a device ----

enum Fault { kNone, kNoWait, kNoBarrier, kLateGroup };

struct Multiply {
  const Half *a, *b;  // [16, 16] by rows; [8, 16] by columns of b, or [16, 8] by rows if `rows`
  float* d;
  bool rows;
  int fault;
};

__global__ void multiply(Multiply p) {
  Half* a = (Half*)shared_memory();
  Half* b = a + 256;
  const int t = threadIdx.x, lane = t % 32;
  // The second warp copies, the first one multiplies.
  for (int i = t - 32; i >= 0 && i < 32; i += 32) cp_async_16(a + 8 * i, p.a + 8 * i);
  if (p.fault != kLateGroup) cp_async_commit();
  for (int i = t - 32; i >= 0 && i < 16; i += 32) cp_async_16(b + 8 * i, p.b + 8 * i);
  cp_async_commit();
  if (p.fault == kLateGroup) {
    cp_async_wait<1>();
  } else if (p.fault != kNoWait) {
    cp_async_wait<0>();
  }
  if (p.fault != kNoBarrier) __syncthreads();
  if (t >= 32) return;
  uint32_t a_part[4], b_part[4];
  ldmatrix_x4(a_part, a + lane % 16 * 16 + lane / 16 * 8);
  if (p.rows) {
    ldmatrix_x4_transposed(b_part, b + lane % 16 * 8);
  } else {
    ldmatrix_x4(b_part, b + lane % 8 * 16 + lane / 8 % 2 * 8);
  }
  float d[4] = {};
  mma_m16n8k16<Half>(d, a_part, {b_part[0], b_part[1]});
  for (int i = 0; i < 4; ++i) p.d[(lane / 4 + i / 2 * 8) * 8 + lane % 4 * 2 + i % 2] = d[i];
}

bool product(bool rows, Fault fault) {
  alignas(16) Half a[256], b[128];
  float d[128], x[256], y[128];
  for (int i = 0; i < 256; ++i) x[i] = to_float(a[i] = from_float<Half>(uniform()));
  for (int i = 0; i < 128; ++i) y[i] = to_float(b[i] = from_float<Half>(uniform()));
  std::fill(d, d + 128, NAN);
  launch<multiply>({}, {1, 64, 768}, Multiply{a, b, d, rows, fault});
  for (int i = 0; i < 16; ++i) {
    for (int j = 0; j < 8; ++j) {
      double sum = 0.0;
      for (int k = 0; k < 16; ++k) sum += x[i * 16 + k] * y[rows ? k * 8 + j : j * 16 + k];
      if (!(std::fabs(d[i * 8 + j] - sum) < 1e-5)) return false;
    }
  }
  return true;
}

void products() {
  for (bool rows : {false, true}) {
    for (int i = 0; i < 20; ++i) expect(product(rows, kNone), "a product");
    for (Fault fault : {kNoWait, kNoBarrier, kLateGroup}) {
      bool found = false;
      for (int i = 0; i < 20 && !found; ++i) found = !product(rows, fault);
      expect(found, fault == kNoWait      ? "a missing wait is found"
                    : fault == kNoBarrier ? "a missing barrier is found"
                                          : "a wait for the wrong group is found");
    }
  }
}

// ---- a warpgroup's products: scores of 64 queries and keys, times the keys' values ----

enum GroupFault { kGood, kUnfenced, kUncopied, kEarly, kOverwritten, kReused };

struct GroupMultiply {
  const Half *query, *key, *value;  // [64, 128]
  float *scores, *out;              // [64, 64], [64, 128]
  int fault;
};

// Element (row, column) of a [64, 128] operand: panels of 64 columns, rows of 128 bytes, and bits 4
// to 6 of the address turned by bits 7 to 9.
int place(int row, int column) {
  const int byte = column / 64 * 64 * 128 + row * 128 + column % 64 * 2;
  return (byte ^ (byte >> 7 & 7) << 4) / 2;
}

__global__ void multiply_group(GroupMultiply p) {
  constexpr int kSize = 64 * 128;
  Half *query = (Half*)shared_memory(), *key = query + kSize, *value = key + kSize;
  const int t = threadIdx.x, lane = t % 32, row = t / 32 * 16 + lane / 4;
  for (int i = t; i < kSize / 8; i += 128) {
    const int to = place(i / 16, i % 16 * 8);
    cp_async_16(query + to, p.query + 8 * i);
    cp_async_16(key + to, p.key + 8 * i);
    cp_async_16(value + to, p.value + 8 * i);
  }
  cp_async_commit();
  if (p.fault != kUncopied) cp_async_wait<0>();
  if (p.fault != kUnfenced) fence_proxy_async();
  __syncthreads();
  float scores[8][4], out[16][4];
  for (int i = 0; i < 64; ++i) out[i / 4][i % 4] = 1.0f;
  const Operand queries = operand(query, 0), keys = operand(key, 0);
  wgmma_fence();
  for (int d = 0; d < 8; ++d) {
    const int step = d / 4 * 64 * kPanelRow + d % 4 * 32;
    wgmma_m64n64k16<Half>(scores, queries.moved(step), keys.moved(step), d > 0);
  }
  wgmma_commit();
  if (p.fault != kEarly) wgmma_wait<0>();
  uint32_t weights[4][4];
  for (int i = 0; i < 16; ++i) {
    const float* pair = &scores[i / 4 * 2 + i % 4 / 2][i % 2 * 2];
    weights[i / 4][i % 4] = pack2<Half>(pair[0], pair[1]);
  }
  wgmma_fence();
  const Operand values = operand(value, 64 * kPanelRow);
  for (int n = 0; n < 4; ++n) wgmma_m64k16<Half>(out, weights[n], values.moved(n * 16 * kPanelRow));
  wgmma_commit();
  if (p.fault == kOverwritten) value[t].bits = 0;
  if (p.fault == kReused) weights[1][2] = 0;
  wgmma_wait<0>();
  for (int i = 0; i < 64; ++i) {
    const int r = row + i % 4 / 2 * 8, column = i / 4 * 8 + lane % 4 * 2 + i % 2;
    p.out[r * 128 + column] = out[i / 4][i % 4];
    if (i < 32) p.scores[r * 64 + column] = scores[i / 4][i % 4];
  }
}

bool group_product(GroupFault fault) {
  constexpr int kSize = 64 * 128;
  alignas(16) static Half query[kSize], key[kSize], value[kSize];
  std::vector<float> q(kSize), k(kSize), v(kSize), scores(64 * 64, NAN), out(kSize, NAN);
  for (int i = 0; i < kSize; ++i) {
    q[i] = to_float(query[i] = from_float<Half>(uniform()));
    k[i] = to_float(key[i] = from_float<Half>(uniform()));
    v[i] = to_float(value[i] = from_float<Half>(uniform()));
  }
  launch<multiply_group>({}, {1, 128, 3 * kSize * 2},
                         GroupMultiply{query, key, value, scores.data(), out.data(), fault});
  bool good = true;
  for (int i = 0; i < 64; ++i) {
    for (int j = 0; j < 64; ++j) {
      double sum = 0.0;
      for (int d = 0; d < 128; ++d) sum += q[i * 128 + d] * k[j * 128 + d];
      good = good && std::fabs(scores[i * 64 + j] - sum) < 1e-4;
    }
    for (int d = 0; d < 128; ++d) {
      double sum = 1.0;
      for (int j = 0; j < 64; ++j) {
        sum += to_float(from_float<Half>(scores[i * 64 + j])) * v[j * 128 + d];
      }
      good = good && std::fabs(out[i * 128 + d] - sum) < 1e-4;
    }
  }
  return good;
}

void group_products() {
  for (int i = 0; i < 5; ++i) expect(group_product(kGood), "a warpgroup's products");
  const std::pair<GroupFault, const char*> planted[] = {
      {kUncopied, "a missing wait for copies is found"},
      {kEarly, "results that are read before the wait are found"},
      {kOverwritten, "an operand that is overwritten is found"},
      {kReused, "registers that are overwritten are found"},
  };
  for (const auto& [fault, what] : planted) {
    bool found = false;
    for (int i = 0; i < 20 && !found; ++i) found = !group_product(fault);
    expect(found, what);
  }
  expect_fault("copies that tensor cores may not see", "copies without a fence",
               [] { group_product(kUnfenced); });
}

// ---- shuffles, votes, named barriers, the last block ----

struct Sums {
  const float* x;
  float *parts, *sum;
  unsigned* count;
};

// Sum over all blocks: the last one to finish adds the parts and resets the counter.
__global__ void sum_all(Sums p) {
  float* parts = (float*)shared_memory();
  const int t = threadIdx.x, warp = t / 32;
  const float x = warp_sum(p.x[blockIdx.x * blockDim.x + t]);
  if (t % 32 == 0) parts[warp] = x;
  // The second half of the block reads what the first brings, and the other way round.
  named_barrier(1, blockDim.x);
  __syncthreads();
  if (t == 0) {
    float sum = 0.0f;
    for (int i = 0; i < (int)blockDim.x / 32; ++i) sum += parts[i];
    p.parts[blockIdx.x] = sum;
    __threadfence();
    if (atomicInc(p.count, gridDim.x - 1) == gridDim.x - 1) {
      __threadfence();
      float all = 0.0f;
      for (unsigned i = 0; i < gridDim.x; ++i) all += p.parts[i];
      *p.sum = all;
    }
  }
  const unsigned odd = __ballot_sync(kAllLanes, t & 1);
  if (odd != 0xAAAAAAAAu || __shfl_sync(kAllLanes, t, 5) != t / 32 * 32 + 5) *p.sum = NAN;
  if (__shfl_down_sync(kAllLanes, t % 32, 1) != (t % 32 == 31 ? 31 : t % 32 + 1)) *p.sum = NAN;
  if (!__any_sync(kAllLanes, t % 32 == 3) || __all_sync(kAllLanes, t % 32 == 3)) *p.sum = NAN;
}

void sums() {
  std::vector<float> x(7 * 128), parts(7);
  for (float& value : x) value = std::round(uniform() * 100.0f);
  float sum = NAN, wanted = 0.0f;
  unsigned count = 0;
  for (float value : x) wanted += value;
  for (int i = 0; i < 3; ++i) {
    launch<sum_all>({}, {7, 128, 64}, Sums{x.data(), parts.data(), &sum, &count});
    expect(sum == wanted && count == 0, "the last block sums, and resets its counter");
  }
}

// ---- warps that run ahead ----

struct Rounds {
  bool barrier;
  int* wrong;
};

// Sums over the warps, one after another, in the same places: without the second barrier a warp
// that is five shuffles ahead overwrites what another has yet to read.
__global__ void sum_in_rounds(Rounds p) {
  float* parts = (float*)shared_memory();
  const int warp = threadIdx.x / 32;
  for (int round = 1; round < 4; ++round) {
    const float mine = warp_sum((float)round);
    if (threadIdx.x % 32 == 0) parts[warp] = mine;
    __syncthreads();
    float sum = 0.0f;
    for (int w = 0; w < 4; ++w) sum += parts[w];
    if (sum != 128.0f * round) *p.wrong = 1;
    if (p.barrier) __syncthreads();
  }
}

void warps_ahead() {
  int wrong = 0;
  for (int i = 0; i < 20; ++i) launch<sum_in_rounds>({}, {1, 128, 16}, Rounds{true, &wrong});
  expect(!wrong, "sums in rounds");
  for (int i = 0; i < 20; ++i) launch<sum_in_rounds>({}, {1, 128, 16}, Rounds{false, &wrong});
  expect(wrong, "a warp that runs ahead is found");
}

// ---- planted faults ----

struct Faulty {
  int kind;
};

__global__ void faulty(Faulty p) {
  const int t = threadIdx.x;
  unsigned char* shared = shared_memory();
  alignas(16) static char memory[64] = {};
  switch (p.kind) {
    case 0:
      if (t != 7) __syncthreads();
      break;
    case 1:
      if (t < 32) {
        __syncwarp();
      } else if (t == 40) {
        __shfl_sync(kAllLanes, t, 0);
      } else {
        __syncwarp();
      }
      break;
    case 2:
      cp_async_16(shared + 8, memory);
      break;
    case 3:
      cp_async_16(shared + 256, memory);
      break;
    case 4:
      shared[256 + t] = 1;
      break;
    case 5:
      load_vector<4>((const float*)(memory + 4));
      break;
    case 6:
      __shfl_sync(0xFFFFu, t, 0);
      break;
    case 7:
      named_barrier(t < 32 ? 1 : 2, 64);
      break;
  }
}

void faults() {
  const std::pair<const char*, const char*> planted[] = {
      {"a thread that skips a barrier", "waits for ever at barrier 0"},
      {"a warp that disagrees", "disagree: "},
      {"a copy to an odd address", "cp.async: an address that is no multiple of 16"},
      {"a copy behind the shared memory", "cp.async: an address outside shared memory"},
      {"a store behind the shared memory", "behind the shared memory"},
      {"a vector at an odd address", "load_vector: an address that is no multiple of 16"},
      {"a partial mask", "a partial mask"},
      {"barriers that others do not reach", "waits for ever at barrier"},
  };
  for (int kind = 0; kind < 8; ++kind) {
    expect_fault(planted[kind].first, planted[kind].second,
                 [&] { launch<faulty>({}, {2, 64, 256}, Faulty{kind}); });
  }
}

}  // namespace

int main() {
  numbers();
  products();
  group_products();
  sums();
  warps_ahead();
  faults();
  if (failures == 0) printf("ok\n");
  return failures != 0;
}
