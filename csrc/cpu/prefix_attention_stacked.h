// SPDX-License-Identifier: Apache-2.0
// The softmax of many stacked queries, one query a lane: scores are [keys, queries], so keys and
// values are read as they lie (a broadcast an element, nothing transposed), and maxima and sums run
// down the lanes with no reduction across them.
#pragma once

#include "prefix_attention.h"
#include "tile.h"

namespace softprompt_fast {
namespace SOFTPROMPT_FAST_ISA {

// Fewer queries leave too many lanes idle.
constexpr int64_t kStackedRows = W == 16 ? 10 : W == 8 ? 6 : 4;

// Scratch of one stack of queries: [.., lanes] each, lanes = queries rounded up to W.
struct Stack {
  int64_t lanes;
  float* query;   // [D, lanes]
  float* scores;  // [kKeyBlock, lanes]
  float* state;   // [Dv rounded up to W, lanes]
  float* highest;
  float* total;
  float* fade;
  float* first;  // the run's keys that a query sees: [first, last)
  float* last;
};

// from [rows, columns] <-> to [columns, lanes], or back; columns rounded up to W.
SOFTPROMPT_FAST_INLINE void rows_to_lanes(const float* from, int64_t from_row, int64_t rows,
                                          int64_t columns, float* to, int64_t lanes) {
  float padded_rows[W * W];
  for (int64_t i = 0; i < rows; i += W) {
    for (int64_t c = 0; c < columns; c += W) {
      const float* block = from + i * from_row + c;
      if (i + W <= rows) {
        transpose(block, from_row, to + c * lanes + i, lanes);
        continue;
      }
      for (int64_t j = 0; j < W; ++j) {
        store(padded_rows + j * W, i + j < rows ? load(block + j * from_row) : Vec{});
      }
      transpose(padded_rows, W, to + c * lanes + i, lanes);
    }
  }
}

SOFTPROMPT_FAST_INLINE void lanes_to_rows(const float* from, int64_t lanes, int64_t rows,
                                          int64_t columns, float* to, int64_t to_row) {
  float padded_rows[W * W];
  for (int64_t i = 0; i < rows; i += W) {
    for (int64_t c = 0; c < columns; c += W) {
      float* block = to + i * to_row + c;
      if (i + W <= rows) {
        transpose(from + c * lanes + i, lanes, block, to_row);
        continue;
      }
      transpose(from + c * lanes + i, lanes, padded_rows, W);
      for (int64_t j = 0; i + j < rows; ++j) store(block + j * to_row, load(padded_rows + j * W));
    }
  }
}

// Keys or values that come next, to be asked for a few lines at a time: see Next.
struct Ahead {
  const char* data = nullptr;
  int64_t row = 0, rows = 0, lines = 0;  // row: bytes from one to the next

  // Lines first, first + step, ... of row i.
  SOFTPROMPT_FAST_INLINE void fetch(int64_t i, int64_t first, int64_t step) const {
    if (i >= rows) return;
    for (int64_t line = first; line < lines; line += step) {
      __builtin_prefetch(data + i * row + 64 * line, 0, 2);
    }
  }

  bool is_dense() const { return row == 64 * lines; }
  // All of them, to be asked for beside a product, which lasts longer than a softmax.
  Next dense() const { return is_dense() ? Next{data, rows * lines} : Next{}; }
  Ahead scattered() const { return is_dense() ? Ahead{} : *this; }
};

// Scores become weights; maxima, sums and the factor by which earlier weights fade follow.
// masked: some query does not see all of the run.
SOFTPROMPT_FAST_INLINE void soften_stack(const Stack& stack, int64_t count, float softcap,
                                         bool masked, const Ahead& keys, const Ahead& values) {
  const Vec lowest = splat(-__builtin_inff());
  for (int64_t lane = 0; lane < stack.lanes; lane += W) {
    float* scores = stack.scores + lane;
    if (softcap != 0.0f) {
      const float inverse = 1.0f / softcap;
      for (int64_t k = 0; k < count; ++k) {
        float* at = scores + k * stack.lanes;
        store(at, tanh(load(at) * inverse) * softcap);
      }
    }
    if (masked) {
      const Vec first = load(stack.first + lane), last = load(stack.last + lane);
      for (int64_t k = 0; k < count; ++k) {
        float* at = scores + k * stack.lanes;
        const Vec key = splat((float)k);
        const Vec seen = key < last ? load(at) : lowest;
        store(at, key >= first ? seen : lowest);
      }
    }
    const Vec before = load(stack.highest + lane);
    Vec most = before, other = before;  // two chains: a maximum waits for the one before it
    int64_t k = 0;
    for (; k + 2 <= count; k += 2) {
      most = vmax(load(scores + k * stack.lanes), most);
      other = vmax(load(scores + (k + 1) * stack.lanes), other);
    }
    if (k < count) most = vmax(load(scores + k * stack.lanes), most);
    most = vmax(other, most);
    // Nothing seen so far: (-inf) - (-inf) would be NaN.
    const Vec offset = most > lowest ? most : Vec{};
    const Vec fade = exp(before - offset);
    Vec sums = Vec{}, more = Vec{};
    k = 0;
    for (; k + 2 <= count; k += 2) {
      float *at = scores + k * stack.lanes, *next = at + stack.lanes;
      const Vec weight = exp(load(at) - offset);
      const Vec weight2 = exp(load(next) - offset);
      store(at, weight);
      store(next, weight2);
      for (int64_t i = k; i < k + 2; ++i) {
        keys.fetch(i, lane / W, stack.lanes / W);
        values.fetch(i, lane / W, stack.lanes / W);
      }
      sums += weight;
      more += weight2;
    }
    if (k < count) {
      const Vec weight = exp(load(scores + k * stack.lanes) - offset);
      store(scores + k * stack.lanes, weight);
      sums += weight;
    }
    store(stack.highest + lane, most);
    store(stack.fade + lane, fade);
    store(stack.total + lane, load(stack.total + lane) * fade + (sums + more));
  }
}

}  // namespace SOFTPROMPT_FAST_ISA
}  // namespace softprompt_fast
