// SPDX-License-Identifier: Apache-2.0
// The two building blocks of every matrix product here: C (+)= A B over a tile that lives in
// registers, and rows of any storage brought into float scratch, as they are or transposed.
#pragma once

#include "simd.h"

namespace softprompt_fast {
namespace SOFTPROMPT_FAST_ISA {

// Registers: AVX-512 and NEON have 32, the others 16. A tile of R rows and V vectors holds R * V
// sums and V loaded vectors; the element of A is broadcast from memory.
#if SOFTPROMPT_FAST_VECTOR_BYTES == 64 || defined(__aarch64__)
constexpr int kTileVectors = 4;
constexpr int tile_rows(int vectors) { return vectors == 4 ? 6 : 8; }
#else
constexpr int kTileVectors = 2;
constexpr int tile_rows(int vectors) { return vectors == 2 ? 6 : 8; }
#endif

// C[R, V * W] = (keep ? C : 0) + sum_k A[R, k] B[k, V * W]. Element (r, k) of A stands at
// a[r * a_row + k * a_col], so the same code multiplies by a transposed A. C is added at the end: a
// long sum made of short ones is the more accurate one. With `fade` [V * W], column n of C is first
// multiplied by fade[n]. With
// kLines, so many lines of memory from `ahead` on are asked for at every step of k.
template <int R, int V, typename Storage, int kLines = 0>
SOFTPROMPT_FAST_INLINE void tile(int64_t depth, const float* a, int64_t a_row, int64_t a_col,
                                 const typename Storage::Element* b, int64_t b_row, float* c,
                                 int64_t c_row, bool keep, const float* fade = nullptr,
                                 const char* ahead = nullptr) {
  Vec sums[R][V];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) sums[r][v] = Vec{};
  }
  for (int64_t k = 0; k < depth; ++k) {
    Vec loaded[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) loaded[v] = Storage::load(b + v * W);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const Vec x = splat(a[r * a_row]);
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) sums[r][v] += x * loaded[v];
    }
    a += a_col;
    b += b_row;
    if constexpr (kLines > 0) {
#pragma GCC unroll 4
      for (int line = 0; line < kLines; ++line) __builtin_prefetch(ahead + 64 * line, 0, 2);
      ahead += 64 * kLines;
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      float* to = c + r * c_row + v * W;
      Vec x = sums[r][v];
      if (keep) x += fade ? load(to) * load(fade + v * W) : load(to);
      store(to, x);
    }
  }
}

// Memory that comes next, to be asked for beside the arithmetic: a burst would fill the core's few
// slots for outstanding lines, and hold up the loads behind it.
struct Next {
  const char* data = nullptr;
  int64_t lines = 0;  // of 64 bytes, one behind the other
};

// The same for any number of rows. Some of the tiles ask for `next`, evenly spread over all of
// them, a line at every step of k; two lines where there would be too few steps.
template <int V, typename Storage>
void tile_column(int64_t rows, int64_t depth, const float* a, int64_t a_row, int64_t a_col,
                 const typename Storage::Element* b, int64_t b_row, float* c, int64_t c_row,
                 bool keep, const float* fade = nullptr, const Next& next = {}) {
  constexpr int R = tile_rows(V);
  if (next.lines > 0 && rows >= R) {
    const int64_t tiles = rows / R, askers = (next.lines + depth - 1) / depth;
    const bool twice = askers > tiles;
    const int64_t asked = twice ? min64((askers + 1) / 2, tiles) : askers, every = tiles / asked;
    const char* ahead = next.data;
    for (int64_t t = 0; t < tiles; ++t, rows -= R, a += R * a_row, c += R * c_row) {
      if (t % every != 0 || t / every >= asked) {
        tile<R, V, Storage>(depth, a, a_row, a_col, b, b_row, c, c_row, keep, fade);
      } else if (twice) {
        tile<R, V, Storage, 2>(depth, a, a_row, a_col, b, b_row, c, c_row, keep, fade, ahead);
        ahead += 128 * depth;
      } else {
        tile<R, V, Storage, 1>(depth, a, a_row, a_col, b, b_row, c, c_row, keep, fade, ahead);
        ahead += 64 * depth;
      }
    }
  }
  for (; rows >= R; rows -= R, a += R * a_row, c += R * c_row) {
    tile<R, V, Storage>(depth, a, a_row, a_col, b, b_row, c, c_row, keep, fade);
  }
  switch (rows) {
    case 7:
      if constexpr (R > 7)
        tile<7, V, Storage>(depth, a, a_row, a_col, b, b_row, c, c_row, keep, fade);
      return;
    case 6:
      if constexpr (R > 6)
        tile<6, V, Storage>(depth, a, a_row, a_col, b, b_row, c, c_row, keep, fade);
      return;
    case 5:
      return tile<5, V, Storage>(depth, a, a_row, a_col, b, b_row, c, c_row, keep, fade);
    case 4:
      return tile<4, V, Storage>(depth, a, a_row, a_col, b, b_row, c, c_row, keep, fade);
    case 3:
      return tile<3, V, Storage>(depth, a, a_row, a_col, b, b_row, c, c_row, keep, fade);
    case 2:
      return tile<2, V, Storage>(depth, a, a_row, a_col, b, b_row, c, c_row, keep, fade);
    case 1:
      return tile<1, V, Storage>(depth, a, a_row, a_col, b, b_row, c, c_row, keep, fade);
  }
}

template <int N>
struct Count {
  static constexpr int value = N;
};

// C[rows, columns] = (keep ? C : 0) + A B, with columns a multiple of W. A: see tile; B and C have
// dense rows. The columns of B that one tile uses stay in the first cache while all rows pass.
SOFTPROMPT_FAST_INLINE void matmul(int64_t rows, int64_t columns, int64_t depth, const float* a,
                                   int64_t a_row, int64_t a_col, const float* b, int64_t b_row,
                                   float* c, int64_t c_row, bool keep, const float* fade = nullptr,
                                   const Next& next = {}) {
  const auto pass = [&](auto vectors, int64_t at) {
    tile_column<decltype(vectors)::value, Float32>(rows, depth, a, a_row, a_col, b + at, b_row,
                                                   c + at, c_row, keep, fade ? fade + at : nullptr,
                                                   at == 0 ? next : Next{});
  };
  // Never a single vector where it can be avoided: its few sums wait for one another. So 5 are
  // 3 + 2, 6 are 3 + 3, 7 are 4 + 3, and 9 are 4 + 3 + 2.
  for (int64_t at = 0, left = columns / W; left > 0;) {
    int64_t taken = left < kTileVectors ? left : kTileVectors;
    if (kTileVectors == 4 && (left == 5 || left == 6)) taken = 3;
    switch (taken) {
      case 4:
        if constexpr (kTileVectors >= 4) pass(Count<4>(), at);
        break;
      case 3:
        if constexpr (kTileVectors >= 3) pass(Count<3>(), at);
        break;
      case 2:
        pass(Count<2>(), at);
        break;
      case 1:
        pass(Count<1>(), at);
        break;
    }
    at += taken * W;
    left -= taken;
  }
}

// ---- rows into scratch
// ---------------------------------------------------------------------------

// One row of `count` elements as floats, times factor; zeros up to `padded`, a multiple of W.
template <typename Storage>
SOFTPROMPT_FAST_INLINE void read_row(const typename Storage::Element* from, int64_t stride,
                                     int64_t count, int64_t padded, float factor, float* to) {
  int64_t i = 0;
  if (stride == 1) {
    for (; i + W <= count; i += W) store(to + i, Storage::load(from + i) * factor);
    if (i < count) store(to + i, load_some<Storage>(from + i, count - i) * factor), i += W;
  } else {
    typename Storage::Element gathered[W];
    for (; i < count; i += W) {
      for (int j = 0; j < W; ++j) {
        gathered[j] = i + j < count ? from[(i + j) * stride] : typename Storage::Element();
      }
      store(to + i, Storage::load(gathered) * factor);
    }
  }
  for (; i < padded; i += W) store(to + i, Vec{});
}

SOFTPROMPT_FAST_INLINE void read_row(const void* from, DType dtype, int64_t stride, int64_t count,
                                     int64_t padded, float factor, float* to) {
  switch (dtype) {
    case DType::kFloat32:
      return read_row<Float32>((const float*)from, stride, count, padded, factor, to);
    case DType::kBFloat16:
      return read_row<BFloat16>((const uint16_t*)from, stride, count, padded, factor, to);
    case DType::kFloat16:
      return read_row<Float16>((const uint16_t*)from, stride, count, padded, factor, to);
    case DType::kInt8:
      return read_row<Int8>((const int8_t*)from, stride, count, padded, factor, to);
  }
}

// `count` floats to a row of any storage; `from` is readable up to a multiple of W.
SOFTPROMPT_FAST_INLINE void write_row(const float* from, int64_t count, void* to, DType dtype,
                                      int64_t stride) {
  with_storage(dtype, [&](auto storage) {
    typedef decltype(storage) Storage;
    auto* p = (typename Storage::Element*)to;
    int64_t i = 0;
    if (stride == 1) {
      for (; i + W <= count; i += W) Storage::store(p + i, load(from + i));
      if (i < count) store_some<Storage>(p + i, load(from + i), count - i);
      return;
    }
    for (; i < count; i += W) {
      typename Storage::Element row[W];
      Storage::store(row, load(from + i));
      for (int64_t j = 0; j < W && i + j < count; ++j) p[(i + j) * stride] = row[j];
    }
  });
}

template <int Distance, int... Lane>
SOFTPROMPT_FAST_INLINE void exchange(Vec& a, Vec& b) {
  // Of two rows `Distance` apart, the off-diagonal blocks of that size change places.
  const Vec low =
      __builtin_shufflevector(a, b, ((Lane & Distance) ? Lane - Distance + W : Lane)...);
  b = __builtin_shufflevector(a, b, ((Lane & Distance) ? Lane + W : Lane + Distance)...);
  a = low;
}

template <int Distance>
SOFTPROMPT_FAST_INLINE void exchange_all(Vec (&rows)[W]) {
#pragma GCC unroll 16
  for (int i = 0; i < W; ++i) {
    if ((i & Distance) != 0) continue;
    if constexpr (W == 16) {
      exchange<Distance, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15>(rows[i],
                                                                               rows[i + Distance]);
    } else if constexpr (W == 8) {
      exchange<Distance, 0, 1, 2, 3, 4, 5, 6, 7>(rows[i], rows[i + Distance]);
    } else {
      exchange<Distance, 0, 1, 2, 3>(rows[i], rows[i + Distance]);
    }
  }
  if constexpr (Distance > 1) exchange_all<Distance / 2>(rows);
}

// W x W floats, transposed in registers.
SOFTPROMPT_FAST_INLINE void transpose(const float* from, int64_t from_row, float* to,
                                      int64_t to_row) {
  Vec rows[W];
#pragma GCC unroll 16
  for (int i = 0; i < W; ++i) rows[i] = load(from + i * from_row);
  exchange_all<W / 2>(rows);
#pragma GCC unroll 16
  for (int i = 0; i < W; ++i) store(to + i * to_row, rows[i]);
}

}  // namespace SOFTPROMPT_FAST_ISA
}  // namespace softprompt_fast
