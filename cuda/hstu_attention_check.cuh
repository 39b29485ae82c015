// What HSTU_DEBUG=1 adds to HSTU attention: the geometry of a call, which lives on the device, checked as the CPU checks it. Without it
// sequence_of() limits what is out of range, so that nothing is read or written out of bounds.
#pragma once
#include "debug.cuh"

namespace hstu::cuda::attention {

struct Geometry {
  const Tensor &q, &k, &seq_offsets;
  const Tensor *q_offsets, *num_targets, *contextual_lengths, *key_time;
  const Tensor *kv_pages, *page_table, *page_offsets, *kv_lengths, *time_offsets;
};

inline void check_geometry(const char* op, const Geometry& g, int64_t max_seq_len, Stream stream) {
  if (!debugging()) return;
  auto int64s = [&](const Tensor* x) { return x ? values_of<int64_t>(*x, stream) : std::vector<int64_t>(); };
  auto int32s = [&](const Tensor* x) { return x ? values_of<int32_t>(*x, stream) : std::vector<int32_t>(); };
  auto keys = int64s(&g.seq_offsets), rows = g.q_offsets ? int64s(g.q_offsets) : keys;
  auto times = int64s(g.time_offsets), tables = int64s(g.page_offsets);
  auto targets = int32s(g.num_targets), contextual = int32s(g.contextual_lengths);
  auto cached = int32s(g.kv_lengths), pages = int32s(g.page_table);
  int64_t count = int64_t(keys.size()) - 1;
  HSTU_CHECK(keys[0] == 0 && keys[count] == g.k.shape[0] && rows[0] == 0 && rows[count] == g.q.shape[0], kInvalidArgument, op,
             ": seq_offsets and q_offsets must run from 0 to the rows of k (", g.k.shape[0], ") and q (", g.q.shape[0], ")");
  for (int64_t b = 0; b < count; ++b) {
    auto wants = [&](bool condition, auto... parts) { HSTU_CHECK(condition, kInvalidArgument, op, ": sequence ", b, " has ", parts...); };
    int64_t paged = cached.empty() ? 0 : cached[b], jagged = keys[b + 1] - keys[b], queries = rows[b + 1] - rows[b];
    int64_t length = paged + jagged;
    wants(paged >= 0 && jagged >= 0 && queries >= 0, "offsets that decrease or a negative kv_length");
    wants(length <= max_seq_len, length, " keys, max_seq_len is ", max_seq_len);
    wants(queries <= length, queries, " queries but only ", length, " keys");
    if (!targets.empty()) wants(targets[b] >= 0 && targets[b] <= length, targets[b], " targets but ", length, " keys");
    if (!contextual.empty()) wants(contextual[b] >= 0, contextual[b], " contextual tokens");
    if (!times.empty()) {
      int64_t end = g.key_time ? g.key_time->shape[0] : INT64_MAX;
      wants(times[b] >= 0 && times[b] <= times[b + 1] && times[b + 1] <= end, "time_offsets outside key_time");
      wants(times[b + 1] - times[b] == length, times[b + 1] - times[b], " key times but ", length, " keys");
    }
    if (paged == 0) continue;
    int64_t size = g.kv_pages->shape[2], needed = (paged + size - 1) / size;
    wants(tables[b] >= 0 && tables[b] <= tables[b + 1] && tables[b + 1] <= int64_t(pages.size()), "page_offsets outside page_table");
    wants(tables[b + 1] - tables[b] >= needed, tables[b + 1] - tables[b], " pages, but ", paged, " cached keys take ", needed);
    for (int64_t x = tables[b]; x < tables[b] + needed; ++x)
      wants(pages[x] >= 0 && pages[x] < g.kv_pages->shape[0], "page ", pages[x], " of ", g.kv_pages->shape[0]);
  }
}

}  // namespace hstu::cuda::attention
