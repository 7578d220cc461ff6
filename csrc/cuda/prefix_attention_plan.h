// SPDX-License-Identifier: Apache-2.0
// prefix_attention's decode kernel: which block computes what. Plain C++, for host and device;
// csrc/tests/prefix_attention_plan_test.cpp holds it to its promises.
//
// The queries of a row that share a key/value head, G * S of them, are stacked: query j of a row is
// query j % S of head j / S. Two kinds of item, one a block of threads:
//
//  * a prefix item takes a tile of stacked queries of rows that share a prefix against one of its
//    shares of that prefix's entries;
//  * an own item takes a tile of one row's stacked queries against a share of the row's own keys,
//    and where the plan has them `together` goes on to the row's whole prefix: then there are no
//    prefix items, and nothing is merged.
//
// How many items of the first kind there are depends on values that only the device knows: which
// rows share a prefix and how long it is. The host launches as many blocks as sizes alone allow for
// (`prefix_blocks`), and each of them works out its item, or that there is none left for it. To do
// so it sorts the rows by prefix, at most kSection of them: rows of different sections share no
// tile, which costs one more read of a prefix per section and bounds the shared memory. Own items
// follow from sizes and need no sorting.
//
// Each item leaves a partial result in a slot of the workspace and arrives at the counter of every
// (row, key/value head) that it worked for. Who arrives last merges; but where prefix items are
// long, and so end last, their blocks would have all there is to merge while all others are idle:
// then there is a third kind, merge items, which come last and wait, for a while, for the items of
// a few rows. Items that do not know how
// many shares a row's prefix has still agree on the last arrival, for a row's arrivals always sum
// up to `DecodePlan::expected()`: the item of a prefix's first share also counts for those that the
// prefix could have had and has not, and so does a row's first own item where there is no prefix.
#pragma once

#include <limits.h>

#include "../tensor.h"

#if defined(__CUDACC__)
#define SOFTPROMPT_FAST_BOTH __host__ __device__ inline
#else
#define SOFTPROMPT_FAST_BOTH inline
#endif

namespace softprompt_fast {
namespace cuda {

constexpr int kSection = 256;    // rows that are sorted together
constexpr int kRun = 32;         // of them, by comparing each with each
constexpr int kDecodeKeys = 64;  // keys that are scored at a time; shares are multiples of it
constexpr int kSmallTile =
    16;  // stacked queries of the smaller tile: what one matrix product takes
constexpr int kMostTogether = 64;  // stacked queries of a row: a warpgroup's tiles have one source
constexpr int kMaxSplits = 32;     // shares of a prefix, and of a row's own keys
// Key blocks up to which own keys and a prefix are one item's, where there are few rows. Behind one
// another, blocks take 0.3 to 0.6 us each; shares of two blocks side by side are merged in 1.5 to 2
// us. So two blocks more than a share has are faster in any case, and a fourth might not be.
constexpr int kTogether = 4;
// Key blocks of a prefix item from which on it ends behind own items: some 0.7 us each, and own
// items that fill a device take 10 us and less.
constexpr int kLongShare = 8;
constexpr int kLateRows = 16;       // the most rows that a merge item has
constexpr int kFarthest = 1 << 29;  // positions and windows further out see the same

SOFTPROMPT_FAST_BOTH int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
SOFTPROMPT_FAST_BOTH int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
SOFTPROMPT_FAST_BOTH int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

struct Range {
  int first, length;
};

// Blocks of keys that it takes to score a prefix's entries.
SOFTPROMPT_FAST_BOTH int64_t key_blocks(Range entries) {
  return divide_up(most(0, entries.length), kDecodeKeys);
}

struct DecodeSizes {
  int64_t batch, q_heads, kv_heads, queries, own, packed;
  int64_t prefixes;  // N
  // Of the longest prefix that a row uses, a hint that bounds shares and with them the workspace:
  // an arena has far more entries. `packed` where it is not known.
  int64_t longest;
  bool offsets;  // prefix_offsets were given: lengths are known to the device only
  bool indexed;  // prefix_index was given: so is who shares a prefix
  bool widened;  // prefixes are of 8 bits
};

struct DecodePlan {
  int batch, kv_heads, groups, queries, own, packed;
  bool indexed;
  bool together;  // an own item takes its row's prefix too
  int per_row;    // stacked queries of a row and key/value head, G * S
  int tile;       // stacked queries of a large tile
  int row_tiles;  // large tiles of one row
  int own_tile, own_tiles, own_splits;
  int sections, wanted, min_blocks;
  int prefix_splits;      // the most shares a prefix can have
  int late_rows;          // rows of a merge item; 0: there are none, who arrives last merges
  int64_t prefix_blocks;  // of one section

  // Partial results of a query; of a single item's, which is its result, none are kept.
  SOFTPROMPT_FAST_BOTH int slots() const {
    return own_splits + prefix_splits > 1 ? own_splits + prefix_splits : 0;
  }
  SOFTPROMPT_FAST_BOTH int64_t units() const { return int64_t{batch} * kv_heads; }
  SOFTPROMPT_FAST_BOTH int64_t states() const { return units() * per_row * slots(); }
  SOFTPROMPT_FAST_BOTH int64_t all_prefix_blocks() const { return sections * prefix_blocks; }
  SOFTPROMPT_FAST_BOTH int64_t own_blocks() const { return units() * own_tiles * own_splits; }
  SOFTPROMPT_FAST_BOTH int64_t late_blocks() const {
    return late_rows ? kv_heads * divide_up(batch, late_rows) : 0;
  }
  SOFTPROMPT_FAST_BOTH int64_t blocks() const {
    return all_prefix_blocks() + own_blocks() + late_blocks();
  }
  SOFTPROMPT_FAST_BOTH unsigned expected() const {
    return own_tiles * own_splits + prefix_splits * row_tiles;
  }
  // Whole rows in a large tile; 1 also where a row takes several tiles.
  SOFTPROMPT_FAST_BOTH int tile_rows() const { return (int)most(1, tile / per_row); }
  SOFTPROMPT_FAST_BOTH bool small(int64_t rows) const { return rows * per_row <= kSmallTile; }
  SOFTPROMPT_FAST_BOTH int64_t tiles(int64_t rows) const {
    return small(rows) ? 1 : divide_up(rows, tile_rows()) * row_tiles;
  }
  // Key blocks a share. `work`: tiles times key blocks over all prefixes of a section.
  SOFTPROMPT_FAST_BOTH int64_t share_blocks(int64_t work, int64_t longest) const {
    return most(most(min_blocks, divide_up(work * kv_heads, wanted)),
                divide_up(longest, prefix_splits));
  }
  // Of a group of rows that share a prefix.
  SOFTPROMPT_FAST_BOTH int64_t items(int64_t rows, Range entries, int64_t share) const {
    return tiles(rows) * kv_heads * divide_up(key_blocks(entries), share);
  }
};

// The op's index tensors, dense, each as in its contract or absent.
struct DecodeRows {
  Index prefix_offsets, prefix_index, own_start, own_end, query_start;
};

// `tile`: queries of a large tile, at most the kernel's. `beside`: blocks for prefixes beside own
// items that fill the device; 0: on every other place. `resident`: blocks that the device runs at
// a time. `state_bytes`: of one query's partial result; the workspace may take `most_bytes` before
// prefixes get fewer shares for it. `together`: as kTogether; `late`: as kLongShare. Example: 64
// rows of one query, 32 heads over 8, 1024 entries, tiles of 128, 264 resident blocks: 512 own
// items, and 2 tiles on each of 8 heads against 4 shares of 256 entries.
inline DecodePlan plan_decode(const DecodeSizes& sizes, int tile, int resident, int64_t state_bytes,
                              int beside = 0, int together = kTogether, int late = kLongShare,
                              int64_t most_bytes = int64_t{128} << 20) {
  DecodePlan plan = {};
  plan.batch = (int)sizes.batch;
  plan.kv_heads = (int)sizes.kv_heads;
  plan.groups = (int)(sizes.q_heads / sizes.kv_heads);
  plan.queries = (int)sizes.queries;
  plan.own = (int)sizes.own;
  plan.packed = (int)sizes.packed;
  plan.indexed = sizes.indexed;
  plan.per_row = plan.groups * plan.queries;
  plan.tile = tile;
  plan.row_tiles = (int)divide_up(plan.per_row, tile);
  plan.own_tile = plan.per_row <= kSmallTile ? kSmallTile : tile;
  plan.own_tiles = (int)divide_up(plan.per_row, plan.own_tile);

  // One item for all of a row's keys, where it and another for the prefix would have run side by
  // side.
  const bool known = !sizes.indexed && !sizes.offsets;
  const int64_t longest =
      divide_up(known ? sizes.packed : most(1, least(sizes.longest, sizes.packed)), kDecodeKeys);
  const int64_t own_items = plan.units() * plan.own_tiles;
  plan.sections = plan.own_splits = 1;
  plan.together = sizes.packed > 0 && !sizes.widened && 2 * own_items <= resident &&
                  plan.per_row <= kMostTogether &&
                  longest + divide_up(sizes.own, kDecodeKeys) <= together;
  if (plan.together) return plan;

  // Own keys: split where there are too few rows to fill the device, 128 keys or more a share.
  const bool own_fills = own_items >= resident;
  plan.own_splits = (int)most(
      1, least(least(resident / own_items, divide_up(sizes.own, 2 * kDecodeKeys)), kMaxSplits));

  // Prefixes. Beside own items that fill the device alone they get some of its places: one kind's
  // arithmetic then runs beside the other kind's loads.
  plan.sections = sizes.indexed ? (int)divide_up(sizes.batch, kSection) : 1;
  const int64_t rows = sizes.indexed ? least(sizes.batch, kSection) : sizes.batch;
  if (beside == 0) beside = resident / 2;
  plan.wanted = (int)most(1, (own_fills ? beside : resident) / plan.sections);
  plan.min_blocks = own_fills ? 4 : 2;
  if (sizes.packed == 0) return plan;
  const int64_t least_tiles = sizes.indexed ? 1 : plan.tiles(rows);
  int64_t splits = least(divide_up(longest, plan.min_blocks), kMaxSplits);
  splits = least(splits, divide_up(plan.wanted, plan.kv_heads * least_tiles));
  const int64_t slot_bytes = plan.units() * plan.per_row * state_bytes;
  plan.prefix_splits = (int)most(1, least(splits, most_bytes / slot_bytes - plan.own_splits));
  const int64_t share = plan.share_blocks(least_tiles * longest, longest);
  if (own_fills && share >= late) {
    const int64_t places = most(1, resident / 2 / plan.kv_heads);
    plan.late_rows = (int)least(divide_up(plan.batch, places), kLateRows);
  }
  if (known) {
    plan.prefix_blocks = plan.kv_heads * least_tiles * divide_up(longest, share);
  } else {
    // A group of rows has less than one tile more than its share of them, and ceil(blocks / share)
    // is less than one more than the quotient.
    const int64_t groups = sizes.indexed ? least(rows, most(1, sizes.prefixes)) : 1;
    const int64_t tiles =
        plan.kv_heads * least(rows, rows / plan.tile_rows() + groups) * plan.row_tiles;
    plan.prefix_blocks = least(plan.wanted + tiles, tiles * plan.prefix_splits);
  }
  return plan;
}

SOFTPROMPT_FAST_BOTH int64_t read_index(const Index& index, int64_t i) {
  return index.wide ? ((const int64_t*)index.data)[i] : ((const int32_t*)index.data)[i];
}

// Entries of prefix n in the pack.
SOFTPROMPT_FAST_BOTH Range prefix_range(const DecodePlan& plan, const DecodeRows& rows, int64_t n) {
  if (n < 0) return {0, 0};
  if (rows.prefix_offsets.data == nullptr) return {0, plan.packed};
  const int first = (int)read_index(rows.prefix_offsets, n);
  return {first, (int)read_index(rows.prefix_offsets, n + 1) - first};
}

SOFTPROMPT_FAST_BOTH int64_t row_prefix(const DecodeRows& rows, int row) {
  return rows.prefix_index.data == nullptr ? 0 : read_index(rows.prefix_index, row);
}

struct OwnRange {
  int start, end, position;  // own_start, own_end, own position of the first query
};

SOFTPROMPT_FAST_BOTH OwnRange own_range(const DecodePlan& plan, const DecodeRows& rows, int row) {
  OwnRange own = {0, plan.own, plan.own - plan.queries};
  if (rows.own_start.data != nullptr) own.start = (int)read_index(rows.own_start, row);
  if (rows.own_end.data != nullptr) own.end = (int)read_index(rows.own_end, row);
  if (rows.query_start.data != nullptr) {
    const int64_t at = read_index(rows.query_start, row);
    own.position = (int)most(-kFarthest, least(at, kFarthest));
  }
  return own;
}

// Keys [first, second) of its prefix, and of its own, that query i of a row sees. window 0: none.
struct Interval {
  int low, high;
};

// The interval from the lower one's beginning to the higher one's end.
SOFTPROMPT_FAST_BOTH Interval joined(Interval a, Interval b) {
  return {(int)least(a.low, b.low), (int)most(a.high, b.high)};
}

SOFTPROMPT_FAST_BOTH Interval sees_prefix(int length, const OwnRange& own, int i, int window) {
  const int64_t place = int64_t{length} + own.position + i - own.start;
  const int64_t low = window ? most(0, place - window + 1) : 0;
  return {(int)least(low, length), length};
}

SOFTPROMPT_FAST_BOTH Interval sees_own(const OwnRange& own, int i, bool causal, int window) {
  const int64_t position = int64_t{own.position} + i;
  int64_t low = own.start, high = own.end;
  if (causal) high = least(high, position + 1);
  if (window) low = most(low, position - window + 1);
  return {(int)least(low, high), (int)high};
}

// What a row's own items go on to: the entries of its prefix that its first query sees, for the
// others see no more.
SOFTPROMPT_FAST_BOTH Interval behind_own(const DecodePlan& plan, int length, const OwnRange& own,
                                         int window) {
  return plan.together ? sees_prefix(length, own, 0, window) : Interval{0, 0};
}

// One of `splits` equal shares of [low, high), whole blocks of keys but for the last.
SOFTPROMPT_FAST_BOTH Interval share_of(Interval keys, int split, int splits) {
  const int64_t share =
      divide_up(divide_up(most(0, keys.high - keys.low), splits), kDecodeKeys) * kDecodeKeys;
  const int64_t low = least(keys.low + split * share, keys.high);
  return {(int)low, (int)least(low + share, keys.high)};
}

// A row of a section as a number whose order is theirs: longest prefix first, then by prefix, then
// by row; rows without entries last.
constexpr uint64_t kMostBlocks = 1 << 24;  // more than a prefix has

SOFTPROMPT_FAST_BOTH uint64_t row_key(int row, int64_t prefix, int64_t blocks) {
  return (kMostBlocks - (uint64_t)blocks) << 39 | (uint64_t)(blocks > 0 ? prefix : 0) << 8 |
         (uint64_t)row;
}
SOFTPROMPT_FAST_BOTH int row_of(uint64_t key) { return (int)(key & 0xFF); }
SOFTPROMPT_FAST_BOTH uint64_t without_row(uint64_t key) { return key >> 8; }
SOFTPROMPT_FAST_BOTH int64_t prefix_of(uint64_t key) {
  return key >> 39 == kMostBlocks ? -1 : (int64_t)(key >> 8 & INT_MAX);
}

// What a section's blocks work out together, in shared memory.
struct DecodeSection {
  uint64_t sorted[kSection];  // its rows, by row_key
  uint64_t runs[kSection];    // the same, sorted within each kRun of them
  int groups;                 // of rows that share a prefix; the last may be those without
  int first[kSection + 1];  // by group: its first place in the order; behind the last, their count
  Range entries[kSection];  // by group
  // A block's group, its number among the group's items, and key blocks a share.
  int found;
  int64_t number, share;

  SOFTPROMPT_FAST_BOTH int rows(int group) const { return first[group + 1] - first[group]; }
};

// Of a number a thread, the sum over threads of lower rank, and over all.
struct Sums {
  int64_t before, total;
};

// The only thread there is; on the device a block of them takes its place.
struct Alone {
  static constexpr int rank = 0, size = 1;
  void sync() const {}
  Sums sums(int64_t mine) const { return {0, mine}; }
};

// A thread's share of `count` things: neighbours, in the order of ranks.
template <typename Team>
SOFTPROMPT_FAST_BOTH Interval part_of(const Team& team, int count) {
  const int each = (count + team.size - 1) / team.size;
  const int low = (int)least(team.rank * each, count);
  return {low, (int)least(low + each, count)};
}

// How many of a sorted run are less.
SOFTPROMPT_FAST_BOTH int less_in(const uint64_t* run, uint64_t key) {
  int found = 0;
  for (int step = kRun / 2; step > 0; step /= 2) found += run[found + step - 1] < key ? step : 0;
  return found + (run[found] < key);
}

// By counting: within runs every key is compared with every other, between them it is searched for.
// 256 rows on 128 threads are some 150 comparisons a thread.
template <typename Team>
SOFTPROMPT_FAST_BOTH void sort_section(const Team& team, const DecodePlan& plan,
                                       const DecodeRows& rows, int section, DecodeSection& out) {
  const int begin = section * kSection, count = (int)least(kSection, plan.batch - begin);
  const int padded = (int)divide_up(count, kRun) * kRun;
  // A thread's rows together, for each waits twice for memory.
  constexpr int kEach = kSection / Team::size;
  int64_t prefix[kEach], blocks[kEach];
#pragma unroll
  for (int k = 0; k < kEach; ++k) {
    prefix[k] = row_prefix(rows, begin + (int)least(team.rank + k * team.size, count - 1));
  }
#pragma unroll
  for (int k = 0; k < kEach; ++k) blocks[k] = key_blocks(prefix_range(plan, rows, prefix[k]));
#pragma unroll
  for (int k = 0; k < kEach; ++k) {
    const int i = team.rank + k * team.size;
    const uint64_t none = UINT64_MAX << 8 | (uint64_t)i;  // behind every row
    if (i < padded) out.sorted[i] = i < count ? row_key(i, prefix[k], blocks[k]) : none;
  }
  team.sync();
  for (int i = team.rank; i < padded; i += team.size) {
    const uint64_t key = out.sorted[i];
    const int run = i / kRun * kRun;
    int place = run;
    for (int j = 0; j < kRun; ++j) place += out.sorted[run + j] < key;
    out.runs[place] = key;
  }
  team.sync();
  for (int i = team.rank; i < padded; i += team.size) {
    const uint64_t key = out.runs[i];
    int place = 0;
    for (int run = 0; run < padded; run += kRun) place += less_in(out.runs + run, key);
    out.sorted[place] = key;
  }
  team.sync();
  const auto begins = [&](int i) {
    return i == 0 || without_row(out.sorted[i]) != without_row(out.sorted[i - 1]);
  };
  const Interval mine = part_of(team, count);
  int groups = 0;
  for (int i = mine.low; i < mine.high; ++i) groups += begins(i);
  const Sums sums = team.sums(groups);
  int group = (int)sums.before;
  for (int i = mine.low; i < mine.high; ++i) {
    if (!begins(i)) continue;
    out.first[group] = i;
    out.entries[group++] = prefix_range(plan, rows, prefix_of(out.sorted[i]));
  }
  if (team.rank == 0) {
    out.groups = (int)sums.total;
    out.first[out.groups] = count;
  }
  team.sync();
}

// Which group has the item of block number `block`; false: none has.
template <typename Team>
SOFTPROMPT_FAST_BOTH bool find_group(const Team& team, const DecodePlan& plan, int64_t block,
                                     DecodeSection& section) {
  const Interval mine = part_of(team, section.groups);
  int64_t work = 0;
  for (int g = mine.low; g < mine.high; ++g) {
    work += plan.tiles(section.rows(g)) * key_blocks(section.entries[g]);
  }
  const int64_t share =
      plan.share_blocks(team.sums(work).total, key_blocks(section.entries[0]));  // the longest
  const auto items = [&](int g) { return plan.items(section.rows(g), section.entries[g], share); };
  int64_t count = 0;
  for (int g = mine.low; g < mine.high; ++g) count += items(g);
  const Sums sums = team.sums(count);
  int64_t number = block - sums.before;
  for (int g = mine.low; g < mine.high && number >= 0; ++g) {
    const int64_t here = items(g);
    if (number < here) {
      section.found = g;
      section.number = number;
      section.share = share;
    }
    number -= here;
  }
  team.sync();
  return block < sums.total;
}

struct DecodeItem {
  int kv_head;
  int first_row, rows;       // places in the section's order; an own item's row
  int first_query, stacked;  // of each row's stacked queries the first; how many in the tile
  int split, splits;
  int row_splits;  // arrivals of a row's prefix items: shares times tiles of the row
  Range entries;   // of a prefix item
  bool is_small;   // the tile is one of kSmallTile

  // Stacked query j of the tile: place of its row, and which of the row's.
  SOFTPROMPT_FAST_BOTH int row(int j, int per_row) const { return first_row + j / per_row; }
  SOFTPROMPT_FAST_BOTH int query(int j, int per_row) const { return first_query + j % per_row; }
};

// The item of a section's block number `block`; false: there is none. `section` is used only where
// rows have a prefix_index; else all rows are one group, in their own order.
template <typename Team>
SOFTPROMPT_FAST_BOTH bool prefix_item(const Team& team, const DecodePlan& plan,
                                      const DecodeRows& rows, DecodeSection& section, int64_t block,
                                      DecodeItem& item) {
  int first = 0, count = plan.batch;
  int64_t share;
  if (plan.indexed) {
    if (!find_group(team, plan, block, section)) return false;
    first = section.first[section.found];
    count = section.rows(section.found);
    item.entries = section.entries[section.found];
    block = section.number;
    share = section.share;
  } else {
    item.entries = prefix_range(plan, rows, 0);
    const int64_t blocks = key_blocks(item.entries);
    share = plan.share_blocks(plan.tiles(count) * blocks, blocks);
    if (block >= plan.items(count, item.entries, share)) return false;
  }
  // Tiles that read the same entries stand next to one another: what one loads, the next finds in
  // L2.
  const int number = (int)block, tiles = (int)plan.tiles(count);
  const int tile = number % tiles;
  item.kv_head = number / tiles % plan.kv_heads;
  item.split = number / tiles / plan.kv_heads;
  item.splits = (int)divide_up(key_blocks(item.entries), share);
  item.is_small = plan.small(count);
  item.row_splits = item.splits * plan.row_tiles;
  const int whole_rows = item.is_small ? count : plan.tile_rows();
  const int skipped = tile / plan.row_tiles * whole_rows;
  item.first_row = first + skipped;
  item.rows = (int)least(whole_rows, count - skipped);
  item.first_query = plan.row_tiles > 1 ? tile % plan.row_tiles * plan.tile : 0;
  item.stacked = plan.row_tiles > 1 ? (int)least(plan.tile, plan.per_row - item.first_query)
                                    : item.rows * plan.per_row;
  return true;
}

SOFTPROMPT_FAST_BOTH DecodeItem own_item(const DecodePlan& plan, int64_t block) {
  DecodeItem item = {};
  item.split = (int)(block % plan.own_splits);
  item.splits = plan.own_splits;
  block /= plan.own_splits;
  item.first_query = (int)(block % plan.own_tiles) * plan.own_tile;
  block /= plan.own_tiles;
  item.kv_head = (int)(block % plan.kv_heads);
  item.first_row = (int)(block / plan.kv_heads);
  item.rows = 1;
  item.stacked = (int)least(plan.own_tile, plan.per_row - item.first_query);
  item.is_small = plan.own_tile == kSmallTile;
  return item;
}

SOFTPROMPT_FAST_BOTH DecodeItem merge_item(const DecodePlan& plan, int64_t block) {
  DecodeItem item = {};
  item.kv_head = (int)(block % plan.kv_heads);
  item.first_row = (int)(block / plan.kv_heads) * plan.late_rows;
  item.rows = (int)least(plan.late_rows, plan.batch - item.first_row);
  return item;
}

// A counter holds arrivals in its low half, the number of shares of the row's prefix above, and in
// its highest bit that the unit's merge item has left without merging.
constexpr unsigned kLeft = 1u << 31;

SOFTPROMPT_FAST_BOTH bool all_arrived(const DecodePlan& plan, unsigned counter) {
  return (counter & 0xFFFF) == plan.expected();
}
SOFTPROMPT_FAST_BOTH int shares_of(unsigned counter) { return (int)(counter >> 16 & 0x7FFF); }

// Whether the item whose arrival made the counter what it is has to merge.
SOFTPROMPT_FAST_BOTH bool merges(const DecodePlan& plan, unsigned counter) {
  return all_arrived(plan, counter) && (plan.late_rows == 0 || counter & kLeft);
}

SOFTPROMPT_FAST_BOTH unsigned prefix_arrival(const DecodePlan& plan, const DecodeItem& item) {
  if (item.split != 0 || item.first_query != 0) return 1;
  return (unsigned)item.splits << 16 |
         (unsigned)(1 + plan.prefix_splits * plan.row_tiles - item.row_splits);
}

SOFTPROMPT_FAST_BOTH unsigned own_arrival(const DecodePlan& plan, const DecodeItem& item,
                                          bool has_prefix) {
  const bool first = item.split == 0 && item.first_query == 0;
  return 1 + (first && !has_prefix ? plan.prefix_splits * plan.row_tiles : 0);
}

// Whether an item's result is a row's whole result: then nothing is merged and nobody arrives.
SOFTPROMPT_FAST_BOTH bool is_whole(const DecodePlan& plan, bool has_prefix) {
  return (plan.together || !has_prefix) && plan.own_splits == 1;
}

}  // namespace cuda
}  // namespace softprompt_fast
