// SPDX-License-Identifier: Apache-2.0
// What a differentiated pass over a frozen decoder needs besides linear.h: products with weights as
// PyTorch keeps them (both directions of one layer, no second copy), and the backward of what
// stands between products.
#pragma once

#include "linear.h"

namespace softprompt_fast {

constexpr int64_t kGatheredDepth = 768;  // of B at a time: a few panels of it fit the L2 cache

// out = (out or nothing) + x B + bias. Element (k, n) of B stands at w[k * w_depth + n * w_column],
// where one of the strides is 1: B = W^T of a layer's forward, B = W of its backward.
struct Product {
  int64_t rows, depth, columns;
  const float* x;  // [rows, depth], rows x_row apart
  int64_t x_row;
  const float* w;
  int64_t w_depth, w_column;
  const float* bias;  // [columns] or null
  float* out;         // [rows, columns], rows out_row apart
  int64_t out_row;
  bool add;  // to what out holds
};

// gate.out = x gate, up.out = x up, out = act(gate.out) * up.out: the first two are kept for
// GatedProductBackward.
struct GatedProduct {
  Product gate, up;  // of the same sizes, no add
  Activation activation;
  float* out;  // [rows, columns], dense
};

// With g = x B, the gradient of act(gate) * up: grad_gate = g * up * act'(gate), grad_up =
// g * act(gate). All [rows, columns], dense.
struct GatedProductBackward {
  Product product;  // its bias, out and add are not used
  Activation activation;
  const float *gate, *up;
  float *grad_gate, *grad_up;
};

// The gradient through y = x r (offset + weight), r = 1 / sqrt(mean(x^2) + eps), over rows of
// `columns`, all dense: out = (out or nothing) + r (h - x r^2 mean(h x)), h = grad (offset +
// weight).
struct NormRowsBackward {
  int64_t columns;
  Norm norm;  // kRms
  const float *x, *grad;
  float* out;
  bool add;
};

// Heads turned in place by their row's angles, RoPE (Su et al., 2021), or by the transposed map.
struct RotateRows {
  float* x;  // [rows, heads, head_dim], dense
  int64_t heads, head_dim;
  const float *cos, *sin;  // [rows, rotated], dense
  int64_t rotated;
  bool transposed;
};

// Rows of logits become weight * (softmax - one-hot(label)), with losses = weight * (log(sum(exp))
// - logit of the label). A negative label counts nothing.
struct CrossEntropyRows {
  float* logits;  // [rows, columns], dense
  int64_t columns;
  const int64_t* labels;
  const float* weights;  // or null for ones
  float* losses;
  bool gradient;  // false: the logits stay what they were
};

}  // namespace softprompt_fast
