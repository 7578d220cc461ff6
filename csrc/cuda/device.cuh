// SPDX-License-Identifier: Apache-2.0
// What kernels are written with: instructions of sm_80 and later that CUDA C++ has no function for,
// 16-bit and 8-bit numbers, vectors. A CUDA compiler makes PTX of it, any other C++ compiler code
// that emulator.h runs, with the same results up to the order of a product's additions.
//
// Everything else that kernels use stands under CUDA's own names: threadIdx, __syncthreads,
// __shfl_xor_sync (whole warps: mask 0xFFFFFFFF), __ballot_sync, __syncwarp, atomicAdd,
// __threadfence.
#pragma once

#include <stdint.h>

#include "../tensor.h"

#if defined(__CUDACC__)
#include <assert.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>
#else
#include "emulator.h"
#endif

namespace softprompt_fast {
namespace cuda {

constexpr unsigned kAllLanes = 0xFFFFFFFFu;

// ---- numbers: storage only, arithmetic is in float ----

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};
struct Float8 {  // e4m3: no infinity, NaN is 0x7F
  uint8_t bits;
};

#if !defined(__CUDACC__)
namespace emulator {

inline float as_float(uint32_t bits) {
  float x;
  memcpy(&x, &bits, 4);
  return x;
}
inline uint32_t as_bits(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  return bits;
}

// A float with `exponent` and `mantissa` bits. ieee: the largest exponent means infinity and NaN.
inline float widen(uint32_t bits, int exponent, int mantissa, bool ieee) {
  const float sign = bits >> (exponent + mantissa) ? -1.0f : 1.0f;
  const int e = bits >> mantissa & ((1 << exponent) - 1), bias = (1 << (exponent - 1)) - 1;
  const int m = bits & ((1 << mantissa) - 1);
  if (e == (1 << exponent) - 1 && (ieee || m == (1 << mantissa) - 1)) {
    return m ? NAN : sign * INFINITY;
  }
  return sign * (e ? std::ldexp(1.0f + std::ldexp((float)m, -mantissa), e - bias)
                   : std::ldexp((float)m, 1 - bias - mantissa));
}

inline uint16_t half_bits(float x) {
  const uint32_t bits = as_bits(x), sign = bits >> 16 & 0x8000u;
  if (std::isnan(x)) return (uint16_t)(sign | 0x7FFFu);
  const float size = std::fabs(x);
  if (size == 0.0f) return (uint16_t)sign;
  if (size >= 65520.0f) return (uint16_t)(sign | 0x7C00u);
  int e;
  std::frexp(size, &e);  // size = [0.5, 1) * 2^e
  e = std::max(e, -13);  // below, a denormal's step
  const uint32_t steps = (uint32_t)std::nearbyint(std::ldexp(size, 11 - e));  // to even
  // 1024 steps are the implied bit: where rounding carries, the exponent takes it.
  return (uint16_t)(sign | ((uint32_t)(e + 13) * 1024u + steps));
}

inline uint16_t bfloat16_bits(float x) {
  const uint32_t bits = as_bits(x);
  if (std::isnan(x)) return 0x7FFF;
  return (uint16_t)((bits + 0x7FFFu + (bits >> 16 & 1u)) >> 16);
}

void ldmatrix_x4(uint32_t (&to)[4], const void* row, bool transposed);

}  // namespace emulator
#endif

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(int8_t x) { return (float)x; }
#if defined(__CUDACC__)
__device__ __forceinline__ float to_float(Half x) { return __half2float(__ushort_as_half(x.bits)); }
__device__ __forceinline__ float to_float(BFloat16 x) {
  return __uint_as_float((uint32_t)x.bits << 16);
}
__device__ __forceinline__ float to_float(Float8 x) {
  return __half2float(__half(__nv_cvt_fp8_to_halfraw(x.bits, __NV_E4M3)));
}
#else
inline float to_float(Half x) { return emulator::widen(x.bits, 5, 10, true); }
inline float to_float(BFloat16 x) { return emulator::as_float((uint32_t)x.bits << 16); }
inline float to_float(Float8 x) { return emulator::widen(x.bits, 4, 3, false); }
#endif

// Rounded to the nearest, ties to even.
template <typename T>
__device__ __forceinline__ T from_float(float x);
template <>
__device__ __forceinline__ float from_float<float>(float x) {
  return x;
}
#if defined(__CUDACC__)
template <>
__device__ __forceinline__ Half from_float<Half>(float x) {
  return {__half_as_ushort(__float2half_rn(x))};
}
template <>
__device__ __forceinline__ BFloat16 from_float<BFloat16>(float x) {
  return {__bfloat16_as_ushort(__float2bfloat16_rn(x))};
}
#else
template <>
inline Half from_float<Half>(float x) {
  return {emulator::half_bits(x)};
}
template <>
inline BFloat16 from_float<BFloat16>(float x) {
  return {emulator::bfloat16_bits(x)};
}
#endif

// Two 16-bit numbers in a register, the first in the low half: what products take.
template <typename T>
__device__ __forceinline__ uint32_t pack2(float low, float high) {
  return (uint32_t)from_float<T>(low).bits | (uint32_t)from_float<T>(high).bits << 16;
}
template <typename T>
__device__ __forceinline__ float2 unpack2(uint32_t pair) {
  return {to_float(T{(uint16_t)pair}), to_float(T{(uint16_t)(pair >> 16)})};
}
#if defined(__CUDACC__)
template <>
__device__ __forceinline__ uint32_t pack2<Half>(float low, float high) {
  uint32_t pair;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}
template <>
__device__ __forceinline__ uint32_t pack2<BFloat16>(float low, float high) {
  uint32_t pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}
#endif

// x, but the compiler does not see that: what follows from it is worked out where it is used rather
// than kept in registers around a loop.
__device__ __forceinline__ int opaque(int x) {
#if defined(__CUDACC__)
  asm volatile("" : "+r"(x));
#endif
  return x;
}

// ---- vectors ----

// `size` neighbours in memory, moved by one instruction of up to 16 bytes, which their address has
// to be a multiple of.
template <typename T, int size>
struct alignas(sizeof(T) * size) Vector {
  T at[size];
};

template <int size, typename T>
__device__ __forceinline__ Vector<T, size> load_vector(const T* p) {
  static_assert(sizeof(T) * size <= 16, "no instruction moves more");
#if !defined(__CUDACC__)
  emulator::check_address(p, sizeof(T) * size, "load_vector");
#endif
  return *(const Vector<T, size>*)p;
}

template <typename T, int size>
__device__ __forceinline__ void store_vector(T* p, const Vector<T, size>& x) {
#if !defined(__CUDACC__)
  emulator::check_address(p, sizeof(T) * size, "store_vector");
#endif
  *(Vector<T, size>*)p = x;
}

// Says that a pointer is to global memory, where the compiler cannot see it: one that is chosen
// among several, or lies in shared memory, would be loaded from by slower generic instructions.
template <typename T>
__device__ __forceinline__ T* as_global(T* p) {
#if defined(__CUDACC__)
  __builtin_assume(__isGlobal(p));
#endif
  return p;
}

// What other blocks may have written by now.
__device__ __forceinline__ unsigned load_volatile(const unsigned* p) {
  return *(const volatile unsigned*)p;
}

// Lets others work for a moment.
__device__ __forceinline__ void nap() {
#if defined(__CUDACC__)
  __nanosleep(100);
#endif
}

// Values of an index tensor.
__device__ __forceinline__ int64_t load_index(const Index& index, int64_t i) {
  return index.wide ? ((const int64_t*)index.data)[i] : ((const int32_t*)index.data)[i];
}

// Ends the program where it fails, as PyTorch's own device assertions do: later calls on the device
// raise. `message` is a literal.
#if defined(__CUDACC__)
#define device_assert(condition, message) assert((condition) && message)
#else
#define device_assert(condition, message)                                       \
  do {                                                                          \
    if (!(condition)) ::softprompt_fast::cuda::emulator::block().fail(message); \
  } while (false)
#endif

// ---- arithmetic ----

#if defined(__CUDACC__)
// 2^x, off by 2 units in the last place at most; results below 2^-126 are 0.
__device__ __forceinline__ float exp2_approximate(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ float tanh_approximate(float x) {
  float y;
  asm("tanh.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ float reciprocal_root(float x) { return rsqrtf(x); }
#else
inline float exp2_approximate(float x) { return std::exp2(x); }
inline float tanh_approximate(float x) { return std::tanh(x); }
inline float reciprocal_root(float x) { return 1.0f / std::sqrt(x); }
#endif

// Over lanes whose numbers differ in the bits below `lanes`; all of them get it.
template <int lanes = 32>
__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
  for (int bit = lanes / 2; bit > 0; bit /= 2) x += __shfl_xor_sync(kAllLanes, x, bit);
  return x;
}
template <int lanes = 32>
__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
  for (int bit = lanes / 2; bit > 0; bit /= 2) {
    const float other = __shfl_xor_sync(kAllLanes, x, bit);
    x = x > other ? x : other;
  }
  return x;
}

// ---- shared memory ----

// The launch's dynamic shared memory, at a multiple of 1024 bytes. There is no other.
__device__ __forceinline__ unsigned char* shared_memory() {
#if defined(__CUDACC__)
  extern __shared__ __align__(1024) unsigned char softprompt_fast_shared[];
  return softprompt_fast_shared;
#else
  return emulator::block().shared_memory();
#endif
}

// As an instruction takes it.
__device__ __forceinline__ uint32_t shared_address(const void* p) {
#if defined(__CUDACC__)
  return (uint32_t)__cvta_generic_to_shared(p);
#else
  return (uint32_t)((const unsigned char*)p - emulator::block().shared_memory());
#endif
}

// Barrier `id` (1..15; 0 is __syncthreads) for `threads` of the block, whole warps.
__device__ __forceinline__ void named_barrier(int id, int threads) {
#if defined(__CUDACC__)
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
#else
  emulator::block().barrier(id, threads);
#endif
}

// ---- asynchronous copies, global to shared memory ----

// 16 bytes, both addresses multiples of 16; zeros where not `valid`, and `from` is then not read.
__device__ __forceinline__ void cp_async_16(void* to, const void* from, bool valid = true) {
#if defined(__CUDACC__)
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from),
               "r"(valid ? 16 : 0)
               : "memory");
#else
  emulator::check_shared(to, 16, "cp.async");
  emulator::check_address(from, 16, "cp.async");
  emulator::Copy copy{to, from, valid, false};
  if (emulator::random_bits() & 1) emulator::perform(copy);
  emulator::thread().copies.back().push_back(copy);
#endif
}

// Ends a group: the thread's copies since the last one.
__device__ __forceinline__ void cp_async_commit() {
#if defined(__CUDACC__)
  asm volatile("cp.async.commit_group;" ::: "memory");
#else
  emulator::thread().copies.emplace_back();
#endif
}

// Waits until at most `pending` of the thread's groups, its latest, are still under way. Other
// threads see the copies after a barrier that follows.
template <int pending>
__device__ __forceinline__ void cp_async_wait() {
#if defined(__CUDACC__)
  asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
#else
  auto& groups = emulator::thread().copies;
  while ((int)groups.size() - 1 > pending) {
    for (emulator::Copy& copy : groups.front()) emulator::perform(copy);
    emulator::thread().unfenced |= !groups.front().empty();
    groups.erase(groups.begin());
  }
#endif
}

// ---- tensor cores: whole warps ----

// Four 8x8 matrices of 16-bit numbers; lane 8 i + r gives the address of row r of matrix i, a
// multiple of 16. Lane l gets of each its row l / 4, columns 2 (l % 4) and the next.
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&to)[4], const void* row) {
#if defined(__CUDACC__)
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(shared_address(row))
               : "memory");
#else
  emulator::ldmatrix_x4(to, row, false);
#endif
}

// The same with every matrix transposed: lane l gets column l / 4, rows 2 (l % 4) and the next.
__device__ __forceinline__ void ldmatrix_x4_transposed(uint32_t (&to)[4], const void* row) {
#if defined(__CUDACC__)
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(shared_address(row))
               : "memory");
#else
  emulator::ldmatrix_x4(to, row, true);
#endif
}

// d[16, 8] += a[16, 16] b[16, 8], T times T into float. Lane l, with r = l / 4 and c = 2 (l % 4),
// has
//   a: rows r, r + 8, r, r + 8 at columns c, c, c + 8, c + 8 (and the next), what ldmatrix_x4 gives
//      for matrices top left, bottom left, top right, bottom right;
//   b: rows c and c + 8 (and the next) of column r;
//   d: row r columns c, c + 1, row r + 8 columns c, c + 1.
template <typename T>
__device__ __forceinline__ void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4],
                                             const uint32_t (&b)[2]);
#if defined(__CUDACC__)
#define SOFTPROMPT_FAST_MMA(T, type)                                                     \
  template <>                                                                            \
  __device__ __forceinline__ void mma_m16n8k16<T>(float (&d)[4], const uint32_t (&a)[4], \
                                                  const uint32_t (&b)[2]) {              \
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." type "." type                  \
                 ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"  \
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                        \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));    \
  }
SOFTPROMPT_FAST_MMA(Half, "f16")
SOFTPROMPT_FAST_MMA(BFloat16, "bf16")
#undef SOFTPROMPT_FAST_MMA
#else
namespace emulator {

struct Product {
  float* d;
  const uint32_t *a, *b;
};

template <typename T>
void multiply(Product** lanes) {
  float a[16][16], b[16][8];
  for (int l = 0; l < kWarp; ++l) {
    const int r = l / 4, c = l % 4 * 2;
    for (int i = 0; i < 4; ++i) {
      const float2 pair = unpack2<T>(lanes[l]->a[i]);
      float* at = &a[r + i % 2 * 8][c + i / 2 * 8];
      at[0] = pair.x;
      at[1] = pair.y;
    }
    for (int i = 0; i < 2; ++i) {
      const float2 pair = unpack2<T>(lanes[l]->b[i]);
      b[c + i * 8][r] = pair.x;
      b[c + i * 8 + 1][r] = pair.y;
    }
  }
  for (int l = 0; l < kWarp; ++l) {
    for (int i = 0; i < 4; ++i) {
      float sum = lanes[l]->d[i];
      for (int k = 0; k < 16; ++k) sum += a[l / 4 + i / 2 * 8][k] * b[k][l % 4 * 2 + i % 2];
      lanes[l]->d[i] = sum;
    }
  }
}

inline void ldmatrix_x4(uint32_t (&to)[4], const void* row, bool transposed) {
  check_shared(row, 16, "ldmatrix");
  struct Bring {
    uint32_t* to;
    const uint16_t* row;
    bool transposed;
  } bring{to, (const uint16_t*)row, transposed};
  block().warp_meets("ldmatrix", bring, [](Bring** lanes) {
    for (int l = 0; l < kWarp; ++l) {
      const int r = l / 4, c = l % 4 * 2;
      for (int i = 0; i < 4; ++i) {
        const auto at = [&](int row, int column) { return lanes[8 * i + row]->row[column]; };
        const bool turn = lanes[l]->transposed;
        const uint32_t low = turn ? at(c, r) : at(r, c);
        lanes[l]->to[i] = low | (uint32_t)(turn ? at(c + 1, r) : at(r, c + 1)) << 16;
      }
    }
  });
}

}  // namespace emulator

template <typename T>
void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  emulator::Product bring{d, a, b};
  emulator::block().warp_meets("mma", bring, emulator::multiply<T>);
}
#endif

}  // namespace cuda
}  // namespace softprompt_fast
