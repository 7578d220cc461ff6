// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "linear.h"
#include "tile.h"

namespace softprompt_fast {
namespace SOFTPROMPT_FAST_ISA {

// W [rows, columns] of any storage into panels [columns, kPanel] of the same storage.
inline void pack_panel(const Tensor& w, int64_t rows, int64_t columns, void* panel) {
  // Moves bits only: by element size, whatever the type.
  const auto move = [&](auto* to, const auto* from) {
    for (int64_t k = 0; k < columns; ++k) {
      for (int64_t n = 0; n < kPanel; ++n) {
        to[k * kPanel + n] = n < rows ? from[n * w.stride[0] + k * w.stride[1]] : 0;
      }
    }
  };
  if (size_of(w.dtype) == 4) {
    move((uint32_t*)panel, (const uint32_t*)w.data);
  } else {
    move((uint16_t*)panel, (const uint16_t*)w.data);
  }
}

// One panel: c[rows, kPanel] = (keep ? c : 0) + x panel.
template <typename Storage>
inline void multiply_panel(int64_t rows, int64_t depth, const float* x, int64_t x_row,
                           const typename Storage::Element* panel, float* c, int64_t c_row,
                           bool keep) {
  constexpr int kVectors = 2;
  for (int64_t k = 0; k < depth; k += kDepthBlock) {
    const int64_t some = min64(kDepthBlock, depth - k);
    // The next panel follows at once.
    const Next next = {(const char*)(panel + (k + some) * kPanel),
                       some * kPanel * (int64_t)sizeof(*panel) / 64};
    for (int64_t v = 0; v < kPanel; v += kVectors * W) {
      tile_column<kVectors, Storage>(rows, some, x + k, x_row, 1, panel + k * kPanel + v, kPanel,
                                     c + v, c_row, keep || k > 0, nullptr, v == 0 ? next : Next{});
    }
  }
}

inline void multiply_panel(const Linear& op, int64_t panel, int64_t first, int64_t rows, float* c,
                           int64_t c_row, bool keep) {
  const PackedWeights& w = op.weights;
  with_storage(w.dtype, [&](auto storage) {
    typedef decltype(storage) Storage;
    multiply_panel<Storage>(rows, w.in_features, op.x + first * op.x_row, op.x_row,
                            (const typename Storage::Element*)w.panel(panel), c, c_row, keep);
  });
}

SOFTPROMPT_FAST_INLINE void add_bias(const float* bias, int64_t columns, int64_t rows, float* c,
                                     int64_t c_row) {
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t i = 0; i < columns; ++i) c[r * c_row + i] += bias[i];
  }
}

// The section that a panel belongs to.
SOFTPROMPT_FAST_INLINE int64_t section_of(const PackedWeights& w, int64_t panel) {
  int64_t section = 0;
  while (w.first_panel[section + 1] <= panel) ++section;
  return section;
}

// Panels [first, last) for rows [row, row + rows). Scratch: [kRowBlock, kPanel].
inline void linear(const Linear& op, int64_t first, int64_t last, int64_t row, int64_t rows,
                   float* scratch) {
  const PackedWeights& w = op.weights;
  const int64_t out_row = w.out_features();
  int64_t section = section_of(w, first);
  for (int64_t panel = first; panel < last; ++panel) {
    while (w.first_panel[section + 1] <= panel) ++section;
    const int64_t column = w.first_column[section] + (panel - w.first_panel[section]) * kPanel;
    const int64_t columns = min64(kPanel, w.first_column[section + 1] - column);
    float* out = op.out + row * out_row + column;
    const float* bias = op.bias ? op.bias + column : nullptr;
    if (columns == kPanel) {
      multiply_panel(op, panel, row, rows, out, out_row, op.add);
      if (bias) add_bias(bias, columns, rows, out, out_row);
      continue;
    }
    multiply_panel(op, panel, row, rows, scratch, kPanel, false);
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t i = 0; i < columns; ++i) {
        float& to = out[r * out_row + i];
        to = (op.add ? to : 0.0f) + scratch[r * kPanel + i] + (bias ? bias[i] : 0.0f);
      }
    }
  }
}

SOFTPROMPT_FAST_INLINE Vec activate(Activation activation, Vec x) {
  switch (activation) {
    case Activation::kSilu:
      return x / (1.0f + exp(-x));
    case Activation::kGeluTanh:
      return 0.5f * x * (1.0f + tanh(0.7978845608f * (x + 0.044715f * x * x * x)));
    case Activation::kGelu: {
      float lanes[W];
      store(lanes, x);
      for (int i = 0; i < W; ++i) {
        lanes[i] = 0.5f * lanes[i] * (1.0f + __builtin_erff(lanes[i] * 0.70710678f));
      }
      return load(lanes);
    }
  }
  return x;
}

// Panels [first, last) of the gate, with those of up. Scratch: two of [kRowBlock, kPanel].
inline void gated_linear(const GatedLinear& op, int64_t first, int64_t last, int64_t row,
                         int64_t rows, float* scratch) {
  const PackedWeights& w = op.linear.weights;
  const int64_t width = w.first_column[1], panels = w.first_panel[1];
  float *gate = scratch, *up = scratch + kRowBlock * kPanel;
  for (int64_t panel = first; panel < last; ++panel) {
    const int64_t column = panel * kPanel, columns = min64(kPanel, width - column);
    multiply_panel(op.linear, panel, row, rows, gate, kPanel, false);
    multiply_panel(op.linear, panels + panel, row, rows, up, kPanel, false);
    if (op.linear.bias) {
      add_bias(op.linear.bias + column, columns, rows, gate, kPanel);
      add_bias(op.linear.bias + width + column, columns, rows, up, kPanel);
    }
    for (int64_t r = 0; r < rows; ++r) {
      float* g = gate + r * kPanel;
      for (int64_t i = 0; i < kPanel; i += W) {
        store(g + i, activate(op.activation, load(g + i)) * load(up + r * kPanel + i));
      }
      write_row(g, columns, op.out + (row + r) * width + column, DType::kFloat32, 1);
    }
  }
}

// y = norm(x) (offset + weight) + bias over `columns` elements, in place or not. x is readable and
// y writable up to a multiple of W; what stands there does not count.
SOFTPROMPT_FAST_INLINE void norm_row(const Norm& norm, int64_t columns, const float* x, float* y) {
  const int64_t whole = columns / W * W;
  float mean = 0.0f;
  if (norm.kind == NormKind::kLayer) {
    Vec sums = Vec{};
    for (int64_t i = 0; i < whole; i += W) sums += load(x + i);
    mean = sum(sums);
    for (int64_t i = whole; i < columns; ++i) mean += x[i];
    mean /= columns;
  }
  float inverse = 1.0f;
  if (norm.kind != NormKind::kNone) {
    Vec squares = Vec{};
    for (int64_t i = 0; i < whole; i += W) {
      const Vec centred = load(x + i) - mean;
      squares += centred * centred;
    }
    float total = sum(squares);
    for (int64_t i = whole; i < columns; ++i) total += (x[i] - mean) * (x[i] - mean);
    inverse = 1.0f / __builtin_sqrtf(total / columns + norm.eps);
  }
  for (int64_t i = 0; i < columns; i += W) {
    const int64_t rest = columns - i;
    Vec value = (load(x + i) - mean) * inverse;
    if (norm.weight) {
      const Vec weight =
          rest >= W ? load(norm.weight + i) : load_some<Float32>(norm.weight + i, rest);
      value *= weight + norm.offset;
    }
    if (norm.bias) {
      value += rest >= W ? load(norm.bias + i) : load_some<Float32>(norm.bias + i, rest);
    }
    store(y + i, value);
  }
}

// Rows of any storage. Scratch: padded(columns) floats.
inline void norm_rows(const NormRows& op, int64_t first, int64_t last, float* scratch) {
  const Tensor& x = op.x;
  for (int64_t row = first; row < last; ++row) {
    read_row(x.at(row * x.stride[0]), x.dtype, x.stride[1], op.columns, round_up(op.columns, W),
             1.0f, scratch);
    norm_row(op.norm, op.columns, scratch, scratch);
    write_row(scratch, op.columns, op.out + row * op.columns, DType::kFloat32, 1);
  }
}

// Turn the pairs of one head in place: (x_i, x_j) by the angle of i, RoPE (Su et al., 2021).
SOFTPROMPT_FAST_INLINE void rotate(float* x, const float* cos, const float* sin, int64_t rotated,
                                   bool interleaved) {
  if (interleaved) {
    for (int64_t i = 0; i < rotated; i += 2) {
      const float one = x[i], two = x[i + 1];
      x[i] = one * cos[i] - two * sin[i];
      x[i + 1] = two * cos[i + 1] + one * sin[i + 1];
    }
    return;
  }
  const int64_t half = rotated / 2;
  int64_t i = 0;
  for (; i + W <= half; i += W) {
    const Vec one = load(x + i), two = load(x + half + i);
    store(x + i, one * load(cos + i) - two * load(sin + i));
    store(x + half + i, two * load(cos + half + i) + one * load(sin + half + i));
  }
  for (; i < half; ++i) {
    const float one = x[i], two = x[half + i];
    x[i] = one * cos[i] - two * sin[i];
    x[half + i] = two * cos[half + i] + one * sin[half + i];
  }
}

// One head for rows [row, row + rows). Scratch: [kRowBlock, D rounded up to kPanel].
inline void qkv_linear(const QkvLinear& op, int64_t head, int64_t row, int64_t rows,
                       float* scratch) {
  const PackedWeights& w = op.linear.weights;
  const int64_t column = w.first_column[head], columns = w.first_column[head + 1] - column;
  const int64_t panels = w.first_panel[head + 1] - w.first_panel[head], c_row = panels * kPanel;
  const bool is_query = head < op.q_heads, is_value = head >= op.q_heads + op.kv_heads;
  const Tensor& to = is_query ? op.query : is_value ? op.value : op.key;
  const int64_t place = is_query   ? head
                        : is_value ? head - op.q_heads - op.kv_heads
                                   : head - op.q_heads;
  const auto target = [&](int64_t r) {
    const int64_t batch = (row + r) / op.queries, query = (row + r) % op.queries;
    return to.at(batch * to.stride[0] + place * to.stride[1] + query * to.stride[2]);
  };
  if (!is_query && to.stride[3] == 1) {
    // A cache is written where nobody read before: its lines come while the product is made.
    for (int64_t r = 0; r < rows; ++r) {
      const char* line = (const char*)target(r);
      const char* end = line + columns * size_of(to.dtype);
      for (; line < end; line += 64) __builtin_prefetch(line, 1, 2);
    }
  }
  for (int64_t panel = 0; panel < panels; ++panel) {
    multiply_panel(op.linear, w.first_panel[head] + panel, row, rows, scratch + panel * kPanel,
                   c_row, false);
  }
  if (op.linear.bias) add_bias(op.linear.bias + column, columns, rows, scratch, c_row);
  const Norm& norm = is_query ? op.q_norm : op.k_norm;
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t batch = (row + r) / op.queries, query = (row + r) % op.queries;
    float* x = scratch + r * c_row;
    if (!is_value) {
      if (norm.kind != NormKind::kNone) norm_row(norm, columns, x, x);
      if (op.cos) {
        const int64_t at = batch * op.rotation_batch + query * op.rotated;
        rotate(x, op.cos + at, op.sin + at, op.rotated, op.interleaved);
      }
    }
    write_row(x, columns, target(r), to.dtype, to.stride[3]);
  }
}

}  // namespace SOFTPROMPT_FAST_ISA
}  // namespace softprompt_fast
