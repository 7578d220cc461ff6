// SPDX-License-Identifier: Apache-2.0
// prompt_qkv for the few rows of a decode step, in one launch: gather and concatenate (the first
// layer starts from token ids and the prompt) or hidden states, norm, projection, rotation, and
// q, k, v written where they stay: keys and values in the own-token cache. Where heads of q and k
// have a norm too, it and the rotation are a launch of their own.
//
// Reading the weights takes the time, so a weight is read once, straight into the registers that
// multiply it. A block owns `groups` times 8 pairs of columns, those that a rotation couples, and
// all its warps share the width: chunk n of 32 elements is warp n % 8's. The rows, which every
// block reads again, come from the L2 cache.
#pragma once

#include <type_traits>

#include "../prompt_qkv.h"
#include "prompt_rows.cuh"

namespace softprompt_fast {
namespace cuda {

constexpr int kQkvWarps = 8, kQkvThreads = 32 * kQkvWarps, kChunk = 32;

// A line of the block's rows: its first element, or null for zeros.
struct QkvLine {
  const void* from;
  float scale;
};

// The block's shared memory.
template <int row_tiles, int groups>
struct QkvShared {
  static constexpr int kRows = 16 * row_tiles, kColumns = 16 * groups;
  QkvLine lines[kRows];
  float mean[kRows], factor[kRows];  // a row is (x - mean) * factor before the product
  float squares[kQkvWarps][kRows];
  float sums[kQkvWarps][kRows][kColumns + 4];  // 4: rows 8 apart would share their banks
};

// Two columns of a head that a rotation couples, or that just belong to one thread. In cos and sin
// they have the same places.
struct HeadPair {
  int first, second;
  bool turns;
};

// Pair j of head_dim / 2 in a head of q or k.
__device__ __forceinline__ HeadPair head_pair(const Rope& rope, int head_dim, int j) {
  const int turned = (int)rope.size / 2;
  if (j >= turned) return {turned + j, head_dim / 2 + j, false};  // behind the rotation: in halves
  if (rope.interleaved) return {2 * j, 2 * j + 1, true};
  return {j, j + turned, true};
}

__device__ __forceinline__ void turn(float (&x)[2], const float (&cos)[2], const float (&sin)[2]) {
  const float first = x[0] * cos[0] - x[1] * sin[0];
  x[1] = x[1] * cos[1] + x[0] * sin[1];
  x[0] = first;
}

__device__ __forceinline__ int64_t first_place(const CacheStart& start) {
  return start.at ? load_index(start.at, 0) : 0;
}

// That there is none is an error, and no reason for a wild store.
__device__ __forceinline__ bool has_room(const CacheStart& start, int64_t place) {
  const bool room = !start.at || (place >= 0 && place < start.capacity);
  device_assert(room, "a static cache has no room for the new tokens");
  return room;
}

// A pair of columns of q, k or v.
struct ColumnPair : HeadPair {
  int which, head;  // 0, 1, 2: q, k, v
  bool exists;
};

__device__ __forceinline__ ColumnPair column_pair(const PromptQkv& op, int pair) {
  const int half = (int)op.head_dim / 2, value_half = (int)op.value_dim / 2;
  const int q_pairs = (int)op.q_heads * half, k_pairs = (int)op.kv_heads * half;
  if (pair >= q_pairs + k_pairs) {
    pair -= q_pairs + k_pairs;
    const int head = pair / value_half, j = pair % value_half;
    return {{j, j + value_half, false}, 2, head, head < (int)op.kv_heads};
  }
  const int which = pair >= q_pairs;
  if (which) pair -= q_pairs;
  return {head_pair(op.rope, (int)op.head_dim, pair % half), which, pair / half, true};
}

template <typename T, int size>
__device__ __forceinline__ void as_floats(float (&to)[size], const Vector<T, size>& x) {
#pragma unroll
  for (int n = 0; n < size; ++n) to[n] = to_float(x.at[n]);
}

// Eight neighbours of a line, scaled and rounded to T: what the residual holds.
template <typename T>
__device__ __forceinline__ Vector<T, 8> load_line(const QkvLine& line, int k, bool inside) {
  Vector<T, 8> x = {};
  if (line.from == nullptr || !inside) return x;
  x = load_vector<8>(as_global((const T*)line.from) + k);
  if (line.scale != 1.0f) {
#pragma unroll
    for (int n = 0; n < 8; ++n) x.at[n] = from_float<T>(to_float(x.at[n]) * line.scale);
  }
  return x;
}

// Mean and factor of the rows that cannot wait for the end of the product: a layer norm's, and an
// rms of fp16, where what it has not yet tamed may be too large.
template <typename T, typename Shared>
__device__ void qkv_statistics(const PromptQkv& op, Shared& shared) {
  const int lane = threadIdx.x % 32, width = (int)op.concat.width;
  for (int row = threadIdx.x / 32; row < Shared::kRows; row += kQkvWarps) {
    float mean = 0.0f, squares = 0.0f;
    for (int pass = op.norm == PromptQkv::kLayer ? 0 : 1; pass < 2; ++pass) {
      float sum = 0.0f;
      for (int k = lane * 8; k < width; k += 256) {
        float x[8];
        as_floats(x, load_line<T>(shared.lines[row], k, true));
#pragma unroll
        for (int n = 0; n < 8; ++n) sum += pass ? (x[n] - mean) * (x[n] - mean) : x[n];
      }
      (pass ? squares : mean) = warp_sum(sum) / (float)width;
    }
    if (lane == 0) {
      shared.mean[row] = mean;
      shared.factor[row] = reciprocal_root(squares + op.eps);
    }
  }
}

template <typename T, int row_tiles, int groups>
__global__ void __launch_bounds__(kQkvThreads, 1) prompt_qkv(const __grid_constant__ PromptQkv op) {
  using Shared = QkvShared<row_tiles, groups>;
  constexpr int kRows = Shared::kRows;
  Shared& shared = *(Shared*)shared_memory();
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  const int width = (int)op.concat.width, slots = (int)(op.concat.slots + op.concat.own);
  const int lines = (int)op.concat.batch * slots, first_line = (int)blockIdx.y * kRows;
  const int first_pair = (int)blockIdx.x * 8 * groups;
  // In a fragment of the product, a lane has a row (of 8) and an eighth of a chunk's columns. Which
  // column of a chunk is which to the product does not matter, as long as both sides agree: eight
  // neighbours, one load, are a lane's, and become the operands of two products.
  const int lane_row = lane / 4, lane_column = lane % 4 * 8;

  if (thread < kRows) {
    QkvLine line = {nullptr, 1.0f};
    if (first_line + thread < lines) {
      const Source from = locate(op.concat, first_line + thread);
      if (from.data != nullptr) line = {(const T*)from.data + from.offset, from.scale};
    }
    shared.lines[thread] = line;
    shared.mean[thread] = 0.0f;
    shared.factor[thread] = 1.0f;
  }

  // The lane's rows of the weight: one of the 8 firsts of each group, and its second.
  const T* weight[2 * groups];
#pragma unroll
  for (int n = 0; n < 2 * groups; ++n) {
    const ColumnPair pair = column_pair(op, first_pair + n / 2 * 8 + lane_row);
    weight[n] = nullptr;
    if (pair.exists) {
      const Tensor& w = op.weight[pair.which];
      const int64_t dim = pair.which == 2 ? op.value_dim : op.head_dim;
      weight[n] =
          (const T*)w.data + (pair.head * dim + (n % 2 ? pair.second : pair.first)) * w.stride[0];
    }
  }
  Vector<T, 8> next[2 * groups];
  const auto load_weight = [&](int k) {
#pragma unroll
    for (int n = 0; n < 2 * groups; ++n) {
      next[n] = {};
      if (weight[n] != nullptr && k < width) next[n] = load_vector<8>(as_global(weight[n]) + k);
    }
  };
  load_weight(warp * kChunk + lane_column);  // on their way while the rows are found
  __syncthreads();
  const bool rms_last = op.norm == PromptQkv::kRms && !std::is_same<T, Half>::value;
  if (op.norm != PromptQkv::kNone && !rms_last) {
    qkv_statistics<T>(op, shared);
    __syncthreads();
  }

  float sum[row_tiles][2 * groups][4] = {};
  float squares[row_tiles][2] = {};
  for (int chunk = warp; chunk * kChunk < width; chunk += kQkvWarps) {
    const int k = chunk * kChunk + lane_column;
    const bool inside = k < width;
    Vector<T, 8> w[2 * groups];
#pragma unroll
    for (int n = 0; n < 2 * groups; ++n) w[n] = next[n];
    load_weight(k + kQkvWarps * kChunk);
    float gain[8], shift[8] = {};
#pragma unroll
    for (int n = 0; n < 8; ++n) gain[n] = 1.0f;
    if (op.norm_weight && inside) {
      as_floats(gain, load_vector<8>((const T*)op.norm_weight.data + k));
#pragma unroll
      for (int n = 0; n < 8; ++n) gain[n] += op.norm_offset;
    }
    if (op.norm_bias && inside) as_floats(shift, load_vector<8>((const T*)op.norm_bias.data + k));

#pragma unroll
    for (int tile = 0; tile < row_tiles; ++tile) {
      uint32_t a[2][4];  // rows lane_row and lane_row + 8; four pairs of neighbours
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = 16 * tile + 8 * half + lane_row;
        const Vector<T, 8> x = load_line<T>(shared.lines[row], k, inside);
        // Every block has read the row; each writes some of it.
        if (op.concat.out && inside && chunk % gridDim.x == blockIdx.x &&
            first_line + row < lines) {
          const int64_t line = first_line + row;
          const int64_t* stride = op.concat.out.stride;
          store_vector(
              (T*)op.concat.out.data + line / slots * stride[0] + line % slots * stride[1] + k, x);
        }
        float y[8];
        as_floats(y, x);
        const float mean = shared.mean[row], factor = shared.factor[row];
#pragma unroll
        for (int n = 0; n < 8; ++n) {
          squares[tile][half] += y[n] * y[n];
          y[n] = (y[n] - mean) * factor * gain[n] + shift[n];
        }
#pragma unroll
        for (int n = 0; n < 4; ++n) a[half][n] = pack2<T>(y[2 * n], y[2 * n + 1]);
      }
#pragma unroll
      for (int n = 0; n < 2 * groups; ++n) {
        uint32_t b[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          b[i] = (uint32_t)w[n].at[2 * i].bits | (uint32_t)w[n].at[2 * i + 1].bits << 16;
        }
        mma_m16n8k16<T>(sum[tile][n], {a[0][0], a[1][0], a[0][1], a[1][1]}, {b[0], b[1]});
        mma_m16n8k16<T>(sum[tile][n], {a[0][2], a[1][2], a[0][3], a[1][3]}, {b[2], b[3]});
      }
    }
  }

#pragma unroll
  for (int tile = 0; tile < row_tiles; ++tile) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = 16 * tile + 8 * half + lane_row;
#pragma unroll
      for (int n = 0; n < 2 * groups; ++n) {
        float* to = &shared.sums[warp][row][8 * n + lane % 4 * 2];
        to[0] = sum[tile][n][2 * half];
        to[1] = sum[tile][n][2 * half + 1];
      }
      const float all = warp_sum<4>(squares[tile][half]);
      if (lane % 4 == 0) shared.squares[warp][row] = all;
    }
  }
  __syncthreads();
  if (rms_last && thread < kRows) {
    float all = 0.0f;
    for (int w = 0; w < kQkvWarps; ++w) all += shared.squares[w][thread];
    shared.factor[thread] = reciprocal_root(all / (float)width + op.eps);
  }
  __syncthreads();

  const int64_t start = first_place(op.start);
  for (int i = thread; i < kRows * 8 * groups; i += kQkvThreads) {
    const int row = i / (8 * groups), j = i % (8 * groups), line = first_line + row;
    const ColumnPair pair = column_pair(op, first_pair + j);
    if (line >= lines || !pair.exists) continue;
    const int column = j / 8 * 16 + j % 8;
    float x[2] = {};
    for (int w = 0; w < kQkvWarps; ++w) {
      x[0] += shared.sums[w][row][column];
      x[1] += shared.sums[w][row][column + 8];
    }
    if (rms_last) {
      x[0] *= shared.factor[row];
      x[1] *= shared.factor[row];
    }
    if (const Tensor& bias = op.bias[pair.which]) {
      const T* b = (const T*)bias.data + pair.head * (pair.which == 2 ? op.value_dim : op.head_dim);
      x[0] += to_float(b[pair.first]);
      x[1] += to_float(b[pair.second]);
    }
    const int64_t b = line / slots, slot = line % slots;
    if (pair.turns) {
      float cos[2], sin[2];
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        const auto angle = [&](const Tensor& of) {
          float value[1];
          load_floats(value, of,
                      b * of.stride[0] + slot * of.stride[1] +
                          (n ? pair.second : pair.first) * of.stride[2]);
          return value[0];
        };
        cos[n] = angle(op.rope.cos);
        sin[n] = angle(op.rope.sin);
      }
      turn(x, cos, sin);
    }
    const int64_t place = pair.which ? start + slot : slot;
    if (pair.which && !has_room(op.start, place)) continue;
    const Tensor& out = op.out[pair.which];
    T* to = as_global((T*)out.data) + b * out.stride[0] + pair.head * out.stride[1] +
            place * out.stride[2];
    to[pair.first * out.stride[3]] = from_float<T>(x[0]);
    to[pair.second * out.stride[3]] = from_float<T>(x[1]);
  }
}

// A warp a head of a token. A lane has `pairs` of it: as many as heads of 64 * pairs take.
template <typename T, int pairs>
__global__ void __launch_bounds__(kQkvThreads) head_norm(const __grid_constant__ HeadNorm op) {
  const int lane = threadIdx.x % 32, dim = (int)op.head_dim, half = dim / 2;
  const int heads = (int)(op.of[0].count + op.of[1].count), length = (int)op.length;
  const int item = (int)blockIdx.x * kQkvWarps + threadIdx.x / 32;
  const int line = item / heads, b = line / length, slot = line % length;
  if (b >= (int)op.batch) return;
  const bool is_key = item % heads >= (int)op.of[0].count;
  const HeadNorm::Heads& of = op.of[is_key];
  const int head = item % heads - (is_key ? (int)op.of[0].count : 0);
  const int64_t place = is_key ? first_place(op.start) + slot : slot;
  if (is_key && !has_room(op.start, place)) return;
  const auto at = [&](const Tensor& x, int64_t a, int64_t b, int64_t c) {
    return as_global((T*)x.data) + a * x.stride[0] + b * x.stride[1] + c * x.stride[2];
  };
  T* values = at(of.values, b, head, place);
  const T* weight = at(of.weight, 0, 0, 0);
  const T *cos = at(op.rope.cos, b, slot, 0), *sin = at(op.rope.sin, b, slot, 0);

  // First all loads, so that none waits for another.
  T x[pairs][2], gain[pairs][2], cosines[pairs][2], sines[pairs][2];
#pragma unroll
  for (int n = 0; n < pairs; ++n) {
    const int j = lane + 32 * n;
    const HeadPair pair = head_pair(op.rope, dim, j < half ? j : 0);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int column = i ? pair.second : pair.first;
      x[n][i] = values[column * of.values.stride[3]];
      gain[n][i] = weight[column * of.weight.stride[0]];
      const int angle = pair.turns ? column : 0;
      cosines[n][i] = cos[angle * op.rope.cos.stride[2]];
      sines[n][i] = sin[angle * op.rope.sin.stride[2]];
    }
  }
  float y[pairs][2], squares = 0.0f;
#pragma unroll
  for (int n = 0; n < pairs; ++n) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      y[n][i] = lane + 32 * n < half ? to_float(x[n][i]) : 0.0f;
      squares += y[n][i] * y[n][i];
    }
  }
  const float factor = reciprocal_root(warp_sum(squares) / (float)dim + of.eps);
#pragma unroll
  for (int n = 0; n < pairs; ++n) {
    const int j = lane + 32 * n;
    if (j >= half) continue;
    const HeadPair pair = head_pair(op.rope, dim, j);
    float turn_cos[2], turn_sin[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      y[n][i] *= factor * (to_float(gain[n][i]) + of.offset);
      turn_cos[i] = to_float(cosines[n][i]);
      turn_sin[i] = to_float(sines[n][i]);
    }
    if (pair.turns) turn(y[n], turn_cos, turn_sin);
    values[pair.first * of.values.stride[3]] = from_float<T>(y[n][0]);
    values[pair.second * of.values.stride[3]] = from_float<T>(y[n][1]);
  }
}

}  // namespace cuda
}  // namespace softprompt_fast
