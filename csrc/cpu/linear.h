// SPDX-License-Identifier: Apache-2.0
// The products with frozen weights: packed once, then multiplied with what a decoder layer does
// before (norm) and after (bias, residual, activation, rotation) on the way.
#pragma once

#include "kernels.h"

namespace softprompt_fast {

constexpr int64_t kPanel = 32;        // columns of the result that one panel of weights makes
constexpr int64_t kDepthBlock = 256;  // of K at a time: so much of a panel fits the L1 cache
constexpr int64_t kRowBlock = 128;    // rows of x at a time

// W [N, K] as panels [K, kPanel]. The rows of W come in sections (of one weight, one head, ...);
// a panel never straddles two, the last one of a section is filled up with zeros.
struct PackedWeights {
  const void* data;
  DType dtype;
  int64_t in_features;
  const int32_t* first_panel;   // [sections + 1]
  const int32_t* first_column;  // [sections + 1]
  int64_t sections;

  int64_t panels() const { return first_panel[sections]; }
  int64_t out_features() const { return first_column[sections]; }
  const void* panel(int64_t index) const {
    return (const char*)data + index * in_features * kPanel * size_of(dtype);
  }
};

enum class NormKind : int32_t { kNone = 0, kRms = 1, kLayer = 2 };

struct Norm {
  NormKind kind = NormKind::kNone;
  const float* weight = nullptr;  // [K], or null for ones
  const float* bias = nullptr;    // [K] or null
  float offset = 0.0f;            // added to weight
  float eps = 0.0f;
};

enum class Activation : int32_t { kSilu = 0, kGelu = 1, kGeluTanh = 2 };

// out = (out or nothing) + x W^T + bias
struct Linear {
  int64_t rows;
  const float* x;  // [rows, K], rows x_row apart
  int64_t x_row;
  PackedWeights weights;
  const float* bias;  // [N] or null
  float* out;         // [rows, N], dense
  bool add;           // to what out holds
};

// out = act(gate) * up, with gate and up the two sections of x W^T + bias, equally wide.
struct GatedLinear {
  Linear linear;  // its out and add are not used
  Activation activation;
  float* out;  // [rows, N / 2], dense
};

// Projections of a decoder layer: every section is a head, q's first, then k's, then v's. q and k
// are normed by head where asked, rotated, and every head is written where attention reads it.
struct QkvLinear {
  Linear linear;    // its out and add are not used
  int64_t queries;  // S: row = b * S + s
  int64_t q_heads, kv_heads;
  Tensor query, key, value;  // [B, heads, S, D]
  Norm q_norm, k_norm;       // over D
  const float *cos, *sin;    // [B or 1, S, rotated], dense but for the batch; null: no rotation
  int64_t rotation_batch;    // stride of the batch, 0 where it broadcasts
  int64_t rotated;           // elements of a head that turn
  bool interleaved;
};

// Rows of x normed into dense rows of floats.
struct NormRows {
  Tensor x;  // [rows, K]
  int64_t columns;
  Norm norm;
  float* out;  // [rows, columns]
};

}  // namespace softprompt_fast
