// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "linear_kernel.h"
#include "training.h"

namespace softprompt_fast {
namespace SOFTPROMPT_FAST_ISA {

// One panel of B as multiply_panel wants it, [depth, kPanel], filled up with zeros.
inline void gather_panel(const Product& op, int64_t panel, float* to) {
  const int64_t column = panel * kPanel, columns = min64(kPanel, op.columns - column);
  const float* from = op.w + column * op.w_column;
  int64_t n = 0;
  if (op.w_column == 1) {
    const int64_t whole = columns / W * W;
    for (int64_t k = 0; k < op.depth; ++k) {
      for (n = 0; n < whole; n += W) store(to + k * kPanel + n, load(from + k * op.w_depth + n));
    }
    n = whole;
  } else {
    for (; n + W <= columns; n += W) {
      const float* rows = from + n * op.w_column;
      int64_t k = 0;
      for (; k + W <= op.depth; k += W) {
        transpose(rows + k, op.w_column, to + k * kPanel + n, kPanel);
      }
      for (; k < op.depth; ++k) {
        for (int64_t i = 0; i < W; ++i) to[k * kPanel + n + i] = rows[i * op.w_column + k];
      }
    }
  }
  for (; n < kPanel; ++n) {
    for (int64_t k = 0; k < op.depth; ++k) {
      to[k * kPanel + n] = n < columns ? from[n * op.w_column + k * op.w_depth] : 0.0f;
    }
  }
}

// body(row, rows, panel) for every block of rows and the panels [first, last): a block is read into
// the cache once for all of them.
template <typename Body>
SOFTPROMPT_FAST_INLINE void for_blocks(int64_t row, int64_t rows, int64_t first, int64_t last,
                                       Body&& body) {
  for (const int64_t end = row + rows; row < end; row += kRowBlock) {
    for (int64_t panel = first; panel < last; ++panel) {
      body(row, min64(kRowBlock, end - row), panel);
    }
  }
}

SOFTPROMPT_FAST_INLINE void multiply_gathered(const Product& op, int64_t row, int64_t rows,
                                              const float* panel, float* c, int64_t c_row,
                                              bool keep) {
  multiply_panel<Float32>(rows, op.depth, op.x + row * op.x_row, op.x_row, panel, c, c_row, keep);
}

// Rows [row, row + rows) of panels [first, last). Scratch: the panels, and one [kRowBlock, kPanel].
inline void product(const Product& op, int64_t first, int64_t last, int64_t row, int64_t rows,
                    float* scratch) {
  const int64_t size = op.depth * kPanel;
  float* part = scratch + (last - first) * size;
  for (int64_t panel = first; panel < last; ++panel) {
    gather_panel(op, panel, scratch + (panel - first) * size);
  }
  for_blocks(row, rows, first, last, [&](int64_t at, int64_t some, int64_t panel) {
    const int64_t column = panel * kPanel, columns = min64(kPanel, op.columns - column);
    const float* gathered = scratch + (panel - first) * size;
    const float* bias = op.bias ? op.bias + column : nullptr;
    float* out = op.out + at * op.out_row + column;
    if (columns == kPanel) {
      multiply_gathered(op, at, some, gathered, out, op.out_row, op.add);
      if (bias) add_bias(bias, columns, some, out, op.out_row);
      return;
    }
    multiply_gathered(op, at, some, gathered, part, kPanel, false);
    for (int64_t r = 0; r < some; ++r) {
      for (int64_t i = 0; i < columns; ++i) {
        float& to = out[r * op.out_row + i];
        to = (op.add ? to : 0.0f) + part[r * kPanel + i] + (bias ? bias[i] : 0.0f);
      }
    }
  });
}

// Scratch: twice the panels, and two of [kRowBlock, kPanel].
inline void gated_product(const GatedProduct& op, int64_t first, int64_t last, int64_t row,
                          int64_t rows, float* scratch) {
  const int64_t size = op.gate.depth * kPanel, width = op.gate.columns;
  float* ups = scratch + (last - first) * size;
  float *gate = ups + (last - first) * size, *up = gate + kRowBlock * kPanel;
  for (int64_t panel = first; panel < last; ++panel) {
    gather_panel(op.gate, panel, scratch + (panel - first) * size);
    gather_panel(op.up, panel, ups + (panel - first) * size);
  }
  for_blocks(row, rows, first, last, [&](int64_t at, int64_t some, int64_t panel) {
    const int64_t column = panel * kPanel, columns = min64(kPanel, width - column);
    const int64_t gathered = (panel - first) * size;
    multiply_gathered(op.gate, at, some, scratch + gathered, gate, kPanel, false);
    multiply_gathered(op.up, at, some, ups + gathered, up, kPanel, false);
    if (op.gate.bias) add_bias(op.gate.bias + column, columns, some, gate, kPanel);
    if (op.up.bias) add_bias(op.up.bias + column, columns, some, up, kPanel);
    for (int64_t r = 0; r < some; ++r) {
      float *g = gate + r * kPanel, *u = up + r * kPanel;
      const int64_t place = (at + r) * width + column;
      write_row(g, columns, op.gate.out + (at + r) * op.gate.out_row + column, DType::kFloat32, 1);
      write_row(u, columns, op.up.out + (at + r) * op.up.out_row + column, DType::kFloat32, 1);
      for (int64_t i = 0; i < kPanel; i += W) {
        store(g + i, activate(op.activation, load(g + i)) * load(u + i));
      }
      write_row(g, columns, op.out + place, DType::kFloat32, 1);
    }
  });
}

// The activation and its derivative.
SOFTPROMPT_FAST_INLINE void differentiate(Activation activation, Vec x, Vec& value, Vec& slope) {
  switch (activation) {
    case Activation::kSilu: {
      const Vec sigmoid = 1.0f / (1.0f + exp(-x));
      value = x * sigmoid;
      slope = sigmoid + value * (1.0f - sigmoid);
      return;
    }
    case Activation::kGeluTanh: {
      const Vec inner = 0.7978845608f * (x + 0.044715f * x * x * x);
      const Vec turned = tanh(inner), half = 0.5f * (1.0f + turned);
      const Vec inner_slope = 0.7978845608f * (1.0f + 0.134145f * x * x);
      value = x * half;
      slope = half + 0.5f * x * (1.0f - turned * turned) * inner_slope;
      return;
    }
    case Activation::kGelu: {
      float lanes[W];
      store(lanes, x);
      for (int i = 0; i < W; ++i) {
        lanes[i] = 0.5f * (1.0f + __builtin_erff(lanes[i] * 0.70710678f));
      }
      const Vec probability = load(lanes);  // the normal distribution's, and its density below
      value = x * probability;
      slope = probability + x * 0.3989422804f * exp(-0.5f * x * x);
      return;
    }
  }
}

// Scratch: the panels, and one [kRowBlock, kPanel].
inline void gated_product_backward(const GatedProductBackward& op, int64_t first, int64_t last,
                                   int64_t row, int64_t rows, float* scratch) {
  const Product& p = op.product;
  const int64_t size = p.depth * kPanel, width = p.columns;
  float* part = scratch + (last - first) * size;
  for (int64_t panel = first; panel < last; ++panel) {
    gather_panel(p, panel, scratch + (panel - first) * size);
  }
  for_blocks(row, rows, first, last, [&](int64_t at, int64_t some, int64_t panel) {
    const int64_t column = panel * kPanel, columns = min64(kPanel, width - column);
    multiply_gathered(p, at, some, scratch + (panel - first) * size, part, kPanel, false);
    for (int64_t r = 0; r < some; ++r) {
      const int64_t place = (at + r) * width + column;
      for (int64_t i = 0; i < columns; i += W) {
        const int64_t rest = columns - i;
        const auto read = [&](const float* from) {
          return rest >= W ? load(from + i) : load_some<Float32>(from + i, rest);
        };
        const auto write = [&](float* to, Vec x) {
          if (rest >= W) return store(to + i, x);
          store_some<Float32>(to + i, x, rest);
        };
        Vec value = {}, slope = {};
        const Vec grad = load(part + r * kPanel + i);
        differentiate(op.activation, read(op.gate + place), value, slope);
        write(op.grad_gate + place, grad * read(op.up + place) * slope);
        write(op.grad_up + place, grad * value);
      }
    }
  });
}

inline void norm_rows_backward(const NormRowsBackward& op, int64_t first, int64_t last) {
  const int64_t columns = op.columns;
  for (int64_t row = first; row < last; ++row) {
    const float *x = op.x + row * columns, *grad = op.grad + row * columns;
    float* out = op.out + row * columns;
    const auto scaled = [&](int64_t i, int64_t count) {
      const auto read = [&](const float* from) {
        return count >= W ? load(from + i) : load_some<Float32>(from + i, count);
      };
      return op.norm.weight ? read(grad) * (read(op.norm.weight) + op.norm.offset) : read(grad);
    };
    Vec squares = Vec{}, products = Vec{};
    for (int64_t i = 0; i < columns; i += W) {
      const int64_t rest = columns - i;
      const Vec value = rest >= W ? load(x + i) : load_some<Float32>(x + i, rest);
      squares += value * value;
      products += value * scaled(i, rest);
    }
    const float inverse = 1.0f / __builtin_sqrtf(sum(squares) / columns + op.norm.eps);
    const float share = inverse * inverse * sum(products) / columns;
    for (int64_t i = 0; i < columns; i += W) {
      const int64_t rest = columns - i;
      if (rest >= W) {
        const Vec value = (scaled(i, rest) - load(x + i) * share) * inverse;
        store(out + i, op.add ? load(out + i) + value : value);
      } else {
        Vec value = (scaled(i, rest) - load_some<Float32>(x + i, rest) * share) * inverse;
        if (op.add) value += load_some<Float32>(out + i, rest);
        store_some<Float32>(out + i, value, rest);
      }
    }
  }
}

// One head's pairs (x_i, x_j): what `rotate` does, transposed.
SOFTPROMPT_FAST_INLINE void rotate_transposed(float* x, const float* cos, const float* sin,
                                              int64_t rotated) {
  const int64_t half = rotated / 2;
  int64_t i = 0;
  for (; i + W <= half; i += W) {
    const Vec one = load(x + i), two = load(x + half + i);
    store(x + i, one * load(cos + i) + two * load(sin + half + i));
    store(x + half + i, two * load(cos + half + i) - one * load(sin + i));
  }
  for (; i < half; ++i) {
    const float one = x[i], two = x[half + i];
    x[i] = one * cos[i] + two * sin[half + i];
    x[half + i] = two * cos[half + i] - one * sin[i];
  }
}

inline void rotate_rows(const RotateRows& op, int64_t first, int64_t last) {
  for (int64_t row = first; row < last; ++row) {
    const float *cos = op.cos + row * op.rotated, *sin = op.sin + row * op.rotated;
    for (int64_t head = 0; head < op.heads; ++head) {
      float* x = op.x + (row * op.heads + head) * op.head_dim;
      if (op.transposed) {
        rotate_transposed(x, cos, sin, op.rotated);
      } else {
        rotate(x, cos, sin, op.rotated, false);
      }
    }
  }
}

inline void cross_entropy_rows(const CrossEntropyRows& op, int64_t first, int64_t last) {
  const int64_t columns = op.columns, whole = columns / W * W;
  for (int64_t row = first; row < last; ++row) {
    float* x = op.logits + row * columns;
    const int64_t label = op.labels[row];
    const float weight = label < 0 ? 0.0f : op.weights ? op.weights[row] : 1.0f;
    if (label < 0) {
      op.losses[row] = 0.0f;
      if (op.gradient) {
        for (int64_t i = 0; i < columns; ++i) x[i] = 0.0f;
      }
      continue;
    }
    float most = x[0];
    if (whole > 0) {
      Vec mosts = load(x);
      for (int64_t i = W; i < whole; i += W) mosts = vmax(mosts, load(x + i));
      most = largest(mosts);
    }
    for (int64_t i = whole; i < columns; ++i) most = x[i] > most ? x[i] : most;
    const float chosen = x[label];
    // Long sums lose digits: those of 64 vectors each are added up in double.
    double total = 0.0;
    for (int64_t block = 0; block < columns; block += 64 * W) {
      const int64_t end = min64(columns, block + 64 * W);
      Vec sums = Vec{};
      for (int64_t i = block; i < end; i += W) {
        const int64_t rest = end - i;
        Vec value = exp((rest >= W ? load(x + i) : load_some<Float32>(x + i, rest)) - most);
        if (rest >= W) {
          if (op.gradient) store(x + i, value);
        } else {
          float lanes[W];
          store(lanes, value);
          for (int64_t j = rest; j < W; ++j) lanes[j] = 0.0f;
          value = load(lanes);
          if (op.gradient) store_some<Float32>(x + i, value, rest);
        }
        sums += value;
      }
      total += sum(sums);
    }
    op.losses[row] = weight * (float)(__builtin_log(total) + most - chosen);
    if (!op.gradient) continue;
    const float factor = (float)(weight / total);
    for (int64_t i = 0; i < whole; i += W) store(x + i, load(x + i) * factor);
    for (int64_t i = whole; i < columns; ++i) x[i] *= factor;
    x[label] -= weight;
  }
}

}  // namespace SOFTPROMPT_FAST_ISA
}  // namespace softprompt_fast
