// SPDX-License-Identifier: Apache-2.0
// Vectors of one instruction set. The kernels are written once, over the compiler's vector
// extension (GCC, Clang); an isa_*.cpp defines SOFTPROMPT_FAST_ISA, the name of its namespace, and
// SOFTPROMPT_FAST_VECTOR_BYTES, and is compiled with the flags of that instruction set.
//
// Nothing here may include a standard header with inline functions: the linker keeps one copy of
// such a function, and if it keeps the one compiled for a newer processor an older one dies of it.
#pragma once

#include <stdint.h>

#if defined(__F16C__)
#include <immintrin.h>
#endif

#include "kernels.h"

#if !defined(SOFTPROMPT_FAST_ISA) || !defined(SOFTPROMPT_FAST_VECTOR_BYTES)
#error "include this from an isa_*.cpp only"
#endif

#define SOFTPROMPT_FAST_INLINE inline __attribute__((always_inline))

namespace softprompt_fast {
namespace SOFTPROMPT_FAST_ISA {

// Lanes of a vector of floats.
constexpr int W = SOFTPROMPT_FAST_VECTOR_BYTES / 4;

typedef float Vec __attribute__((vector_size(4 * W)));
typedef int32_t IntVec __attribute__((vector_size(4 * W)));
typedef uint32_t UintVec __attribute__((vector_size(4 * W)));
typedef uint16_t HalfVec __attribute__((vector_size(2 * W)));
typedef int8_t ByteVec __attribute__((vector_size(W)));

// The same at any address.
typedef float LooseVec __attribute__((vector_size(4 * W), aligned(4), may_alias));
typedef uint16_t LooseHalfVec __attribute__((vector_size(2 * W), aligned(2), may_alias));
typedef int8_t LooseByteVec __attribute__((vector_size(W), aligned(1), may_alias));

constexpr int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }
SOFTPROMPT_FAST_INLINE int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
SOFTPROMPT_FAST_INLINE int64_t max64(int64_t a, int64_t b) { return a > b ? a : b; }

SOFTPROMPT_FAST_INLINE Vec load(const float* p) { return *reinterpret_cast<const LooseVec*>(p); }
SOFTPROMPT_FAST_INLINE void store(float* p, Vec x) { *reinterpret_cast<LooseVec*>(p) = x; }
SOFTPROMPT_FAST_INLINE Vec splat(float x) { return x - Vec{}; }
SOFTPROMPT_FAST_INLINE Vec vmax(Vec a, Vec b) { return a > b ? a : b; }
SOFTPROMPT_FAST_INLINE Vec vmin(Vec a, Vec b) { return a < b ? a : b; }
SOFTPROMPT_FAST_INLINE Vec bits_to_float(IntVec x) { return reinterpret_cast<Vec>(x); }
SOFTPROMPT_FAST_INLINE IntVec float_to_bits(Vec x) { return reinterpret_cast<IntVec>(x); }

template <int Distance, int... Lane>
SOFTPROMPT_FAST_INLINE Vec swap_lanes(Vec x) {
  return __builtin_shufflevector(x, x, (Lane ^ Distance)...);
}

// Lane i of the result is lane i ^ Distance of x.
template <int Distance>
SOFTPROMPT_FAST_INLINE Vec swapped(Vec x) {
  if constexpr (W == 16) {
    return swap_lanes<Distance, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15>(x);
  } else if constexpr (W == 8) {
    return swap_lanes<Distance, 0, 1, 2, 3, 4, 5, 6, 7>(x);
  } else {
    return swap_lanes<Distance, 0, 1, 2, 3>(x);
  }
}

// log2(W) halvings; the order of the sum is the same at every call.
SOFTPROMPT_FAST_INLINE float sum(Vec x) {
  if constexpr (W > 8) x += swapped<8>(x);
  if constexpr (W > 4) x += swapped<4>(x);
  x += swapped<2>(x);
  x += swapped<1>(x);
  return x[0];
}

SOFTPROMPT_FAST_INLINE float largest(Vec x) {
  if constexpr (W > 8) x = vmax(x, swapped<8>(x));
  if constexpr (W > 4) x = vmax(x, swapped<4>(x));
  x = vmax(x, swapped<2>(x));
  x = vmax(x, swapped<1>(x));
  return x[0];
}

// e^x to 1 ulp or so: x = n ln 2 + r with |r| <= ln(2) / 2, e^r by a polynomial (fitted to a
// relative error of 3e-9), times 2^n. The rounding makes the bits of 2^n: its magic number carries
// the exponent's bias. Below -87.7, -inf included, exactly 0 (n = -127 has the bits of 0);
// above 88.4 inf; NaN stays NaN.
SOFTPROMPT_FAST_INLINE Vec exp(Vec x) {
  const Vec clamped = vmin(splat(89.0f), vmax(splat(-88.0f), x));  // in this order a NaN passes
  const Vec magic = splat(12582912.0f + 127.0f);  // 1.5 * 2^23: adding it rounds to an integer
  const Vec shifted = clamped * 1.44269504f + magic;
  const Vec n = shifted - magic;
  const Vec r = (clamped - n * 0.693359375f) - n * -2.12194440e-4f;  // ln 2 in two exact pieces
  Vec p = splat(1.381459837e-3f);
  p = p * r + 8.368716898e-3f;
  p = p * r + 4.166838805e-2f;
  p = p * r + 1.666652063e-1f;
  p = p * r + 4.999999345e-1f;
  p = p * (r * r) + r + 1.0f;
  return p * bits_to_float(float_to_bits(shifted) << 23);
}

// tanh x to 2 ulp or so: an odd polynomial near 0, where 1 - 2 / (e^2x + 1) would cancel.
SOFTPROMPT_FAST_INLINE Vec tanh(Vec x) {
  const Vec magnitude = vmax(x, -x);
  const Vec square = x * x;
  Vec p = splat(-5.704987420e-3f);
  p = p * square + 2.063908765e-2f;
  p = p * square + -5.373971522e-2f;
  p = p * square + 1.333144220e-1f;
  p = p * square + -3.333328194e-1f;
  const Vec near = x + x * square * p;
  const Vec far = 1.0f - 2.0f / (exp(vmin(splat(40.0f), magnitude * 2.0f)) + 1.0f);  // NaN passes
  const Vec signed_far = x < Vec{} ? -far : far;
  return magnitude < splat(0.625f) ? near : signed_far;
}

// ---- 16-bit and 8-bit storage, float arithmetic
// --------------------------------------------------

SOFTPROMPT_FAST_INLINE Vec load_bf16(const uint16_t* p) {
  const UintVec wide = __builtin_convertvector(*reinterpret_cast<const LooseHalfVec*>(p), UintVec);
  return reinterpret_cast<Vec>(wide << 16);
}

SOFTPROMPT_FAST_INLINE void store_bf16(uint16_t* p, Vec x) {
  const UintVec bits = reinterpret_cast<UintVec>(x);
  const UintVec rounded = bits + 0x7fffu + ((bits >> 16) & 1u);  // to nearest, ties to even
  const UintVec quiet = bits | 0x400000u;                        // a NaN must not round to inf
  const UintVec result = x == x ? rounded : quiet;
  *reinterpret_cast<LooseHalfVec*>(p) = __builtin_convertvector(result >> 16, HalfVec);
}

SOFTPROMPT_FAST_INLINE Vec load_f16(const uint16_t* p) {
#if defined(__F16C__) && SOFTPROMPT_FAST_VECTOR_BYTES == 64
  // maskz: the plain form starts from an undefined register, which GCC 12 warns about.
  const __m256i half = _mm256_loadu_si256((const __m256i*)p);
  return reinterpret_cast<Vec>(_mm512_maskz_cvtph_ps(0xffff, half));
#elif defined(__F16C__) && SOFTPROMPT_FAST_VECTOR_BYTES == 32
  return reinterpret_cast<Vec>(_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)));
#else
  const UintVec half = __builtin_convertvector(*reinterpret_cast<const LooseHalfVec*>(p), UintVec);
  const UintVec magnitude = (half & 0x7fffu) << 13;
  // Exponent bias 15 -> 127 by a multiplication, which also normalises subnormals.
  const Vec scaled = reinterpret_cast<Vec>(magnitude) * 5.192296858534828e33f;  // 2^112
  const UintVec finite = reinterpret_cast<UintVec>(scaled);
  const UintVec special = magnitude | 0x7f800000u;
  const UintVec bits = (half & 0x7c00u) == 0x7c00u ? special : finite;
  return reinterpret_cast<Vec>(bits | ((half & 0x8000u) << 16));
#endif
}

SOFTPROMPT_FAST_INLINE void store_f16(uint16_t* p, Vec x) {
#if defined(__F16C__) && SOFTPROMPT_FAST_VECTOR_BYTES == 64
  _mm256_storeu_si256((__m256i*)p, _mm512_maskz_cvtps_ph(0xffff, reinterpret_cast<__m512>(x), 0));
#elif defined(__F16C__) && SOFTPROMPT_FAST_VECTOR_BYTES == 32
  _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph(reinterpret_cast<__m256>(x), 0));
#else
  const UintVec all = reinterpret_cast<UintVec>(x);
  const UintVec sign = (all >> 16) & 0x8000u;
  const UintVec bits = all & 0x7fffffffu;
  const UintVec normal = (bits - (112u << 23) + 0xfffu + ((bits >> 13) & 1u)) >> 13;
  // Below 2^-14: adding 1/2 puts the subnormal's bits, rounded, at the bottom of the mantissa.
  const UintVec tiny = reinterpret_cast<UintVec>(reinterpret_cast<Vec>(bits) + 0.5f) - 0x3f000000u;
  const UintVec huge = bits > 0x7f800000u ? 0x7e00u - UintVec{} : 0x7c00u - UintVec{};
  const UintVec finite = bits < 0x38800000u ? tiny : normal;
  const UintVec result = (bits >= 0x47800000u ? huge : finite) | sign;
  *reinterpret_cast<LooseHalfVec*>(p) = __builtin_convertvector(result, HalfVec);
#endif
}

SOFTPROMPT_FAST_INLINE Vec load_i8(const int8_t* p) {
  return __builtin_convertvector(
      __builtin_convertvector(*reinterpret_cast<const LooseByteVec*>(p), IntVec), Vec);
}

// How elements of one storage type become vectors of floats and back.
struct Float32 {
  typedef float Element;
  static constexpr DType dtype = DType::kFloat32;
  static SOFTPROMPT_FAST_INLINE Vec load(const float* p) { return SOFTPROMPT_FAST_ISA::load(p); }
  static SOFTPROMPT_FAST_INLINE void store(float* p, Vec x) { SOFTPROMPT_FAST_ISA::store(p, x); }
};
struct BFloat16 {
  typedef uint16_t Element;
  static constexpr DType dtype = DType::kBFloat16;
  static SOFTPROMPT_FAST_INLINE Vec load(const uint16_t* p) { return load_bf16(p); }
  static SOFTPROMPT_FAST_INLINE void store(uint16_t* p, Vec x) { store_bf16(p, x); }
};
struct Float16 {
  typedef uint16_t Element;
  static constexpr DType dtype = DType::kFloat16;
  static SOFTPROMPT_FAST_INLINE Vec load(const uint16_t* p) { return load_f16(p); }
  static SOFTPROMPT_FAST_INLINE void store(uint16_t* p, Vec x) { store_f16(p, x); }
};
struct Int8 {
  typedef int8_t Element;
  static constexpr DType dtype = DType::kInt8;
  static SOFTPROMPT_FAST_INLINE Vec load(const int8_t* p) { return load_i8(p); }
};

// A vector whose first `count` lanes come from p, which ends there; the others are 0.
template <typename Storage>
SOFTPROMPT_FAST_INLINE Vec load_some(const typename Storage::Element* p, int64_t count) {
#if SOFTPROMPT_FAST_VECTOR_BYTES == 64
  if constexpr (sizeof(typename Storage::Element) == 4) {
    // Heads of 72, 88, ... end so: one load, where that of the stores below would stall.
    if (count == 8) {
      typedef float Half __attribute__((vector_size(32)));
      typedef float LooseHalf __attribute__((vector_size(32), aligned(4), may_alias));
      const Half low = *reinterpret_cast<const LooseHalf*>(p);
      return __builtin_shufflevector(low, Half{}, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14,
                                     15);
    }
  }
#endif
  typename Storage::Element padded[W] = {};
  for (int64_t i = 0; i < count; ++i) padded[i] = p[i];
  return Storage::load(padded);
}

template <typename Storage>
SOFTPROMPT_FAST_INLINE void store_some(typename Storage::Element* p, Vec x, int64_t count) {
  typename Storage::Element padded[W];
  Storage::store(padded, x);
  for (int64_t i = 0; i < count; ++i) p[i] = padded[i];
}

// Call body(Storage()) for a run-time dtype.
template <typename Body>
SOFTPROMPT_FAST_INLINE void with_storage(DType dtype, Body&& body) {
  switch (dtype) {
    case DType::kFloat32:
      return body(Float32());
    case DType::kBFloat16:
      return body(BFloat16());
    case DType::kFloat16:
      return body(Float16());
    case DType::kInt8:
      return;  // stored by no op
  }
}

}  // namespace SOFTPROMPT_FAST_ISA
}  // namespace softprompt_fast
