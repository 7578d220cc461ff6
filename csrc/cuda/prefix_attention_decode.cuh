// SPDX-License-Identifier: Apache-2.0
// prefix_attention for few queries a row, in one launch: FlashAttention's online softmax over the
// items of prefix_attention_plan.h, and the merge of their partial results by whoever ends last, if
// there are several.
//
// A block of four warps takes an item. Of a large tile each warp has its own queries, 16 at a time
// (`kFragments` times), and scores them against every key; of a small tile all warps have the same
// 16 queries, and each a quarter of every block of keys, so that a row with a handful of queries
// still has four warps at work. Keys and values come by cp.async, two blocks of kDecodeKeys ahead.
// Products are mma.m16n8k16: scores leave one in the layout in which the next one wants weights.
// With kWarpgroup those of tiles of more than 64 queries are wgmma, whose layouts are the same.
//
// Entries of 8 bits are widened, exactly, on their way from one part of shared memory to another;
// scores are multiplied by a key's scale, weights by a value's. (In float16 a weight times a small
// scale would be below the range; there the value is multiplied.)
//
// Scores are kept in units of log 2, so that the softmax takes exp2, one instruction.
#pragma once

#include <math.h>

#include <type_traits>

#include "prefix_attention_decode.h"
#include "warpgroup.cuh"

namespace softprompt_fast {
namespace cuda {

constexpr int kStages = 2;
// Looks at a counter, 0.5 us or more each, that a merge item takes. The emulator's blocks do not
// run side by side.
#if defined(__CUDACC__)
constexpr int kPatience = 1000;
#else
constexpr int kPatience = 1;
#endif
constexpr float kLog2E = 1.4426950408889634f, kLn2 = 0.6931471805599453f;

// The keys and values that an item reads: key 0 of its row or prefix, and strides in elements.
struct KeySource {
  const void *key, *value;
  int64_t key_stride, value_stride, key_feature, value_feature;
  int first;  // entry of the pack that is key 0
  bool vector;
};

// Largest score, and the sum of weights 2^(score - largest).
struct Softmax {
  float top = -INFINITY, sum = 0.0f;

  __device__ float shift() const { return top == -INFINITY ? 0.0f : top; }  // -inf - -inf is NaN
  __device__ float log2() const { return sum == 0.0f ? -INFINITY : top + log2f(sum); }
  __device__ float norm() const { return sum == 0.0f ? 0.0f : 1.0f / sum; }
  // With one more score; what the weights so far are multiplied by.
  __device__ float add(float score) {
    const Softmax with = {fmaxf(top, score)};
    const float fade = exp2_approximate(top - with.shift());
    sum = sum * fade + exp2_approximate(score - with.shift());
    top = with.top;
    return fade;
  }
};

// Heads are padded with zeros up to kHeadDim.
template <int kHeadDim>
struct DecodeShared {
  static constexpr int kTile = decode_tile(kHeadDim);
  static constexpr int kBlock = kDecodeKeys * kHeadDim;

  alignas(1024) uint16_t query[kTile * kHeadDim];
  // [stage][keys, values]. Of 8-bit entries the first half has both stages, the second half a block
  // of keys and one of values, widened.
  alignas(1024) uint16_t ring[kStages * 2 * kBlock];
  float key_scale[kDecodeKeys], value_scale[kDecodeKeys];
  Interval seen[kTile];  // by stacked query, before the tile's share is cut from it
  Interval share;        // keys
  DecodeItem item;
  int slot;    // of its partial results in the workspace
  bool whole;  // its results are its queries' whole results
  unsigned arrival;
  KeySource from;
  // Where an item goes on, and with which of the keys there, counted so that block t of the item
  // begins at behind_keys.low + t * kDecodeKeys.
  KeySource behind;
  Interval behind_keys;
  int row[kTile];         // the tile's rows
  int16_t merged[kTile];  // by row: the shares of its prefix if it is to be merged here, else -1
  Interval warp_seen[kDecodeWarps];
  Interval warp_open[kDecodeWarps];  // keys that all queries of a warp see
  float warp_top[kDecodeWarps][kSmallTile], warp_sum[kDecodeWarps][kSmallTile];

  struct Search {
    DecodeSection section;
    int64_t sums[kDecodeWarps];  // the team's
  };
  // Before the ring is in use, and after.
  __device__ Search& search() { return *static_cast<Search*>(whole_ring()); }
  __device__ float* warp_state(int warp) {
    return static_cast<float*>(whole_ring()) + warp * kSmallTile * kHeadDim;
  }
  __device__ void* whole_ring() { return ring; }
  static_assert(sizeof(Search) <= sizeof(ring), "the section lies in the ring");
  static_assert(kDecodeWarps * kSmallTile * kHeadDim * 4 <= sizeof(ring), "states lie in the ring");
};

// Products of a warpgroup leave no registers for it: of thread, fragment and row.
template <int kHeadDim>
struct WarpgroupShared : DecodeShared<kHeadDim> {
  Softmax softmax[2 * decode_fragments(kHeadDim)][kDecodeThreads];
};

// Place of a 16-byte chunk in a block of kRows rows of kHeadDim 16-bit numbers. Eight rows' chunks
// of one column, as ldmatrix reads them, lie in different banks. Panels of 64 columns are as
// warpgroup.cuh has them.
template <int kHeadDim, int kRows>
__device__ __forceinline__ int chunk_at(int row, int chunk) {
  constexpr int kChunks = kHeadDim / 8;
  static_assert(kChunks % 4 == 0, "heads of 32, 64, 96, ...");
  if constexpr (kChunks % 8 == 0) {
    return ((chunk / 8 * kRows + row) * 8 + ((chunk ^ row) & 7)) * 8;
  } else {
    return (row * kChunks + (chunk ^ (row >> 1 & 3))) * 8;
  }
}

// 16 bytes of a tensor's features: `valid` of them, then zeros. vector: all or none are valid, they
// are neighbours in memory, and their address is a multiple of 16.
template <typename Bits>
__device__ __forceinline__ void copy_chunk(void* to, const void* from, int64_t at,
                                           int64_t feature_stride, bool vector, int valid) {
  const Bits* source = static_cast<const Bits*>(from);
  if (vector) {
    cp_async_16(to, valid > 0 ? source + at : source, valid > 0);
    return;
  }
  constexpr int kCount = 16 / sizeof(Bits);
  Vector<Bits, kCount> chunk;
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    chunk.at[i] = i < valid ? source[at + i * feature_stride] : Bits(0);
  }
  store_vector(static_cast<Bits*>(to), chunk);
}

struct BlockTeam {
  int64_t* of_warps;  // kDecodeWarps, in shared memory
  int rank = threadIdx.x;
  static constexpr int size = kDecodeThreads;

  __device__ void sync() const { __syncthreads(); }
  __device__ Sums sums(int64_t mine) const {
    const int lane = rank % 32, warp = rank / 32;
    int64_t upto = mine;
#pragma unroll
    for (int bit = 1; bit < 32; bit *= 2) {
      const int64_t lower = __shfl_up_sync(kAllLanes, upto, bit);
      if (lane >= bit) upto += lower;
    }
    __syncthreads();  // the last call's have been read
    if (lane == 31) of_warps[warp] = upto;
    __syncthreads();
    Sums all = {upto - mine, 0};
    for (int w = 0; w < kDecodeWarps; ++w) {
      if (w < warp) all.before += of_warps[w];
      all.total += of_warps[w];
    }
    return all;
  }
};

// ---- what becomes of a state ----

// Past L1, which may not hold what other blocks have written since.
template <int size>
__device__ __forceinline__ Vector<float, size> load_written(const float* p) {
#if defined(__CUDACC__)
  static_assert(size == 1 || size == 4, "those that are used");
  if constexpr (size == 1) {
    return {{__ldcg(p)}};
  } else {
    const float4 x = __ldcg(reinterpret_cast<const float4*>(p));
    return {{x.x, x.y, x.z, x.w}};
  }
#else
  return load_vector<size>(p);
#endif
}

__device__ __forceinline__ float load_float(const Tensor& tensor, int64_t at) {
  switch (tensor.dtype) {
    case DType::kBFloat16:
      return to_float(static_cast<const BFloat16*>(tensor.data)[at]);
    case DType::kFloat16:
      return to_float(static_cast<const Half*>(tensor.data)[at]);
    default:
      return static_cast<const float*>(tensor.data)[at];
  }
}

struct Query {
  int row, head, i;
};

__device__ __forceinline__ Query query_of(const DecodePlan& plan, int row, int kv_head, int query) {
  return {row, kv_head * plan.groups + query / plan.queries, query % plan.queries};
}

template <typename T>
__device__ __forceinline__ T* out_of(const PrefixAttentionDecode& p, const Query& q) {
  return static_cast<T*>(p.out.data) + q.row * p.out.stride[0] + q.head * p.out.stride[1] +
         q.i * p.out.stride[2];
}

__device__ __forceinline__ float& lse_of(const PrefixAttentionDecode& p, const Query& q) {
  return p
      .lse[(int64_t{q.row} * (p.plan.kv_heads * p.plan.groups) + q.head) * p.plan.queries + q.i];
}

// Of numbers from a column on those that are no padding.
template <typename T, int count>
__device__ __forceinline__ void store_rounded(T* out, int column, const Vector<float, count>& x,
                                              int v_dim) {
  Vector<T, count> rounded;
#pragma unroll
  for (int i = 0; i < count; ++i) rounded.at[i] = from_float<T>(x.at[i]);
  if (v_dim % count == 0) {
    if (column < v_dim) store_vector(out + column, rounded);
    return;
  }
#pragma unroll
  for (int i = 0; i < count; ++i) {
    if (column + i < v_dim) out[column + i] = rounded.at[i];
  }
}

// Its head's sink, in units of log 2.
__device__ __forceinline__ float sink_of(const PrefixAttentionDecode& p, const Query& q) {
  return load_float(p.sinks, q.head * p.sinks.stride[0]) * kLog2E;
}

// A stacked query's place in the workspace, in states.
__device__ __forceinline__ int64_t state_of(const DecodePlan& plan, int row, int kv_head,
                                            int query) {
  return ((int64_t{row} * plan.kv_heads + kv_head) * plan.per_row + query) * plan.slots();
}

// Where the result of one query of an item goes: its slot, or out where it is the whole result.
template <typename T, int kHeadDim>
struct Destination {
  float* state = nullptr;
  T* out = nullptr;
  float factor;

  // `leads`: this thread writes the LSE.
  __device__ Destination(const PrefixAttentionDecode& p, const DecodeItem& item, int row, int query,
                         int slot, bool whole, Softmax found, bool leads) {
    if (whole) {
      const Query q = query_of(p.plan, row, item.kv_head, query);
      factor = 1.0f;
      if (p.sinks.data != nullptr) factor = found.add(sink_of(p, q));
      out = out_of<T>(p, q);
      if (leads) lse_of(p, q) = found.log2() * kLn2;
      factor *= found.norm();
    } else {
      const int64_t at = state_of(p.plan, row, item.kv_head, query) + slot;
      state = p.states + at * kHeadDim;
      if (leads) p.state_lse[at] = found.log2();
      factor = found.norm();
    }
  }

  template <int count>
  __device__ void store(int column, Vector<float, count> x, int v_dim) const {
#pragma unroll
    for (int i = 0; i < count; ++i) x.at[i] *= factor;
    if (state != nullptr) {
      store_vector(state + column, x);
    } else {
      store_rounded(out, column, x, v_dim);
    }
  }
};

// The partial results of every query of a tile's rows that are to be merged here into its result.
// A thread takes four features of kQueries queries at a time and asks for kAhead partial results of
// each before it waits for the first: whoever ends last may have a whole tile's to read, from L2.
template <typename T, int kHeadDim>
__device__ void merge_rows(const PrefixAttentionDecode& p, const DecodeShared<kHeadDim>& shared) {
  constexpr int kThreads = kHeadDim / 4, kQueries = 4, kAhead = 5;
  const DecodePlan& plan = p.plan;
  const int kv_head = shared.item.kv_head, all = shared.item.rows * plan.per_row * kThreads;
  for (int begin = threadIdx.x; begin < all; begin += kQueries * kDecodeThreads) {
    Query query[kQueries];
    int used[kQueries], longest = 0;
    int64_t first[kQueries];
    Softmax found[kQueries];
    Vector<float, 4> sum[kQueries] = {};
#pragma unroll
    for (int k = 0; k < kQueries; ++k) {
      const int at = begin + k * kDecodeThreads, j = at / kThreads;
      const int r = at < all ? j / plan.per_row : 0;
      used[k] = at < all && shared.merged[r] >= 0 ? plan.own_splits + shared.merged[r] : 0;
      if (used[k] == 0) continue;
      longest = used[k] > longest ? used[k] : longest;
      query[k] = query_of(plan, shared.row[r], kv_head, j % plan.per_row);
      first[k] = state_of(plan, shared.row[r], kv_head, j % plan.per_row);
      if (p.sinks.data != nullptr) found[k].add(sink_of(p, query[k]));
    }
    const auto column = [&](int k) { return (begin + k * kDecodeThreads) % kThreads * 4; };
    for (int slot = 0; slot < longest; slot += kAhead) {
      Vector<float, 4> state[kQueries][kAhead];
      float lse[kQueries][kAhead];
#pragma unroll
      for (int k = 0; k < kQueries; ++k) {
#pragma unroll
        for (int i = 0; i < kAhead; ++i) {
          state[k][i] = {};
          lse[k][i] = -INFINITY;
          if (slot + i < used[k]) {
            state[k][i] = load_written<4>(p.states + (first[k] + slot + i) * kHeadDim + column(k));
            lse[k][i] = load_written<1>(p.state_lse + first[k] + slot + i).at[0];
          }
        }
      }
#pragma unroll
      for (int k = 0; k < kQueries; ++k) {
#pragma unroll
        for (int i = 0; i < kAhead; ++i) {
          const float fade = found[k].add(lse[k][i]);
          const float weight = exp2_approximate(lse[k][i] - found[k].shift());
#pragma unroll
          for (int c = 0; c < 4; ++c) {
            sum[k].at[c] = sum[k].at[c] * fade + state[k][i].at[c] * weight;
          }
        }
      }
    }
#pragma unroll
    for (int k = 0; k < kQueries; ++k) {
      if (used[k] == 0) continue;
      const float norm = found[k].norm();
#pragma unroll
      for (int c = 0; c < 4; ++c) sum[k].at[c] *= norm;
      store_rounded(out_of<T>(p, query[k]), column(k), sum[k], p.v_dim);
      if (column(k) == 0) lse_of(p, query[k]) = found[k].log2() * kLn2;
    }
  }
}

// ---- an item ----

// kAcross: among how many warps a tile's queries are shared; the keys of a block, among the rest.
// kWarpgroup: products are the warpgroup's, of all of the block's queries and keys.
template <typename T, typename Entry, int kHeadDim, int kAcross, int kFragments, bool kWarpgroup>
struct Attend {
  static constexpr bool kWiden = sizeof(Entry) == 1;
  static constexpr bool kScaleWeights = kWiden && !std::is_same<T, Half>::value;
  static constexpr int kAlong = kDecodeWarps / kAcross;
  static constexpr int kRows = 16 * kAcross * kFragments;
  static constexpr int kWarpKeys = kDecodeKeys / kAlong;
  static constexpr int kStep = kWarpKeys < 32 || kWarpgroup ? kWarpKeys : 32;
  static constexpr int kBlock = kDecodeKeys * kHeadDim;
  static_assert(!kWarpgroup ||
                (kAlong == 1 && kFragments == 2 && kHeadDim % kPanel == 0 && !kWiden));

  using Shared = DecodeShared<kHeadDim>;

  const PrefixAttentionDecode& p;
  Shared& shared;
  // Read again wherever they are needed: in registers they would push accumulators out.
  const DecodeItem& item = shared.item;
  // Of which block t begins at low + t * kDecodeKeys.
  const Interval& share = shared.share;
  int turn = INT_MAX;  // number of the first block of shared.behind
  int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int warp_rows = warp % kAcross * 16, warp_keys = warp / kAcross * kWarpKeys;
  int live = 0;  // fragments of this warp that have queries
  float accumulator[kFragments][kHeadDim / 8][4] = {};
  // Of rows lane / 4 and lane / 4 + 8; sums are this lane's. A warpgroup's is in shared memory.
  Softmax softmax[kFragments][2] = {};

  __device__ Softmax& kept(int f, int half) {
    return static_cast<WarpgroupShared<kHeadDim>&>(shared)
        .softmax[2 * f + half][opaque((int)threadIdx.x)];
  }

  __device__ int fragment_row(int f) const { return f * 16 * kAcross + warp_rows; }

  __device__ __forceinline__ void load_queries() const {
    constexpr int kChunks = kHeadDim / 8;
    for (int c = threadIdx.x; c < kRows * kChunks; c += kDecodeThreads) {
      const int j = c / kChunks, chunk = c % kChunks;
      int64_t at = 0;
      int valid = 0;
      if (j < item.stacked) {
        valid = p.head_dim - chunk * 8;
        const int row = shared.row[j / p.plan.per_row];
        const Query q = query_of(p.plan, row, item.kv_head, item.query(j, p.plan.per_row));
        at = q.row * p.query.stride[0] + q.head * p.query.stride[1] + q.i * p.query.stride[2] +
             chunk * 8 * p.query.stride[3];
      }
      copy_chunk<uint16_t>(shared.query + chunk_at<kHeadDim, kRows>(j, chunk), p.query.data, at,
                           p.query.stride[3], p.vector_query, valid);
    }
  }

  using Bits = std::conditional_t<kWiden, uint8_t, uint16_t>;

  // Keys or values of block number t of the share into its stage; nothing where there is none.
  template <bool values>
  __device__ __forceinline__ void load(int t) const {
    constexpr int kEach = 16 / sizeof(Entry), kChunks = kHeadDim / kEach;
    const bool turned = !kWarpgroup && t >= turn;
    const KeySource& from = turned ? shared.behind : shared.from;
    const Interval keys = turned ? shared.behind_keys : share;
    const int begin = keys.low + t * kDecodeKeys, count = keys.high - begin;
    if (count <= 0) return;
    unsigned char* stage = reinterpret_cast<unsigned char*>(shared.ring) +
                           (t % kStages * 2 + values) * kBlock * sizeof(Entry);
    const auto place = [&](int n, int chunk) {
      const int at =
          kWiden ? n * kHeadDim + chunk * kEach : chunk_at<kHeadDim, kDecodeKeys>(n, chunk);
      return stage + at * sizeof(Entry);
    };
    const int64_t stride = values ? from.value_stride : from.key_stride;
    const int64_t feature = values ? from.value_feature : from.key_feature;
    const Bits* source = static_cast<const Bits*>(values ? from.value : from.key) + begin * stride;
    const int width = values ? p.v_dim : p.head_dim, thread = opaque((int)threadIdx.x);
    if constexpr (kDecodeThreads % kChunks == 0) {
      // A thread has one column of chunks: few instructions beside the products.
      if (from.vector) {
        constexpr int kAtOnce = kDecodeThreads / kChunks;
        const int first = thread / kChunks, chunk = thread % kChunks;
        source += first * stride + chunk * kEach;
#pragma unroll
        for (int n = 0; n < kDecodeKeys; n += kAtOnce) {
          cp_async_16(place(first + n, chunk), source, first + n < count && chunk * kEach < width);
          source += kAtOnce * stride;
        }
        return;
      }
    }
#pragma unroll 1
    for (int c = thread; c < kDecodeKeys * kChunks; c += kDecodeThreads) {
      const int n = c / kChunks, chunk = c % kChunks;
      copy_chunk<Bits>(place(n, chunk), source, n * stride + chunk * kEach * feature, feature,
                       from.vector, n < count ? width - chunk * kEach : 0);
    }
  }

  __device__ __forceinline__ void load_block(int t) const {
    load<false>(t);
    load<true>(t);
    cp_async_commit();
  }

  // Block t's 8-bit entries as numbers that products take, and their scales.
  __device__ __forceinline__ void widen(int t) const {
    constexpr int kChunks = kHeadDim / 16;
    const Entry* stage = reinterpret_cast<const Entry*>(shared.ring) + t % kStages * 2 * kBlock;
    const int begin = share.low + t * kDecodeKeys;
    static_assert(kDecodeThreads == 2 * kDecodeKeys, "a thread a scale");
    const bool second = threadIdx.x >= kDecodeKeys;
    const int n = threadIdx.x % kDecodeKeys;
    const Tensor& scales = second ? p.prefix_value_scale : p.prefix_key_scale;
    const int64_t at = item.kv_head * scales.stride[0] +
                       (shared.from.first + begin + n) / p.scale_block * scales.stride[1];
    (second ? shared.value_scale : shared.key_scale)[n] =
        begin + n < share.high ? static_cast<const float*>(scales.data)[at] : 0.0f;
    if (!kScaleWeights) __syncthreads();
    for (int c = threadIdx.x; c < 2 * kDecodeKeys * kChunks; c += kDecodeThreads) {
      const int which = c / (kDecodeKeys * kChunks), row = c / kChunks % kDecodeKeys;
      const auto entries = load_vector<16>(stage + c * 16);
      const float factor = !kScaleWeights && which ? shared.value_scale[row] : 1.0f;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        Vector<uint32_t, 4> wide;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int at = half * 8 + i * 2;
          wide.at[i] =
              pack2<T>(to_float(entries.at[at]) * factor, to_float(entries.at[at + 1]) * factor);
        }
        store_vector(
            reinterpret_cast<uint32_t*>(
                wide_block(which) + chunk_at<kHeadDim, kDecodeKeys>(row, c % kChunks * 2 + half)),
            wide);
      }
    }
  }

  __device__ uint16_t* wide_block(int which) const {
    return shared.ring + (kStages + which) * kBlock;
  }

  template <typename Sees>
  __device__ __forceinline__ void compute_warps(Sees sees, int blocks) {
    for (int t = 0; t < blocks; ++t) {
      cp_async_wait<kStages - 1>();
      __syncthreads();
      if (t == turn) {
        look(sees, true);
        if (threadIdx.x == 0) shared.share = shared.behind_keys;
        __syncthreads();
        find_open();
      }
      if constexpr (kWiden) {
        widen(t);
        __syncthreads();
        load_block(t + kStages);
      }
      if (live > 0) compute(t);
      if (!kWiden) {
        __syncthreads();
        load_block(t + kStages);
      }
    }
  }

  // This warp's queries against its keys of block t.
  __device__ __forceinline__ void compute(int t) {
    const uint16_t* keys = kWiden ? wide_block(0) : shared.ring + t % kStages * 2 * kBlock;
    const uint16_t* values = keys + kBlock;
#pragma unroll 1
    for (int step = 0; step < kWarpKeys; step += kStep) {
      const int place = warp_keys + step, begin = share.low + t * kDecodeKeys + place;
      if (begin >= share.high) break;
      float scores[kFragments][kStep / 8][4] = {};
      multiply_keys(keys, place, scores);
#pragma unroll
      for (int f = 0; f < kFragments; ++f) {
        if (f < live) weigh(f, place, begin, scores[f]);
      }
      multiply_values(values, place, scores);
    }
  }

  __device__ __forceinline__ void multiply_keys(const uint16_t* keys, int place,
                                                float (&scores)[kFragments][kStep / 8][4]) const {
#pragma unroll 4
    for (int d = 0; d < kHeadDim / 16; ++d) {
      uint32_t a[kFragments][4];
#pragma unroll
      for (int f = 0; f < kFragments; ++f) {
        if (f < live) {
          ldmatrix_x4(a[f], shared.query + chunk_at<kHeadDim, kRows>(fragment_row(f) + lane % 16,
                                                                     2 * d + lane / 16));
        }
      }
#pragma unroll
      for (int n = 0; n < kStep / 16; ++n) {
        uint32_t b[4];
        ldmatrix_x4(b, keys + chunk_at<kHeadDim, kDecodeKeys>(
                                  place + n * 16 + lane / 16 * 8 + lane % 8, 2 * d + lane / 8 % 2));
#pragma unroll
        for (int f = 0; f < kFragments; ++f) {
          if (f < live) {
            mma_m16n8k16<T>(scores[f][2 * n], a[f], {b[0], b[1]});
            mma_m16n8k16<T>(scores[f][2 * n + 1], a[f], {b[2], b[3]});
          }
        }
      }
    }
  }

  // Scores of fragment f into weights, and the state so far into the new unit.
  __device__ __forceinline__ void weigh(int f, int place, int begin,
                                        float (&scores)[kStep / 8][4]) {
    const float factor = p.scale * kLog2E;
    const int lane = opaque((int)threadIdx.x) % 32, column = lane % 4 * 2;
    const int warp = opaque((int)threadIdx.x) / 32, rows = f * 16 * kAcross + warp % kAcross * 16;
#pragma unroll
    for (int n = 0; n < kStep / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        scores[n][i] *= factor;
        if (kWiden) scores[n][i] *= shared.key_scale[place + n * 8 + column + i % 2];
      }
    }
    if (p.softcap != 0.0f) {
      const float cap = p.softcap * kLog2E, inverse = 1.0f / cap;
#pragma unroll
      for (int n = 0; n < kStep / 8; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) scores[n][i] = cap * tanhf(scores[n][i] * inverse);
      }
    }
    const Interval open = shared.warp_open[warp];
    if (begin < open.low || begin + kStep > open.high) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const Interval seen = shared.seen[rows + lane / 4 + half * 8];
        const int low = seen.low - begin, high = (int)least(seen.high, share.high) - begin;
#pragma unroll
        for (int n = 0; n < kStep / 8; ++n) {
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            const int at = n * 8 + column + i;
            if (at < low || at >= high) scores[n][half * 2 + i] = -INFINITY;
          }
        }
      }
    }
    float fade[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      Softmax state = kWarpgroup ? kept(f, half) : softmax[f][half];
      float top = -INFINITY;
#pragma unroll
      for (int n = 0; n < kStep / 8; ++n) {
        top = fmaxf(top, fmaxf(scores[n][half * 2], scores[n][half * 2 + 1]));
      }
      const Softmax with = {fmaxf(state.top, warp_max<4>(top))};
      const float shift = with.shift();
      fade[half] = exp2_approximate(state.top - shift);
      state.top = with.top;
      state.sum *= fade[half];
#pragma unroll
      for (int n = 0; n < kStep / 8; ++n) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          float& score = scores[n][half * 2 + i];
          score = exp2_approximate(score - shift);
          state.sum += score;
          if (kScaleWeights) score *= shared.value_scale[place + n * 8 + column + i];
        }
      }
      (kWarpgroup ? kept(f, half) : softmax[f][half]) = state;
    }
    // Most blocks of a long prefix bring no larger score to any of a warp's rows.
    if (__any_sync(kAllLanes, fade[0] != 1.0f || fade[1] != 1.0f)) {
#pragma unroll
      for (int d = 0; d < kHeadDim / 8; ++d) {
#pragma unroll
        for (int i = 0; i < 4; ++i) accumulator[f][d][i] *= fade[i / 2];
      }
    }
  }

  __device__ __forceinline__ void multiply_values(
      const uint16_t* values, int place, const float (&weights)[kFragments][kStep / 8][4]) {
#pragma unroll
    for (int n = 0; n < kStep / 16; ++n) {
      uint32_t a[kFragments][4];
#pragma unroll
      for (int f = 0; f < kFragments; ++f) pack_weights(n, weights[f], a[f]);
#pragma unroll
      for (int d = 0; d < kHeadDim / 16; ++d) {
        uint32_t b[4];
        ldmatrix_x4_transposed(b, values + chunk_at<kHeadDim, kDecodeKeys>(
                                               place + n * 16 + lane % 16, 2 * d + lane / 16));
#pragma unroll
        for (int f = 0; f < kFragments; ++f) {
          if (f < live) {
            mma_m16n8k16<T>(accumulator[f][2 * d], a[f], {b[0], b[1]});
            mma_m16n8k16<T>(accumulator[f][2 * d + 1], a[f], {b[2], b[3]});
          }
        }
      }
    }
  }

  // Two fragments take turns, so that one's softmax runs beside the other's products, of its
  // weights with block t's values and of its queries with block t + 1's keys, which are a group. A
  // turn begins with the first fragment's weights of block t and the second one's scores, and no
  // product under way: ptxas would make those wait for each other that it sees around a loop.
  __device__ __forceinline__ void compute_group(int blocks) {
    if (blocks == 0) return;
    float scores[2][kStep / 8][4];
    uint32_t weights[2][kStep / 16][4];
#pragma unroll
    for (int f = 0; f < 2; ++f) {
      settle(accumulator[f]);
#pragma unroll
      for (int half = 0; half < 2; ++half) kept(f, half) = {};
    }
    cp_async_wait<1>();
    fence_proxy_async();
    __syncthreads();
#pragma unroll
    for (int f = 0; f < 2; ++f) {
      wgmma_fence();
      multiply_keys_group(f, 0, scores[f]);
      wgmma_commit();
    }
    wgmma_wait<1>();
    weigh_group<0>(0, scores, weights);
    wgmma_wait<0>();
#pragma unroll 1
    for (int t = 0; t + 1 < blocks; ++t) take_turns<false>(t, scores, weights);
    take_turns<true>(blocks - 1, scores, weights);
#pragma unroll
    for (int f = 0; f < 2; ++f) {
      settle(accumulator[f]);
#pragma unroll
      for (int half = 0; half < 2; ++half) softmax[f][half] = kept(f, half);
    }
  }

  using GroupScores = float[2][kStep / 8][4];
  using GroupWeights = uint32_t[2][kStep / 16][4];

  template <bool last>
  __device__ __forceinline__ void take_turns(int t, GroupScores& scores, GroupWeights& weights) {
    cp_async_wait<0>();
    fence_proxy_async();
    __syncthreads();
    multiply_group<0, last>(t, scores, weights);
    if (!last) {
      // In place of the values before block t's, and of block t's keys.
      load<true>(t + 1);
      load<false>(t + 2);
      cp_async_commit();
    }
    weigh_group<1>(t, scores, weights);
    multiply_group<1, last>(t, scores, weights);
    if (!last) {
      wgmma_wait<1>();
      settle(weights[0]);
      weigh_group<0>(t + 1, scores, weights);
    }
    wgmma_wait<0>();
    settle(weights[0]);
    settle(weights[1]);
  }

  template <int f>
  __device__ __forceinline__ void weigh_group(int t, GroupScores& scores, GroupWeights& weights) {
    settle(scores[f]);
    settle(accumulator[f]);
    weigh(f, 0, share.low + t * kDecodeKeys, scores[f]);
#pragma unroll
    for (int n = 0; n < kStep / 16; ++n) pack_weights(n, scores[f], weights[f][n]);
    settle(weights[f]);
    settle(accumulator[f]);
  }

  template <int f, bool last>
  __device__ __forceinline__ void multiply_group(int t, GroupScores& scores,
                                                 GroupWeights& weights) {
    wgmma_fence();
    const Operand values = operand(stage(t) + kBlock, kDecodeKeys * kPanelRow);
#pragma unroll
    for (int n = 0; n < kStep / 16; ++n) {
      wgmma_m64k16<T>(accumulator[f], weights[f][n], values.moved(n * 16 * kPanelRow));
    }
    if (!last) multiply_keys_group(f, t + 1, scores[f]);
    wgmma_commit();
  }

  __device__ __forceinline__ void multiply_keys_group(int f, int t,
                                                      float (&scores)[kStep / 8][4]) const {
    const Operand queries = operand(shared.query + f * 64 * kPanel, 0), keys = operand(stage(t), 0);
#pragma unroll
    for (int d = 0; d < kHeadDim / 16; ++d) {
      const int panel = d * 16 / kPanel * kPanelRow, column = d * 16 % kPanel * 2;
      wgmma_m64n64k16<T>(scores, queries.moved(panel * kRows + column),
                         keys.moved(panel * kDecodeKeys + column), d > 0);
    }
  }

  __device__ const uint16_t* stage(int t) const { return shared.ring + t % kStages * 2 * kBlock; }

  // Weights of 16 keys as a product takes them.
  __device__ static void pack_weights(int n, const float (&weights)[kStep / 8][4],
                                      uint32_t (&a)[4]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float (&w)[4] = weights[2 * n + i / 2];
      a[i] = pack2<T>(w[i % 2 * 2], w[i % 2 * 2 + 1]);
    }
  }

  // What the tile's queries see, into shared.seen; returns all that this thread's see.
  template <typename Sees>
  __device__ Interval look(Sees sees, bool behind) const {
    Interval tile = {INT_MAX, 0};
    for (int j = threadIdx.x; j < kRows; j += kDecodeThreads) {
      // A place that no query has sees everything, so that it asks for no mask.
      Interval one = {0, INT_MAX};
      if (j < item.stacked) {
        one = sees(j, behind);
        if (one.low < one.high) tile = joined(tile, one);
      }
      shared.seen[j] = one;
    }
    return tile;
  }

  // The item's share of what the tile's queries see, into shared.share.
  template <typename Sees>
  __device__ void find_share(Sees sees) {
    Interval tile = look(sees, false);
#pragma unroll
    for (int bit = 16; bit > 0; bit /= 2) {
      tile = joined(tile, {__shfl_xor_sync(kAllLanes, tile.low, bit),
                           __shfl_xor_sync(kAllLanes, tile.high, bit)});
    }
    if (lane == 0) shared.warp_seen[warp] = tile;
    __syncthreads();
    for (int w = 0; w < kDecodeWarps; ++w) tile = joined(tile, shared.warp_seen[w]);
    if (threadIdx.x == 0) {
      shared.share =
          tile.low < tile.high ? share_of(tile, item.split, item.splits) : Interval{0, 0};
    }
    __syncthreads();
  }

  // Keys of the share, or of what is behind it, that all queries of this warp see.
  __device__ void find_open() {
    Interval open = {0, share.high};
#pragma unroll
    for (int f = 0; f < kFragments; ++f) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const Interval seen = shared.seen[fragment_row(f) + lane / 4 + half * 8];
        open = {(int)most(open.low, seen.low), (int)least(open.high, seen.high)};
      }
    }
#pragma unroll
    for (int bit = 16; bit > 0; bit /= 2) {
      open.low = (int)most(open.low, __shfl_xor_sync(kAllLanes, open.low, bit));
      open.high = (int)least(open.high, __shfl_xor_sync(kAllLanes, open.high, bit));
    }
    if (lane == 0) shared.warp_open[warp] = open;
    __syncwarp();
  }

  __device__ int blocks_of(Interval keys) const {
    return (keys.high - keys.low + kDecodeKeys - 1) / kDecodeKeys;
  }

  // `sees(j, behind)`: what stacked query j sees of the item's own source, or of the one behind.
  // `behind()`: which keys of that one the item goes on to, if any; it may take until the first
  // block is under way.
  template <typename Sees, typename Behind>
  __device__ __forceinline__ void run(Sees sees, Behind behind) {
    find_share(sees);
    load_queries();
    for (int f = 0; f < kFragments; ++f) live += fragment_row(f) < item.stacked;
    if constexpr (kWarpgroup) {
      load<false>(0);
      cp_async_commit();
      load<true>(0);
      load<false>(1);
      cp_async_commit();
      find_open();
      compute_group(__shfl_sync(kAllLanes, blocks_of(share), 0));
    } else {
      load_block(0);
      int blocks = blocks_of(share);
      const Interval more = behind();
      if (more.low < more.high) {
        turn = blocks > 0 ? blocks : 1;  // block 0, if empty, is under way
        blocks = turn + blocks_of(more);
        if (threadIdx.x == 0) shared.behind_keys = {more.low - turn * kDecodeKeys, more.high};
        __syncthreads();
      }
      for (int t = 1; t < kStages; ++t) load_block(t);
      find_open();
      compute_warps(sees, blocks);
    }
    cp_async_wait<0>();

#pragma unroll
    for (int f = 0; f < kFragments; ++f) {
#pragma unroll
      for (int half = 0; half < 2; ++half) softmax[f][half].sum = warp_sum<4>(softmax[f][half].sum);
    }
    if constexpr (kAlong == 1) {
      store_warp();
    } else {
      store_together();
    }
  }

  __device__ Destination<T, kHeadDim> destination(int j, Softmax found, bool leads) const {
    const int row = shared.row[j / p.plan.per_row];
    return {p, item, row, item.query(j, p.plan.per_row), shared.slot, shared.whole, found, leads};
  }

  __device__ __forceinline__ void store_warp() const {
#pragma unroll
    for (int f = 0; f < kFragments; ++f) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int j = fragment_row(f) + lane / 4 + half * 8;
        if (j >= item.stacked) continue;
        const auto to = destination(j, softmax[f][half], lane % 4 == 0);
#pragma unroll
        for (int d = 0; d < kHeadDim / 8; ++d) {
          to.store(d * 8 + lane % 4 * 2,
                   Vector<float, 2>{{accumulator[f][d][half * 2], accumulator[f][d][half * 2 + 1]}},
                   p.v_dim);
        }
      }
    }
  }

  // The warps' states of the same queries, over different keys, as one.
  __device__ __forceinline__ void store_together() const {
    __syncthreads();  // the ring has been read
    float* mine = shared.warp_state(warp);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int j = lane / 4 + half * 8;
      if (j >= item.stacked) continue;
      if (lane % 4 == 0) {
        shared.warp_top[warp][j] = softmax[0][half].top;
        shared.warp_sum[warp][j] = softmax[0][half].sum;
      }
#pragma unroll
      for (int d = 0; d < kHeadDim / 8; ++d) {
        store_vector(
            mine + j * kHeadDim + d * 8 + lane % 4 * 2,
            Vector<float, 2>{{accumulator[0][d][half * 2], accumulator[0][d][half * 2 + 1]}});
      }
    }
    __syncthreads();
    constexpr int kThreads = kHeadDim / 4;
    for (int at = threadIdx.x; at < item.stacked * kThreads; at += kDecodeThreads) {
      const int j = at / kThreads, column = at % kThreads * 4;
      Softmax all;
      for (int w = 0; w < kDecodeWarps; ++w) all.top = fmaxf(all.top, shared.warp_top[w][j]);
      const float shift = all.shift();
      Vector<float, 4> sum = {};
#pragma unroll
      for (int w = 0; w < kDecodeWarps; ++w) {
        const float weight = exp2_approximate(shared.warp_top[w][j] - shift);
        const auto state = load_vector<4>(shared.warp_state(w) + j * kHeadDim + column);
        all.sum += weight * shared.warp_sum[w][j];
#pragma unroll
        for (int i = 0; i < 4; ++i) sum.at[i] += weight * state.at[i];
      }
      destination(j, all, column == 0).store(column, sum, p.v_dim);
    }
  }
};

template <typename T, typename Entry, int kHeadDim, bool kWarpgroup, typename Sees, typename Behind>
__device__ __forceinline__ void attend(const PrefixAttentionDecode& p,
                                       DecodeShared<kHeadDim>& shared, Sees sees, Behind behind) {
  constexpr int kMost = decode_fragments(kHeadDim);
  if (__shfl_sync(kAllLanes, shared.item.is_small, 0)) {
    Attend<T, Entry, kHeadDim, 1, 1, false>{p, shared}.run(sees, behind);
    return;
  }
  if constexpr (kWarpgroup) {
    if (__shfl_sync(kAllLanes, shared.item.stacked, 0) <= 16 * kDecodeWarps) {
      Attend<T, Entry, kHeadDim, kDecodeWarps, 1, false>{p, shared}.run(sees, behind);
      return;
    }
  }
  Attend<T, Entry, kHeadDim, kDecodeWarps, kMost, kWarpgroup>{p, shared}.run(sees, behind);
}

// Says that the item is done for each of its rows, and merges those that waited for nothing else.
template <typename T, int kHeadDim>
__device__ void arrive(const PrefixAttentionDecode& p, DecodeShared<kHeadDim>& shared) {
  const DecodeItem& item = shared.item;
  __threadfence();  // this thread's partial results, before
  __syncthreads();  // any of the block's arrivals
  for (int r = threadIdx.x; r < item.rows; r += kDecodeThreads) {
    unsigned* counter = p.counters + int64_t{shared.row[r]} * p.plan.kv_heads + item.kv_head;
    const unsigned now = atomicAdd(counter, shared.arrival) + shared.arrival;
    const bool here = merges(p.plan, now);
    shared.merged[r] = (int16_t)(here ? shares_of(now) : -1);
    if (here) *counter = 0;  // for the next call
  }
  __threadfence();
  __syncthreads();
  merge_rows<T>(p, shared);
}

// Waits for all items of a unit; shares of its prefix, or -1 where that takes too long: then who
// arrives last merges. So nobody waits for a block that waits for a place.
__device__ inline int wait_for_items(const DecodePlan& plan, unsigned* counter) {
  unsigned now = 0;
  for (int i = 0; i < kPatience; ++i) {
    now = load_volatile(counter);
    if (all_arrived(plan, now)) break;
    nap();
  }
  if (!all_arrived(plan, now)) {
    now = atomicAdd(counter, kLeft);
    if (!all_arrived(plan, now)) return -1;
  }
  *counter = 0;
  return shares_of(now);
}

// A merge item: rows of a head whose prefix items end last. Blocks that have no other work share
// out what the last of these items would have to do alone.
template <typename T, int kHeadDim>
__device__ void merge_late(const PrefixAttentionDecode& p, DecodeShared<kHeadDim>& shared,
                           int64_t block) {
  const DecodePlan& plan = p.plan;
  const DecodeItem item = merge_item(plan, block);
  if (threadIdx.x == 0) shared.item = item;
  for (int r = threadIdx.x; r < item.rows; r += kDecodeThreads) {
    const int row = item.first_row + r;
    const bool has_prefix = prefix_range(plan, p.rows, row_prefix(p.rows, row)).length > 0;
    unsigned* counter = p.counters + int64_t{row} * plan.kv_heads + item.kv_head;
    shared.row[r] = row;
    shared.merged[r] = (int16_t)(is_whole(plan, has_prefix) ? -1 : wait_for_items(plan, counter));
  }
  __threadfence();
  __syncthreads();
  merge_rows<T>(p, shared);
}

// The keys and values of a prefix whose first entry is number `first` of the pack.
template <typename Entry>
__device__ KeySource prefix_source(const PrefixAttentionDecode& p, int kv_head, int first) {
  const int64_t *key = p.prefix_key.stride, *value = p.prefix_value.stride;
  return {static_cast<const Entry*>(p.prefix_key.data) + kv_head * key[0] + first * key[1],
          static_cast<const Entry*>(p.prefix_value.data) + kv_head * value[0] + first * value[1],
          key[1],
          value[1],
          key[2],
          value[2],
          first,
          p.vector_prefix};
}

// A thread has set the item's row or rows; true where there is an item.
template <typename Entry, int kHeadDim>
__device__ bool find_prefix_item(const PrefixAttentionDecode& p, DecodeShared<kHeadDim>& shared) {
  const DecodePlan& plan = p.plan;
  const int number = (int)(blockIdx.x / plan.prefix_blocks);
  DecodeSection& section = shared.search().section;
  const BlockTeam team = {shared.search().sums};
  if (plan.indexed) sort_section(team, plan, p.rows, number, section);
  DecodeItem item;
  if (!prefix_item(team, plan, p.rows, section, blockIdx.x % plan.prefix_blocks, item)) {
    return false;
  }
  for (int r = threadIdx.x; r < item.rows; r += kDecodeThreads) {
    const int place = item.first_row + r;
    shared.row[r] = plan.indexed ? number * kSection + row_of(section.sorted[place]) : place;
  }
  if (threadIdx.x == 0) {
    shared.item = item;
    shared.from = prefix_source<Entry>(p, item.kv_head, item.entries.first);
  }
  __syncthreads();
  return true;
}

template <typename T, int kHeadDim>
__device__ void find_own_item(const PrefixAttentionDecode& p, DecodeShared<kHeadDim>& shared) {
  if (threadIdx.x == 0) {
    DecodeItem item = own_item(p.plan, blockIdx.x - p.plan.all_prefix_blocks());
    const int64_t *key = p.key.stride, *value = p.value.stride, row = item.first_row;
    item.entries = prefix_range(p.plan, p.rows, row_prefix(p.rows, (int)row));
    shared.item = item;
    shared.row[0] = (int)row;
    shared.from = {static_cast<const T*>(p.key.data) + row * key[0] + item.kv_head * key[1],
                   static_cast<const T*>(p.value.data) + row * value[0] + item.kv_head * value[1],
                   key[2],
                   value[2],
                   key[3],
                   value[3],
                   0,
                   p.vector_own};
  }
  __syncthreads();
}

template <typename T, typename Entry, int kHeadDim, bool kWarpgroup>
__global__ void __launch_bounds__(kDecodeThreads, kHeadDim <= 128 ? 2 : 1)
    prefix_attention_decode(const PrefixAttentionDecode p) {
  using Shared = std::conditional_t<kWarpgroup, WarpgroupShared<kHeadDim>, DecodeShared<kHeadDim>>;
  DecodeShared<kHeadDim>& shared = *reinterpret_cast<Shared*>(shared_memory());
  if (kWarpgroup) {
    device_assert(shared_address(shared.query) % 1024 == 0, "shared memory begins at odd panels");
  }
  const DecodePlan& plan = p.plan;
  const DecodeItem& item = shared.item;
  const int64_t late = blockIdx.x - plan.all_prefix_blocks() - plan.own_blocks();
  if (late >= 0) {
    merge_late<T>(p, shared, late);
    return;
  }
  const bool of_prefix = blockIdx.x < plan.all_prefix_blocks();
  if (of_prefix) {
    if (!find_prefix_item<Entry>(p, shared)) return;
  } else {
    find_own_item<T>(p, shared);
  }
  if (threadIdx.x == 0) {
    const bool has_prefix = item.entries.length > 0;
    shared.slot = (of_prefix ? plan.own_splits : 0) + item.split;
    shared.whole = is_whole(plan, has_prefix);
    shared.arrival = of_prefix ? prefix_arrival(plan, item) : own_arrival(plan, item, has_prefix);
  }
  const auto sees = [&](int j, bool behind) {
    const OwnRange own = own_range(plan, p.rows, shared.row[j / plan.per_row]);
    const int i = item.query(j, plan.per_row) % plan.queries;
    return of_prefix || behind ? sees_prefix(item.entries.length, own, i, p.window)
                               : sees_own(own, i, p.causal, p.window);
  };
  const auto behind = [&] {
    // No plan has 8-bit entries together with own keys.
    if (of_prefix || !std::is_same<T, Entry>::value) return Interval{0, 0};
    if (threadIdx.x == 0) {
      shared.behind = prefix_source<T>(p, item.kv_head, item.entries.first);
    }
    return behind_own(plan, item.entries.length, own_range(plan, p.rows, shared.row[0]), p.window);
  };
  if (sizeof(Entry) == 1 && of_prefix) {
    attend<T, Entry, kHeadDim, kWarpgroup>(p, shared, sees, behind);
  } else {
    attend<T, T, kHeadDim, kWarpgroup>(p, shared, sees, behind);
  }
  if (shared.whole) return;
  arrive<T>(p, shared);
}

}  // namespace cuda
}  // namespace softprompt_fast
