// SPDX-License-Identifier: Apache-2.0
// Checks of the vector building blocks (simd.h, tile.h, strided.h) against plain scalar code, for
// the instruction set that the macros and flags of the compilation choose. tests/test_simd.py
// compiles and runs it. Prints each failure, and returns 1 if there was any.
#include <cmath>
#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <limits>
#include <vector>

#include "../cpu/strided.h"
#include "../cpu/tile.h"

namespace {

using namespace softprompt_fast::SOFTPROMPT_FAST_ISA;

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
constexpr float kSentinel = -12345.0f;

int failures = 0;

__attribute__((format(printf, 2, 3))) void expect(bool holds, const char* format, ...) {
  if (holds || ++failures > 20) return;
  va_list arguments;
  va_start(arguments, format);
  std::vprintf(format, arguments);
  va_end(arguments);
  std::printf("\n");
}

float from_bits(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

uint32_t to_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}

// The same small numbers at every run, none of them special.
float number(int64_t i) {
  return static_cast<float>(static_cast<int64_t>((i * 2654435761u + 12345u) % 2003) - 1001) / 64.0f;
}

// ---- exp and tanh
// --------------------------------------------------------------------------------

// Error in units of the last place of the exact result.
double ulps(float found, double exact) {
  const int exponent = std::ilogb(exact);
  return std::fabs(found - exact) / std::ldexp(1.0, (exponent < -126 ? -126 : exponent) - 23);
}

// Call body(x) for vectors of floats from `from` to `to` of one sign, `step` bit patterns apart.
template <typename Body>
void for_floats(float from, float to, uint32_t step, Body&& body) {
  uint32_t bits = to_bits(from);
  const uint32_t last = to_bits(to);
  while (bits <= last) {
    float lanes[W];
    for (int i = 0; i < W; ++i, bits += step) lanes[i] = from_bits(bits < last ? bits : last);
    body(lanes);
  }
}

void check_exp() {
  double worst = 0;
  float at = 0;
  const auto check = [&](const float* x) {
    float found[W];
    store(found, exp(load(x)));
    for (int i = 0; i < W; ++i) {
      const double error = ulps(found[i], std::exp(static_cast<double>(x[i])));
      if (!(error <= worst)) worst = error, at = x[i];
    }
  };
  for_floats(0.0f, 88.3f, 211, check);
  for_floats(-0.0f, -87.3f, 211, check);
  for_floats(1.0f, 88.3f, 3, check);  // where rounding of the range reduction would show
  for_floats(-1.0f, -87.3f, 3, check);
  expect(worst <= 2, "exp: error of %.3f ulp at %.9g, expected at most 2", worst, at);
  std::printf("exp: at most %.3f ulp (at %.9g)\n", worst, at);

  // Its documented ends: the last binade of floats is inf, the subnormals are 0.
  for (float x : {88.4f, 89.0f, 200.0f, 3.4e38f, kInfinity}) {
    expect(exp(splat(x))[0] == kInfinity, "exp(%g): expected inf, found %g", x, exp(splat(x))[0]);
  }
  const float zero[] = {-87.7f, -88.0f, -104.0f, -1e4f, -3.4e38f, -kInfinity};
  for (float x : zero) {
    const float found = exp(splat(x))[W - 1];
    expect(to_bits(found) == 0, "exp(%g): expected 0, found %g", x, found);
  }
  expect(exp(splat(0.0f))[0] == 1.0f && exp(splat(-0.0f))[0] == 1.0f, "exp(0): expected 1");
  expect(std::isnan(exp(splat(kNaN))[0]), "exp(NaN): expected NaN");
  // One lane's surprise is not its neighbour's.
  Vec mixed = splat(1.0f);
  mixed[0] = kNaN;
  mixed[1] = -kInfinity;
  const Vec found = exp(mixed);
  expect(std::isnan(found[0]) && found[1] == 0.0f && ulps(found[2], std::exp(1.0)) <= 2,
         "exp(NaN, -inf, 1): found %g, %g, %g", found[0], found[1], found[2]);
}

void check_tanh() {
  double worst = 0;
  float at = 0;
  const auto check = [&](const float* x) {
    float found[W];
    store(found, tanh(load(x)));
    for (int i = 0; i < W; ++i) {
      const double error = x[i] == 0.0f ? (found[i] == 0.0f ? 0 : kInfinity)
                                        : ulps(found[i], std::tanh(static_cast<double>(x[i])));
      if (!(error <= worst)) worst = error, at = x[i];
    }
  };
  for_floats(0.0f, 3.4e38f, 211, check);
  for_floats(-0.0f, -3.4e38f, 211, check);
  for_floats(0.25f, 20.0f, 3, check);  // around the seam of the two formulas and up to 1
  for_floats(-0.25f, -20.0f, 3, check);
  expect(worst <= 4, "tanh: error of %.3f ulp at %.9g, expected at most 4", worst, at);
  std::printf("tanh: at most %.3f ulp (at %.9g)\n", worst, at);
  expect(tanh(splat(kInfinity))[0] == 1.0f && tanh(splat(-kInfinity))[0] == -1.0f,
         "tanh(+-inf): expected +-1");
  expect(std::isnan(tanh(splat(kNaN))[0]), "tanh(NaN): expected NaN");
}

void check_reductions() {
  for (int trial = 0; trial < 100; ++trial) {
    Vec x;
    double total = 0;
    float most = -kInfinity;
    for (int i = 0; i < W; ++i) {
      x[i] = number(trial * 31 + i);
      total += x[i];
      most = x[i] > most ? x[i] : most;
    }
    // Multiples of 1/64 below 16: their sum is exact in any order.
    expect(sum(x) == total, "sum: expected %g, found %g", total, sum(x));
    expect(largest(x) == most, "largest: expected %g, found %g", most, largest(x));
  }
}

// ---- 16 and 8 bits
// -------------------------------------------------------------------------------

// A 16-bit format: its bits of mantissa and its smallest normal exponent, the largest being 1 - it.
struct Format {
  const char* name;
  int mantissa, exponent;
};
constexpr Format kBFloat16 = {"bf16", 7, -126}, kFloat16 = {"f16", 10, -14};

double decode(Format f, uint16_t bits) {
  const int fraction = bits & ((1 << f.mantissa) - 1), biased = (bits & 0x7fff) >> f.mantissa;
  const double sign = bits & 0x8000 ? -1 : 1;
  if (biased == 0x7fff >> f.mantissa) {
    return fraction ? static_cast<double>(kNaN) : sign * static_cast<double>(kInfinity);
  }
  const int whole = biased ? 1 << f.mantissa : 0;
  return sign * std::ldexp(whole + fraction, f.exponent - f.mantissa + (biased ? biased - 1 : 0));
}

// To nearest, ties to even: nearbyint's own rounding, in units of the result's last place.
uint16_t encode(Format f, float x) {
  const uint16_t sign = std::signbit(x) ? 0x8000 : 0;
  const double magnitude = std::fabs(static_cast<double>(x));
  const auto infinity = static_cast<uint16_t>(0x7fff >> f.mantissa << f.mantissa);
  if (std::isinf(x)) return sign | infinity;
  int exponent = magnitude > 0 ? std::ilogb(magnitude) : f.exponent;
  exponent = exponent < f.exponent ? f.exponent : exponent;
  const double units = std::nearbyint(std::ldexp(magnitude, f.mantissa - exponent));
  // A rounding up to the next power of two carries into the exponent by itself, and into infinity.
  const auto bits =
      static_cast<int64_t>(units) + (static_cast<int64_t>(exponent - f.exponent) << f.mantissa);
  return sign | static_cast<uint16_t>(bits < infinity ? bits : infinity);
}

template <typename Storage>
void check_halves(Format f) {
  const auto narrow = [](const float* x, uint16_t* to) { Storage::store(to, load(x)); };
  for (int first = 0; first < 65536; first += W) {
    uint16_t patterns[W], back[W];
    float values[W];
    for (int i = 0; i < W; ++i) patterns[i] = static_cast<uint16_t>(first + i);
    store(values, Storage::load(patterns));
    narrow(values, back);
    for (int i = 0; i < W; ++i) {
      const double exact = decode(f, patterns[i]);
      if (std::isnan(exact)) {
        expect(std::isnan(values[i]) && std::isnan(decode(f, back[i])),
               "%s %04x: expected NaN and back, found %g and %04x", f.name, patterns[i], values[i],
               back[i]);
        continue;
      }
      expect(to_bits(values[i]) == to_bits(static_cast<float>(exact)),
             "%s %04x: expected %g, found %g", f.name, patterns[i], exact, values[i]);
      expect(back[i] == patterns[i], "%s of %g: expected %04x, found %04x", f.name, exact,
             patterns[i], back[i]);
    }
  }

  std::vector<float> inputs;
  // Between each pattern and the next, behind the last one too: the middle, and a float beside it.
  for (int pattern = 0; pattern < 65536; ++pattern) {
    const auto here = static_cast<uint16_t>(pattern), next = static_cast<uint16_t>(pattern + 1);
    if (std::isnan(decode(f, here)) || std::isinf(decode(f, here))) continue;
    double end = decode(f, next);
    if (std::isinf(end)) end = std::copysign(std::ldexp(1.0, 2 - f.exponent), end);
    const auto middle = static_cast<float>((decode(f, here) + end) / 2);
    for (float x : {middle, std::nextafter(middle, 0.0f), std::nextafter(middle, 2 * middle)}) {
      inputs.push_back(x);
    }
  }
  for (uint32_t bits = 0; bits < 0xffff0000u; bits += 4099) inputs.push_back(from_bits(bits));
  while (inputs.size() % W != 0) inputs.push_back(0.0f);
  for (size_t first = 0; first < inputs.size(); first += W) {
    uint16_t found[W];
    narrow(&inputs[first], found);
    for (int i = 0; i < W; ++i) {
      const float x = inputs[first + i];
      if (std::isnan(x)) {
        expect(std::isnan(decode(f, found[i])), "%s of a NaN: found %04x", f.name, found[i]);
        continue;
      }
      expect(found[i] == encode(f, x), "%s of %.9g: expected %04x, found %04x", f.name, x,
             encode(f, x), found[i]);
    }
  }
}

void check_bytes() {
  int8_t bytes[256 + W] = {};
  for (int i = 0; i < 256; ++i) bytes[i] = static_cast<int8_t>(i - 128);
  for (int first = 0; first < 256; ++first) {  // any alignment
    const float found = Int8::load(bytes + first)[0];
    expect(found == static_cast<float>(first - 128), "int8 %d: found %g", first - 128, found);
  }
}

// ---- rows
// ----------------------------------------------------------------------------------------

template <typename Storage>
typename Storage::Element stored(float x) {
  typename Storage::Element row[W];
  Storage::store(row, splat(x));
  return row[0];
}

template <typename Storage>
float loaded(typename Storage::Element x) {
  typename Storage::Element row[W];
  for (auto& element : row) element = x;
  return Storage::load(row)[0];
}

// Rows of every length and stride, from and to a buffer with sentinels between and behind.
template <typename Storage>
void check_rows() {
  typedef typename Storage::Element Element;
  for (int64_t stride : {1, 3}) {
    for (int64_t count = 0; count <= 3 * W + 1; ++count) {
      std::vector<Element> memory(count * stride + 2 * W, stored<Storage>(kNaN));
      for (int64_t i = 0; i < count; ++i) memory[i * stride] = stored<Storage>(number(i));
      const int64_t padded = (count + W - 1) / W * W + W;
      std::vector<float> row(padded + W, kSentinel);
      read_row(memory.data(), Storage::dtype, stride, count, padded, 0.5f, row.data());
      for (int64_t i = 0; i < padded + W; ++i) {
        const float want = i >= padded  ? kSentinel
                           : i >= count ? 0.0f
                                        : loaded<Storage>(memory[i * stride]) * 0.5f;
        expect(row[i] == want, "read_row of %d, stride %d: place %d: expected %g, found %g",
               (int)count, (int)stride, (int)i, want, row[i]);
      }
      for (int64_t first = 0; first < count; first += W) {
        const Vec x = load_strided<Storage>(&memory[first * stride], stride, count - first);
        for (int64_t i = 0; i < W; ++i) {
          const int64_t at = first + i;
          const float want = at < count ? loaded<Storage>(memory[at * stride]) : 0.0f;
          expect(x[i] == want, "load_strided of %d, stride %d: place %d: expected %g, found %g",
                 (int)count, (int)stride, (int)at, want, x[i]);
        }
      }

      std::vector<float> source(padded);
      for (int64_t i = 0; i < padded; ++i) source[i] = number(i + 7);
      for (bool by_vector : {false, true}) {
        std::vector<Element> target(count * stride + 2 * W, stored<Storage>(kSentinel));
        if (by_vector) {
          for (int64_t i = 0; i < count; i += W) {
            store_strided<Storage>(&target[i * stride], stride, count - i, load(&source[i]));
          }
        } else {
          write_row(source.data(), count, target.data(), Storage::dtype, stride);
        }
        for (int64_t i = 0; i < static_cast<int64_t>(target.size()); ++i) {
          const bool written = i % stride == 0 && i / stride < count;
          const Element want = stored<Storage>(written ? source[i / stride] : kSentinel);
          expect(target[i] == want, "%s of %d, stride %d: element %d differs",
                 by_vector ? "store_strided" : "write_row", (int)count, (int)stride, (int)i);
        }
      }
    }
  }
}

void check_transpose() {
  const int64_t from_row = W + 3, to_row = W + 5;
  std::vector<float> from(W * from_row), to(W * to_row, kSentinel);
  for (size_t i = 0; i < from.size(); ++i) from[i] = static_cast<float>(i);
  transpose(from.data(), from_row, to.data(), to_row);
  for (int64_t i = 0; i < W; ++i) {
    for (int64_t j = 0; j < to_row; ++j) {
      const float want = j < W ? from[j * from_row + i] : kSentinel;
      expect(to[i * to_row + j] == want, "transpose: [%d, %d]: expected %g, found %g", (int)i,
             (int)j, want, to[i * to_row + j]);
    }
  }
}

// C (+)= A B for all small shapes, A as it is and transposed.
void check_matmul() {
  for (int64_t rows = 1; rows <= 20; ++rows) {
    for (int64_t columns = W; columns <= 11 * W; columns += W) {
      for (int64_t depth : {0, 1, 5, 33}) {
        for (int variant = 0; variant < 4; ++variant) {
          const bool transposed = variant & 1, keep = variant & 2;
          const int64_t a_row = transposed ? 1 : depth + 2, a_col = transposed ? rows + 1 : 1;
          const int64_t b_row = columns + 3, c_row = columns + 1;
          std::vector<float> a(rows * a_row + depth * a_col + 1, kNaN), b(depth * b_row + 1, kNaN);
          std::vector<float> c(rows * c_row, kSentinel), before;
          // Multiples of 1/64 below 16: products and sums are exact in float.
          const auto value = [](int64_t i) { return std::trunc(number(i)); };
          for (int64_t r = 0; r < rows; ++r) {
            for (int64_t k = 0; k < depth; ++k) a[r * a_row + k * a_col] = value(r * 41 + k);
          }
          for (int64_t k = 0; k < depth; ++k) {
            for (int64_t j = 0; j < columns; ++j) b[k * b_row + j] = value(k * 977 + j + 5);
          }
          for (int64_t r = 0; r < rows; ++r) {
            for (int64_t j = 0; j < columns; ++j) c[r * c_row + j] = keep ? value(r + j) : kNaN;
          }
          before = c;
          matmul(rows, columns, depth, a.data(), a_row, a_col, b.data(), b_row, c.data(), c_row,
                 keep);
          for (int64_t r = 0; r < rows; ++r) {
            for (int64_t j = 0; j < c_row; ++j) {
              double want = keep || j >= columns ? before[r * c_row + j] : 0.0;
              for (int64_t k = 0; j < columns && k < depth; ++k) {
                want += a[r * a_row + k * a_col] * b[k * b_row + j];
              }
              expect(c[r * c_row + j] == want,
                     "matmul %d x %d x %d%s%s: [%d, %d]: expected %g, found %g", (int)rows,
                     (int)columns, (int)depth, transposed ? ", A transposed" : "",
                     keep ? ", added" : "", (int)r, (int)j, want, c[r * c_row + j]);
            }
          }
        }
      }
    }
  }
}

}  // namespace

int main() {
  check_exp();
  check_tanh();
  check_reductions();
  check_halves<BFloat16>(::kBFloat16);
  check_halves<Float16>(::kFloat16);
  check_bytes();
  check_rows<Float32>();
  check_rows<BFloat16>();
  check_rows<Float16>();
  check_transpose();
  check_matmul();
  std::printf("%d failures with vectors of %d\n", failures, W);
  return failures ? 1 : 0;
}
