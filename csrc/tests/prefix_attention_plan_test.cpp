// SPDX-License-Identifier: Apache-2.0
// The promises of cuda/prefix_attention_plan.h, held to for random calls: every key that a query
// sees is in exactly one item of its tile, no item leaves the call's tensors or the workspace, no
// two items of a row write the same slot, every row's last arrival is recognised, and the host's
// bounds hold whatever the device finds. tests/test_cuda_plan.py runs it:
// prefix_attention_plan_test <plans> <seed>.
#include "../cuda/prefix_attention_plan.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

namespace {

using namespace softprompt_fast;
using namespace softprompt_fast::cuda;

struct Failure {};
#define EXPECT(holds)                                                     \
  if (!(holds)) {                                                         \
    std::printf("%s:%d: %s does not hold\n", __FILE__, __LINE__, #holds); \
    throw Failure();                                                      \
  }

struct Random {
  std::mt19937_64 bits;
  int64_t upto(int64_t most) { return (int64_t)(bits() % (uint64_t)(most + 1)); }
  int64_t within(int64_t low, int64_t high) { return low + upto(high - low); }
  bool chance(int one_in) { return upto(one_in - 1) == 0; }
};

// A call: its sizes, and the values that the device would find.
struct Call {
  DecodeSizes sizes;
  int tile, resident;
  int64_t most_bytes;
  bool causal;
  int window;
  std::vector<int64_t> offsets, index, start, end, position;
  DecodeRows rows;
};

Index as_index(const std::vector<int64_t>& values) {
  return {values.data(), (int64_t)values.size(), true};
}

Call random_call(Random& random) {
  Call call = {};
  DecodeSizes& s = call.sizes;
  const bool many = random.chance(50);  // of them with several sections
  s.batch = many ? random.within(1, 600) : random.within(1, random.chance(4) ? 40 : 6);
  s.kv_heads = random.within(1, many ? 1 : 3);
  s.q_heads = s.kv_heads * random.within(1, many ? 2 : 8);
  s.queries = random.within(1, many ? 2 : random.chance(3) ? 16 : 3);
  s.own = random.chance(8) ? 0 : random.upto(many ? 40 : random.chance(4) ? 700 : 150);
  const int64_t longest = many ? 80 : random.chance(5) ? 3000 : 300;
  s.offsets = !random.chance(3);
  s.indexed = !random.chance(3);
  s.prefixes = 1;
  call.offsets = {s.offsets ? random.upto(5) : 0};
  if (s.offsets) {
    s.prefixes = random.within(1, random.chance(3) ? 40 : 5);
    for (int64_t n = 0; n < s.prefixes; ++n) {
      const int64_t length =
          random.chance(4) ? 0 : random.upto(longest / (random.chance(2) ? 1 : 8));
      call.offsets.push_back(call.offsets.back() + length);
    }
  } else {
    call.offsets.push_back(random.chance(6) ? 0 : random.upto(longest));
  }
  s.packed = call.offsets.back() + (s.offsets ? random.upto(5) : 0);
  const int64_t used = random.within(1, s.prefixes);  // the others are gaps
  for (int64_t b = 0; b < s.batch; ++b) {
    call.index.push_back(random.within(-1, used - 1));
    const int64_t start = random.upto(s.own),
                  end = random.within(random.chance(9) ? 0 : start, s.own);
    call.start.push_back(start);
    call.end.push_back(end);
    call.position.push_back(random.within(-20, s.own + 20));
  }
  if (s.indexed) call.rows.prefix_index = as_index(call.index);
  if (s.offsets) call.rows.prefix_offsets = as_index(call.offsets);
  if (random.chance(2)) call.rows.own_start = as_index(call.start);
  if (random.chance(2)) call.rows.own_end = as_index(call.end);
  if (random.chance(2)) call.rows.query_start = as_index(call.position);
  call.tile = random.chance(2) ? 64 : 128;
  call.resident = (int)random.within(1, random.chance(2) ? 12 : 300);
  call.most_bytes = random.chance(10) ? 1 : int64_t{128} << 20;
  call.causal = !random.chance(4);
  call.window = call.causal && random.chance(3) ? (int)random.within(1, 400) : 0;
  return call;
}

// What the contract lets query i of row b see; the same as the reference, key by key.
bool contract_sees_prefix(const Call& call, const OwnRange& own, int length, int i, int entry) {
  return !call.window || int64_t{length} + own.position + i - own.start - entry < call.window;
}
bool contract_sees_own(const Call& call, const OwnRange& own, int i, int key) {
  const int at = own.position + i;
  return key >= own.start && key < own.end && (!call.causal || key <= at) &&
         (!call.window || at - key < call.window);
}

struct Checker {
  const Call& call;
  const DecodePlan plan;
  std::vector<int> lengths, firsts;               // by row
  std::vector<std::vector<Interval>> shares;      // by state: what its items took of the keys
  std::vector<unsigned> counters, own_arrivals_;  // by unit
  std::vector<bool> written;                      // by state and slot

  explicit Checker(const Call& call)
      : call(call),
        plan(plan_decode(call.sizes, call.tile, call.resident, 4 * 64, call.most_bytes)) {}

  int64_t state(int row, int head, int query) const {
    return (int64_t{row} * plan.kv_heads + head) * plan.per_row + query;
  }

  void take(int row, int head, int query, int slot, bool own, Interval share) {
    EXPECT(row >= 0 && row < plan.batch && head >= 0 && head < plan.kv_heads);
    EXPECT(query >= 0 && query < plan.per_row && slot >= 0 && slot < plan.slots());
    const int64_t at = state(row, head, query);
    EXPECT(!written[at * plan.slots() + slot]);
    written[at * plan.slots() + slot] = true;
    shares[2 * at + own].push_back(share);
  }

  void arrive(int row, int head, unsigned weight) {
    unsigned& counter = counters[row * plan.kv_heads + head];
    EXPECT((counter & 0xFFFF) < plan.expected());  // nobody comes after the last
    counter += weight;
    EXPECT((counter & 0xFFFF) <= plan.expected());
  }

  void prefix(const DecodeItem& item, const DecodeSection& section) {
    EXPECT(item.stacked >= 1 && item.stacked <= (item.is_small ? kSmallTile : plan.tile));
    EXPECT(item.split >= 0 && item.split < item.splits && item.splits <= plan.prefix_splits);
    EXPECT(item.entries.first >= 0 && item.entries.length > 0);
    EXPECT(item.entries.first + item.entries.length <= plan.packed);
    const auto row_of = [&](int place) { return plan.indexed ? section.order[place] : place; };
    Interval seen = {item.entries.length, 0};
    for (int j = 0; j < item.stacked; ++j) {
      const int row = row_of(item.row(j, plan.per_row));
      const Interval one = sees_prefix(item.entries.length, own_range(plan, call.rows, row),
                                       item.query(j, plan.per_row) % plan.queries, call.window);
      seen = joined(seen, one);
    }
    const Interval share = share_of(seen, item.split, item.splits);
    EXPECT(share.low >= 0 && share.high <= item.entries.length);
    for (int j = 0; j < item.stacked; ++j) {
      const int row = row_of(item.row(j, plan.per_row));
      EXPECT(lengths[row] == item.entries.length && firsts[row] == item.entries.first);
      take(row, item.kv_head, item.query(j, plan.per_row), plan.own_splits + item.split, false,
           share);
    }
    for (int r = 0; r < item.rows; ++r) {
      arrive(row_of(item.first_row + r), item.kv_head, prefix_arrival(plan, item));
    }
  }

  void own(const DecodeItem& item) {
    EXPECT(item.stacked >= 1 && item.stacked <= (item.is_small ? kSmallTile : plan.tile));
    const OwnRange own = own_range(plan, call.rows, item.first_row);
    Interval seen = {INT_MAX, 0};
    for (int j = 0; j < item.stacked; ++j) {
      const Interval one =
          sees_own(own, item.query(j, plan.per_row) % plan.queries, call.causal, call.window);
      if (one.low < one.high) seen = joined(seen, one);
    }
    const Interval share =
        seen.low < seen.high ? share_of(seen, item.split, item.splits) : Interval{0, 0};
    EXPECT(share.low >= 0 && share.high <= plan.own);
    const bool has_prefix = lengths[item.first_row] > 0;
    for (int j = 0; j < item.stacked; ++j) {
      take(item.first_row, item.kv_head, item.query(j, plan.per_row), item.split, true, share);
    }
    if (!is_whole(plan, has_prefix)) {
      arrive(item.first_row, item.kv_head, own_arrival(plan, item, has_prefix));
    }
  }

  template <typename Sees>
  void covered_once(std::vector<Interval>& found, int keys, Sees sees) {
    std::sort(found.begin(), found.end(), [](Interval a, Interval b) { return a.low < b.low; });
    int reached = 0;
    size_t next = 0;
    for (int key = 0; key < keys; ++key) {
      while (next < found.size() && found[next].high <= key) ++next;
      const bool in = next < found.size() && found[next].low <= key;
      EXPECT(in || !sees(key));
    }
    for (const Interval& one : found) {
      if (one.low == one.high) continue;
      EXPECT(one.low >= reached);  // no two overlap
      reached = one.high;
    }
  }

  void run() {
    lengths.resize(plan.batch);
    firsts.resize(plan.batch);
    for (int row = 0; row < plan.batch; ++row) {
      const Range entries = prefix_range(plan, call.rows, row_prefix(call.rows, row));
      lengths[row] = entries.length;
      firsts[row] = entries.first;
    }
    EXPECT(plan.own_splits >= 1 && plan.own_splits <= kMaxSplits);
    EXPECT(plan.prefix_splits >= (plan.packed > 0) && plan.prefix_splits <= kMaxSplits);
    EXPECT(plan.expected() < 1u << 16);
    shares.resize(2 * plan.units() * plan.per_row);
    counters.resize(plan.units());
    written.resize(plan.states());
    DecodeSection section;
    for (int s = 0; s < plan.sections; ++s) {
      if (plan.indexed && plan.prefix_blocks) sort_section(Alone(), plan, call.rows, s, section);
      DecodeItem item;
      bool more = true;
      for (int64_t block = 0; block < plan.prefix_blocks; ++block) {
        item = DecodeItem();
        const bool found = prefix_item(plan, call.rows, section, block, item);
        EXPECT(more || !found);  // items come without gaps
        more = found;
        if (found) prefix(item, section);
      }
      // The bound holds: the block after the last would have nothing to do.
      if (plan.packed > 0) EXPECT(!prefix_item(plan, call.rows, section, plan.prefix_blocks, item));
    }
    for (int64_t block = 0; block < plan.own_blocks(); ++block) own(own_item(plan, block));
    for (int row = 0; row < plan.batch; ++row) {
      const OwnRange own = own_range(plan, call.rows, row);
      for (int head = 0; head < plan.kv_heads; ++head) {
        const unsigned counter = counters[row * plan.kv_heads + head];
        const bool whole = is_whole(plan, lengths[row] > 0);
        EXPECT((counter & 0xFFFF) == (whole ? 0 : plan.expected()));
        for (int query = 0; query < plan.per_row; ++query) {
          // Those who merge read these slots, and no others were written.
          const int64_t at = state(row, head, query);
          for (int slot = 0; slot < plan.slots(); ++slot) {
            const int used = plan.own_splits + (int)(counter >> 16);
            EXPECT(written[at * plan.slots() + slot] == (slot < used));
          }
          const int i = query % plan.queries, length = lengths[row];
          covered_once(shares[2 * at], length,
                       [&](int key) { return contract_sees_prefix(call, own, length, i, key); });
          covered_once(shares[2 * at + 1], plan.own,
                       [&](int key) { return contract_sees_own(call, own, i, key); });
          // And what a query sees is an interval.
          const Interval prefix = sees_prefix(length, own, i, call.window);
          for (int key = 0; key < length; ++key) {
            EXPECT((key >= prefix.low && key < prefix.high) ==
                   contract_sees_prefix(call, own, length, i, key));
          }
          const Interval seen = sees_own(own, i, call.causal, call.window);
          for (int key = 0; key < plan.own; ++key) {
            EXPECT((key >= seen.low && key < seen.high) == contract_sees_own(call, own, i, key));
          }
        }
      }
    }
  }
};

}  // namespace

int main(int count, char** arguments) {
  const long plans = count > 1 ? std::atol(arguments[1]) : 10000;
  const long seed = count > 2 ? std::atol(arguments[2]) : 0;
  Random random{std::mt19937_64(seed)};
  for (long i = 0; i < plans; ++i) {
    const Call call = random_call(random);
    try {
      Checker(call).run();
    } catch (const Failure&) {
      const DecodeSizes& s = call.sizes;
      std::printf(
          "plan %ld of seed %ld: batch %ld, heads %ld over %ld, queries %ld, own %ld, packed %ld, "
          "prefixes %ld, offsets %d, indexed %d, tile %d, resident %d, window %d\n",
          i, seed, (long)s.batch, (long)s.q_heads, (long)s.kv_heads, (long)s.queries, (long)s.own,
          (long)s.packed, (long)s.prefixes, s.offsets, s.indexed, call.tile, call.resident,
          call.window);
      return 1;
    }
  }
  return 0;
}
