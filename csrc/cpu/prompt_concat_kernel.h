// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "prompt_concat.h"
#include "strided.h"

namespace softprompt_fast {
namespace SOFTPROMPT_FAST_ISA {

// to[lines, width], dense, = from[lines, width] * factor, in the storage of `to`. The bytes as they
// are where nothing changes.
SOFTPROMPT_FAST_INLINE void copy_lines(const Tensor& from, int64_t from_at, int64_t line,
                                       int64_t column, int64_t lines, int64_t width, float factor,
                                       const Tensor& to, int64_t to_at) {
  if (from.dtype == to.dtype && factor == 1.0f && column == 1) {
    const int64_t size = size_of(to.dtype);
    if (line == width) width *= lines, lines = 1;
    for (int64_t i = 0; i < lines; ++i) {
      __builtin_memcpy(to.at(to_at + i * width), from.at(from_at + i * line), width * size);
    }
    return;
  }
  with_storage(from.dtype, [&](auto source) {
    with_storage(to.dtype, [&](auto target) {
      typedef decltype(source) Source;
      typedef decltype(target) Target;
      const auto* p = (const typename Source::Element*)from.data + from_at;
      auto* q = (typename Target::Element*)to.data + to_at;
      for (int64_t i = 0; i < lines; ++i, p += line, q += width) {
        for (int64_t c = 0; c < width; c += W) {
          const Vec x = load_strided<Source>(p + c * column, column, width - c);
          store_strided<Target>(q + c, 1, width - c, x * factor);
        }
      }
    });
  });
}

SOFTPROMPT_FAST_INLINE void zero_lines(int64_t lines, int64_t width, const Tensor& to,
                                       int64_t to_at) {
  __builtin_memset(to.at(to_at), 0, lines * width * size_of(to.dtype));
}

// Slots first..last-1 of [B, slots + S]. Returns the first place of an id outside the vocabulary,
// or -1.
inline int64_t prompt_concat(const PromptConcat& op, int64_t first, int64_t last) {
  const int64_t length = op.slots + op.own;
  int64_t wrong = -1;
  while (first < last) {
    const int64_t b = first / length, slot = first % length;
    const PromptRow& row = op.rows[b];
    const int64_t virtual_end = row.lead + row.size, own_end = virtual_end + op.own - row.start;
    // The run of slots of one kind that begins here.
    const int64_t end = slot < row.lead      ? row.lead
                        : slot < virtual_end ? virtual_end
                        : slot < own_end     ? own_end
                                             : length;
    const int64_t lines = min64(end - slot, last - first), to = first * op.width;
    if (slot < row.lead || slot >= own_end) {
      zero_lines(lines, op.width, op.out, to);
    } else if (slot < virtual_end) {
      const int64_t line = op.prompt.stride[0];
      copy_lines(op.prompt, (row.first + slot - row.lead) * line, line, op.prompt.stride[1], lines,
                 op.width, op.prompt_scale, op.out, to);
    } else {
      const int64_t token = row.start + slot - virtual_end;
      if (op.ids) {
        const int64_t* ids = op.ids + b * op.id_stride[0] + token * op.id_stride[1];
        for (int64_t i = 0; i < lines; ++i) {
          const int64_t id = ids[i * op.id_stride[1]], at = to + i * op.width;
          if (id >= 0 && id < op.vocabulary) {
            copy_lines(op.table, id * op.table.stride[0], 0, op.table.stride[1], 1, op.width,
                       op.scale, op.out, at);
          } else {
            zero_lines(1, op.width, op.out, at);
            if (wrong < 0) wrong = b * op.own + token + i;
          }
        }
      } else {
        const int64_t* stride = op.tokens.stride;
        copy_lines(op.tokens, b * stride[0] + token * stride[1], stride[1], stride[2], lines,
                   op.width, op.scale, op.out, to);
      }
    }
    first += lines;
  }
  return wrong;
}

// Lines that are added up in registers before they go to the sums in memory: fewer loads and stores
// of those, and a rounding error that grows with the groups and not with the lines.
constexpr int64_t kGroup = 8;

// sums[columns] = (keep ? sums : 0) + the sum of `count` lines; columns rounded up to W.
template <typename Storage>
SOFTPROMPT_FAST_INLINE void add_lines(const typename Storage::Element* const* lines, int64_t count,
                                      int64_t column, int64_t columns, bool keep, float* sums) {
  const auto add = [&](int64_t c, auto load_from) {
    Vec total = {};
    for (int64_t r = 0; r < count; ++r) total += load_from(lines[r] + c * column);
    store(sums + c, keep ? load(sums + c) + total : total);
  };
  int64_t c = 0;
  if (column == 1) {
    for (; c + W <= columns; c += W) add(c, [](const auto* p) { return Storage::load(p); });
  }
  for (; c < columns; c += W) {
    add(c, [&](const auto* p) { return load_strided<Storage>(p, column, columns - c); });
  }
}

// Entries x columns of the prompt's gradient, summed over the rows that use them.
inline void prompt_concat_grad_prompt(const PromptConcatGrad& op, const PromptGradTask& task) {
  const int64_t* stride = op.grad_out.stride;
  const auto place = [&](int64_t use, int64_t entry) {
    const int64_t b = op.order[use];
    const int64_t slot = op.rows[b].lead + entry - op.rows[b].first;
    return b * stride[0] + slot * stride[1] + task.column_first * stride[2];
  };
  const int64_t columns = task.column_last - task.column_first;
  const float scale = op.prompt_scale;
  with_storage(op.grad_out.dtype, [&](auto source) {
    typedef decltype(source) Source;
    const auto* from = (const typename Source::Element*)op.grad_out.data;
    for (int64_t entry = task.entry_first; entry < task.entry_last; ++entry) {
      float sums[kPromptGradColumns];
      int64_t use = task.row_begin;
      do {  // once at least: no rows sum to 0
        const int64_t count = min64(kGroup, task.row_end - use);
        const typename Source::Element* lines[kGroup];
        for (int64_t r = 0; r < count; ++r) lines[r] = from + place(use + r, entry);
        add_lines<Source>(lines, count, stride[2], columns, use > task.row_begin, sums);
        use += kGroup;
      } while (use < task.row_end);
      with_storage(op.grad_prompt.dtype, [&](auto target) {
        typedef decltype(target) Target;
        auto* to = (typename Target::Element*)op.grad_prompt.at(entry * op.width);
        to += task.column_first;
        for (int64_t c = 0; c < columns; c += W) {
          store_strided<Target>(to + c, 1, columns - c, load(sums + c) * scale);
        }
      });
    }
  });
}

// Tokens first..last-1 of [B, S].
inline void prompt_concat_grad_tokens(const PromptConcatGrad& op, int64_t first, int64_t last) {
  const int64_t* stride = op.grad_out.stride;
  while (first < last) {
    const int64_t b = first / op.own, token = first % op.own;
    const PromptRow& row = op.rows[b];
    const bool read = token >= row.start;
    const int64_t lines = min64((read ? op.own : row.start) - token, last - first);
    if (read) {
      const int64_t slot = row.lead + row.size + token - row.start;
      copy_lines(op.grad_out, b * stride[0] + slot * stride[1], stride[1], stride[2], lines,
                 op.width, op.scale, op.grad_tokens, first * op.width);
    } else {
      zero_lines(lines, op.width, op.grad_tokens, first * op.width);
    }
    first += lines;
  }
}

}  // namespace SOFTPROMPT_FAST_ISA
}  // namespace softprompt_fast
