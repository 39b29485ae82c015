// What the ops on the KV cache share: a token's rows in the pages, and the checks of a page table.
#pragma once
#include "jagged.h"

namespace hstu::cpu {

struct KvPages {
  const char* op;
  char* data;
  const int32_t* table;
  const int64_t* offsets;
  int64_t count, listed, size, heads, head_bytes;

  KvPages(const char* op, const Tensor& kv_pages, const Tensor& page_table, const Tensor& page_offsets)
      : op(op), data(kv_pages.as<char>()), table(page_table.as<int32_t>()), offsets(page_offsets.as<int64_t>()), count(kv_pages.shape[0]),
        listed(page_table.size()), size(kv_pages.shape[2]), heads(kv_pages.shape[3]), head_bytes(row_bytes(kv_pages, 4)) {}

  int64_t pages_of(int64_t tokens) const { return (tokens + size - 1) / size; }

  // Throws unless sequence b has pages for its tokens [begin, end), all of them in the tensor.
  void check(int64_t b, int64_t begin, int64_t end) const {
    if (begin == end) return;
    HSTU_CHECK(offsets[b] >= 0 && offsets[b] <= offsets[b + 1] && offsets[b + 1] <= listed, kInvalidArgument, op, ": page_offsets[", b, "] = ",
               offsets[b], " and page_offsets[", b + 1, "] = ", offsets[b + 1], " are no range of the ", listed, " entries of page_table");
    HSTU_CHECK(pages_of(end) <= offsets[b + 1] - offsets[b], kInvalidArgument, op, ": sequence ", b, " has ", offsets[b + 1] - offsets[b],
               " pages, but ", end, " tokens take ", pages_of(end), " of ", size, " slots");
    for (int64_t p = begin / size; p < pages_of(end); ++p)
      HSTU_CHECK(page(b, p) >= 0 && page(b, p) < count, kInvalidArgument, op, ": page_table[", offsets[b] + p, "] = ", page(b, p),
                 " of sequence ", b, " is outside 0..", count - 1);
  }

  int32_t page(int64_t b, int64_t p) const { return table[offsets[b] + p]; }

  // The heads of a token, head_bytes apart: K (part 0) or V (part 1).
  char* slot(int64_t b, int64_t position, int part) const {
    return data + ((int64_t(page(b, position / size)) * 2 + part) * size + position % size) * heads * head_bytes;
  }

  // Copies `bytes` of each head of a token, heads that lie `from_step` and `to_step` bytes apart.
  void copy(char* to, int64_t to_step, const char* from, int64_t from_step, int64_t bytes) const {
    if (to_step == bytes && from_step == bytes) {
      std::memcpy(to, from, heads * bytes);
      return;
    }
    for (int64_t h = 0; h < heads; ++h) std::memcpy(to + h * to_step, from + h * from_step, bytes);
  }
};

}  // namespace hstu::cpu
