// SPDX-License-Identifier: Apache-2.0
// prefix_attention, host side: the batch's rows in the order in which forward and backward stack
// their queries.
#pragma once

#include <vector>

#include "prefix_attention.h"

namespace softprompt_fast {

// The rows sorted by their prefix, those without one last.
struct PlacedRows {
  std::vector<RowView> views;
  std::vector<int64_t> ends;  // of each prefix's rows in views; the last: of those without one
  int64_t largest, longest;   // most rows of one prefix, most entries of one in use
};

void place_rows(const PrefixAttention& op, const PrefixAttentionRows& rows, PlacedRows& placed);

}  // namespace softprompt_fast
