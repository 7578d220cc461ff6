// SPDX-License-Identifier: Apache-2.0
// The promises of cuda/prefix_attention_plan.h, held to for random calls: every key that a query
// sees is in exactly one item of its tile, no item leaves the call's tensors or the workspace, no
// two items of a row write the same slot, every row's last arrival is recognised, and the host's
// bounds hold whatever the device finds. tests/test_cuda_decode.py runs a million of them:
// prefix_attention_plan_test <plans> <seed>.
#include "../cuda/prefix_attention_plan.h"

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
  int tile, resident, beside, together, late;
  int64_t most_bytes;
  bool causal;
  int window;
  std::vector<int64_t> offsets, index, start, end, position;
  DecodeRows rows;
};

Index as_index(const std::vector<int64_t>& values) {
  return {values.data(), (int64_t)values.size(), true};
}

// Small and odd sizes above all: what is special is at their edges, and they are checked at once.
void draw(Random& random, Call& call) {
  DecodeSizes& s = call.sizes;
  const bool many = random.chance(100);  // of them with several sections
  s.batch = many ? random.within(1, 600) : random.within(1, random.chance(8) ? 40 : 5);
  s.kv_heads = random.within(1, many || random.chance(2) ? 1 : 3);
  s.q_heads = s.kv_heads * random.within(1, many || random.chance(2) ? 2 : 8);
  s.queries = random.within(1, many ? 2 : random.chance(6) ? 16 : 3);
  s.own = random.chance(8) ? 0 : random.upto(many ? 40 : random.chance(8) ? 700 : 150);
  const int64_t longest = many ? 80 : random.chance(5) ? 3000 : 300;
  s.offsets = !random.chance(3);
  s.indexed = !random.chance(3);
  s.prefixes = 1;
  call.offsets.assign(1, s.offsets ? random.upto(5) : 0);
  if (s.offsets) {
    s.prefixes = random.within(1, many && random.chance(2) ? 400 : random.chance(6) ? 40 : 5);
    for (int64_t n = 0; n < s.prefixes; ++n) {
      const int64_t length =
          random.chance(4) ? 0 : random.upto(longest / (random.chance(2) ? 1 : 8));
      call.offsets.push_back(call.offsets.back() + length);
    }
  } else {
    call.offsets.push_back(random.chance(6) ? 0 : random.upto(longest));
  }
  s.packed = call.offsets.back() + (s.offsets ? random.upto(5) : 0);
  s.longest = random.chance(2) ? s.packed : random.upto(2 * longest);  // a hint, right or wrong
  const int64_t used = random.within(1, s.prefixes);                   // the others are gaps
  for (std::vector<int64_t>* one : {&call.index, &call.start, &call.end, &call.position}) {
    one->clear();
  }
  for (int64_t b = 0; b < s.batch; ++b) {
    call.index.push_back(random.within(-1, used - 1));
    const int64_t start = random.upto(s.own),
                  end = random.within(random.chance(9) ? 0 : start, s.own);
    call.start.push_back(start);
    call.end.push_back(end);
    call.position.push_back(random.within(-20, s.own + 20));
  }
  call.rows = {};
  if (s.indexed) call.rows.prefix_index = as_index(call.index);
  if (s.offsets) call.rows.prefix_offsets = as_index(call.offsets);
  if (random.chance(2)) call.rows.own_start = as_index(call.start);
  if (random.chance(2)) call.rows.own_end = as_index(call.end);
  if (random.chance(2)) call.rows.query_start = as_index(call.position);
  call.tile = kSmallTile << random.upto(3);
  call.resident = (int)random.within(1, random.chance(2) ? 12 : 300);
  call.beside = random.chance(2) ? 0 : (int)random.within(1, 400);
  call.together = random.chance(3) ? 0 : (int)random.within(1, 12);
  call.late = (int)random.within(1, 12);
  s.widened = random.chance(4);
  call.most_bytes = random.chance(10) ? 1 : int64_t{128} << 20;
  call.causal = !random.chance(4);
  call.window = call.causal && random.chance(3) ? (int)random.within(1, 400) : 0;
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

// One for all plans: its memory is taken once.
class Checker {
 public:
  // `each_key`: whether every key is held to the contract, instead of those at the ends of what is
  // seen. (Its conditions are thresholds: between two of them nothing changes.)
  void run(const Call& call, bool each_key) {
    call_ = &call;
    plan_ = plan_decode(call.sizes, call.tile, call.resident, 4 * 64, call.beside, call.together,
                        call.late, call.most_bytes);
    const DecodePlan& plan = plan_;
    rows_.resize(plan.batch);
    for (int row = 0; row < plan.batch; ++row) {
      rows_[row] = {own_range(plan, call.rows, row),
                    prefix_range(plan, call.rows, row_prefix(call.rows, row))};
    }
    EXPECT(plan.own_splits >= 1 && plan.own_splits <= kMaxSplits);
    const bool apart = plan.packed > 0 && !plan.together;
    EXPECT(plan.prefix_splits >= apart && plan.prefix_splits <= kMaxSplits);
    EXPECT(plan.expected() < 1u << 16);
    EXPECT(!plan.together || plan.late_rows == 0);
    EXPECT(plan.late_rows >= 0 && plan.late_rows <= kLateRows);
    if (plan.together) {
      // One item a row's tile, of entries that the own keys' code reads, and few of them.
      EXPECT(!call.sizes.widened && plan.prefix_blocks == 0 && plan.states() == 0);
      EXPECT(2 * plan.blocks() <= call.resident && plan.own_splits == 1);
      const int64_t longest = call.sizes.indexed || call.sizes.offsets
                                  ? least(call.sizes.longest, call.sizes.packed)
                                  : call.sizes.packed;
      EXPECT(divide_up(longest, kDecodeKeys) + divide_up(plan.own, kDecodeKeys) <= call.together);
    }
    slots_ = plan.own_splits + (int)most(1, plan.prefix_splits);
    EXPECT(plan.slots() == 0 || plan.slots() == plan.own_splits + plan.prefix_splits);
    counters_.assign(plan.units(), 0);
    taken_.assign(plan.units() * plan.per_row * slots_, kNothing);
    for (int s = 0; s < plan.sections; ++s) {
      section_number_ = s;
      if (plan.indexed && plan.prefix_blocks) {
        sort_section(Alone(), plan, call.rows, s, section_);
        sorted();
      }
      DecodeItem item;
      int64_t longest = INT_MAX;
      bool more = true;
      for (int64_t block = 0; block < plan.prefix_blocks; ++block) {
        const bool found = prefix_item(Alone(), plan, call.rows, section_, block, item);
        EXPECT(more || !found);  // items come without gaps
        more = found;
        if (!found) continue;
        prefix(item);
        EXPECT(key_blocks(item.entries) <= longest);  // those that take longest come first
        longest = key_blocks(item.entries);
      }
      // The bound holds: the block after the last would have nothing to do.
      if (apart) {
        EXPECT(!prefix_item(Alone(), plan, call.rows, section_, plan.prefix_blocks, item));
      }
    }
    for (int64_t block = 0; block < plan.own_blocks(); ++block) own(own_item(plan, block));
    for (int row = 0; row < plan.batch; ++row) results(row, each_key);
    merged_once();
  }

 private:
  // What an item took of the keys, for a state and slot; kNothing: no item wrote there.
  static constexpr Interval kNothing = {-1, -1};
  struct Row {
    OwnRange own;
    Range entries;
  };

  const Call* call_;
  DecodePlan plan_;
  DecodeSection section_;
  int section_number_;
  int slots_;  // of a query here: there is one for the prefix that an own item takes
  std::vector<Row> rows_;
  std::vector<unsigned> counters_;  // by unit
  std::vector<Interval> taken_;     // by state and slot
  std::vector<Interval> seen_;      // by query of a row: of its prefix, and of its own

  int64_t state(int row, int head, int query) const {
    return ((int64_t{row} * plan_.kv_heads + head) * plan_.per_row + query) * slots_;
  }

  void take(int row, int head, int query, int slot, Interval share) {
    EXPECT(row >= 0 && row < plan_.batch && head >= 0 && head < plan_.kv_heads);
    EXPECT(query >= 0 && query < plan_.per_row && slot >= 0 && slot < slots_);
    Interval& taken = taken_[state(row, head, query) + slot];
    EXPECT(taken.low < 0);
    taken = share;
  }

  void arrive(int row, int head, unsigned weight) {
    unsigned& counter = counters_[row * plan_.kv_heads + head];
    EXPECT((counter & 0xFFFF) < plan_.expected());  // nobody comes after the last
    counter += weight;
    EXPECT((counter & 0xFFFF) <= plan_.expected());
  }

  int sorted_row(int place) const {
    return section_number_ * kSection + row_of(section_.sorted[place]);
  }

  // Rows of a section are each there once, and a group's are those of one prefix in their order.
  void sorted() const {
    const int count = (int)least(kSection, plan_.batch - section_number_ * kSection);
    const auto prefix = [&](int place) { return prefix_of(section_.sorted[place]); };
    EXPECT(section_.first[0] == 0 && section_.first[section_.groups] == count);
    for (int g = 0; g < section_.groups; ++g) {
      const int first = section_.first[g];
      EXPECT(section_.rows(g) > 0);
      for (int place = first; place < section_.first[g + 1]; ++place) {
        const Row& row = rows_[sorted_row(place)];
        EXPECT(row.entries.length == section_.entries[g].length);
        EXPECT(row.entries.length == 0 ||
               prefix(place) == row_prefix(call_->rows, sorted_row(place)));
        EXPECT(prefix(place) == prefix(first));
        EXPECT(place == first || sorted_row(place - 1) < sorted_row(place));
      }
      // Each prefix is one group's, whose place follows from values alone.
      if (g == 0) continue;
      const int64_t before = key_blocks(section_.entries[g - 1]),
                    here = key_blocks(section_.entries[g]);
      EXPECT(here < before || (here == before && prefix(section_.first[g - 1]) < prefix(first)));
    }
  }

  // Calls body(row, query) for each stacked query of an item. `row_of(place)`: which row that is.
  template <typename RowOf, typename Body>
  void each_stacked(const DecodeItem& item, RowOf row_of, Body body) const {
    EXPECT(item.stacked >= 1 && item.stacked <= (item.is_small ? kSmallTile : plan_.tile));
    for (int j = 0; j < item.stacked; ++j) {
      body(row_of(item.row(j, plan_.per_row)), item.query(j, plan_.per_row));
    }
  }

  void prefix(const DecodeItem& item) {
    EXPECT(item.split >= 0 && item.split < item.splits && item.splits <= plan_.prefix_splits);
    const int length = item.entries.length;
    EXPECT(item.entries.first >= 0 && length > 0 && item.entries.first + length <= plan_.packed);
    const auto row_of = [&](int place) { return plan_.indexed ? sorted_row(place) : place; };
    Interval seen = {length, 0};
    each_stacked(item, row_of, [&](int row, int query) {
      const Row& r = rows_[row];
      EXPECT(r.entries.length == length && r.entries.first == item.entries.first);
      seen = joined(seen, sees_prefix(length, r.own, query % plan_.queries, call_->window));
    });
    const Interval share = share_of(seen, item.split, item.splits);
    EXPECT(share.low >= 0 && share.high <= length);
    each_stacked(item, row_of, [&](int row, int query) {
      take(row, item.kv_head, query, plan_.own_splits + item.split, share);
    });
    for (int r = 0; r < item.rows; ++r) {
      arrive(row_of(item.first_row + r), item.kv_head, prefix_arrival(plan_, item));
    }
  }

  void own(const DecodeItem& item) {
    const auto row_of = [](int place) { return place; };
    Interval seen = {INT_MAX, 0};
    each_stacked(item, row_of, [&](int row, int query) {
      const Interval one =
          sees_own(rows_[row].own, query % plan_.queries, call_->causal, call_->window);
      if (one.low < one.high) seen = joined(seen, one);
    });
    const Interval share =
        seen.low < seen.high ? share_of(seen, item.split, item.splits) : Interval{0, 0};
    EXPECT(share.low >= 0 && share.high <= plan_.own);
    const Row& r = rows_[item.first_row];
    const bool has_prefix = r.entries.length > 0;
    const Interval behind = behind_own(plan_, r.entries.length, r.own, call_->window);
    EXPECT(behind.low >= 0 && behind.high <= r.entries.length);
    EXPECT(plan_.together || behind.low >= behind.high);
    each_stacked(item, row_of, [&](int row, int query) {
      take(row, item.kv_head, query, item.split, share);
      if (plan_.together) take(row, item.kv_head, query, plan_.own_splits, behind);
    });
    if (is_whole(plan_, has_prefix)) {
      EXPECT(item.splits == 1);
    } else {
      EXPECT(plan_.slots() > 0);  // it has somewhere to leave its result
      arrive(item.first_row, item.kv_head, own_arrival(plan_, item, has_prefix));
    }
  }

  // Who arrives last merges a unit, or a merge item does: never both, whichever comes first.
  void merged_once() {
    std::vector<unsigned>& counters = counters_;
    std::vector<int> items(counters.size(), 0);
    for (int64_t block = 0; block < plan_.late_blocks(); ++block) {
      const DecodeItem item = merge_item(plan_, block);
      EXPECT(item.kv_head < plan_.kv_heads && item.rows >= 1 && item.rows <= kLateRows);
      for (int r = 0; r < item.rows; ++r) {
        EXPECT(item.first_row + r < plan_.batch);
        ++items[(item.first_row + r) * plan_.kv_heads + item.kv_head];
      }
    }
    for (size_t unit = 0; unit < counters.size(); ++unit) {
      EXPECT(items[unit] == (plan_.late_rows > 0));
      const unsigned end = counters[unit];
      if ((end & 0xFFFF) == 0) continue;  // an own item's result was the whole one
      EXPECT(!(end & kLeft) && all_arrived(plan_, end));
      EXPECT(merges(plan_, end) == (plan_.late_rows == 0));
      EXPECT(merges(plan_, end + kLeft) && shares_of(end + kLeft) == shares_of(end));
    }
  }

  // What is in a row's slots, and that it is all that its queries see.
  void results(int row, bool each_key) {
    const OwnRange& own = rows_[row].own;
    const int length = rows_[row].entries.length;
    seen_.resize(2 * plan_.queries);
    for (int i = 0; i < plan_.queries; ++i) {
      const Interval a = seen_[2 * i] = sees_prefix(length, own, i, call_->window);
      const Interval b = seen_[2 * i + 1] = sees_own(own, i, call_->causal, call_->window);
      hold(a, length, each_key,
           [&](int key) { return contract_sees_prefix(*call_, own, length, i, key); });
      hold(b, plan_.own, each_key, [&](int key) { return contract_sees_own(*call_, own, i, key); });
    }
    for (int head = 0; head < plan_.kv_heads; ++head) {
      const unsigned counter = counters_[row * plan_.kv_heads + head];
      const bool whole = is_whole(plan_, length > 0);
      EXPECT((counter & 0xFFFF) == (whole ? 0 : plan_.expected()));
      const int shares = plan_.together ? 1 : (int)(counter >> 16);
      const int unused = plan_.own_splits + shares;
      for (int query = 0; query < plan_.per_row; ++query) {
        // Those who merge read these slots, and no others were written.
        const Interval* taken = &taken_[state(row, head, query)];
        const Interval* seen = &seen_[2 * (query % plan_.queries)];
        covered_once(taken + plan_.own_splits, shares, seen[0]);
        covered_once(taken, plan_.own_splits, seen[1]);
        for (int slot = unused; slot < slots_; ++slot) EXPECT(taken[slot].low < 0);
      }
    }
  }

  // Shares, in their order, that leave no gap in what is seen, and of which no two overlap.
  static void covered_once(const Interval* shares, int count, Interval seen) {
    int reached = 0, missing = seen.low;
    for (int i = 0; i < count; ++i) {
      const Interval& one = shares[i];
      EXPECT(one.low >= 0);
      if (one.low == one.high) continue;
      EXPECT(one.low >= reached && one.low < one.high);
      if (one.low <= missing) missing = (int)most(missing, one.high);
      reached = one.high;
    }
    EXPECT(missing >= seen.high);
  }

  // That of `keys` keys the contract shows those of an interval.
  template <typename Sees>
  static void hold(Interval seen, int keys, bool each_key, Sees sees) {
    const auto one = [&](int64_t key) {
      if (key >= 0 && key < keys) {
        EXPECT((key >= seen.low && key < seen.high) == sees((int)key));
      }
    };
    if (each_key) {
      for (int key = 0; key < keys; ++key) one(key);
      return;
    }
    for (int64_t key : {int64_t{0}, int64_t{seen.low} - 1, int64_t{seen.low},
                        int64_t{seen.high} - 1, int64_t{seen.high}, int64_t{keys} - 1}) {
      one(key);
    }
  }
};

}  // namespace

int main(int count, char** arguments) {
  const long plans = count > 1 ? std::atol(arguments[1]) : 10000;
  const long seed = count > 2 ? std::atol(arguments[2]) : 0;
  Random random{std::mt19937_64(seed)};
  Call call;
  Checker checker;
  for (long i = 0; i < plans; ++i) {
    draw(random, call);
    try {
      checker.run(call, i % 16 == 0);
    } catch (const Failure&) {
      const DecodeSizes& s = call.sizes;
      std::printf(
          "plan %ld of seed %ld: batch %ld, heads %ld over %ld, queries %ld, own %ld, packed %ld, "
          "prefixes %ld, longest %ld, offsets %d, indexed %d, tile %d, resident %d, beside %d, "
          "together %d, late %d, widened %d, window %d\n",
          i, seed, (long)s.batch, (long)s.q_heads, (long)s.kv_heads, (long)s.queries, (long)s.own,
          (long)s.packed, (long)s.prefixes, (long)s.longest, s.offsets, s.indexed, call.tile,
          call.resident, call.beside, call.together, call.late, s.widened, call.window);
      return 1;
    }
  }
  return 0;
}
