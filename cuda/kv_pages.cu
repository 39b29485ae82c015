#include "kv_pages.cuh"

#include <algorithm>
#include <utility>

namespace hstu::cuda {

void check_pages(const char* op, bool append, const Tensor& kv_pages, const Tensor& seq_offsets, const Tensor& page_table,
                 const Tensor& page_offsets, const Tensor& kv_lengths, const Tensor* counts, Stream stream) {
  std::vector<int64_t> rows = values_of<int64_t>(seq_offsets, stream), offsets = values_of<int64_t>(page_offsets, stream);
  std::vector<int32_t> table = values_of<int32_t>(page_table, stream), held = values_of<int32_t>(kv_lengths, stream);
  std::vector<int32_t> limits = counts ? values_of<int32_t>(*counts, stream) : std::vector<int32_t>();
  std::vector<std::pair<int32_t, size_t>> written;  // page, sequence
  int64_t size = kv_pages.shape[2], listed = page_table.size();
  for (size_t b = 0; b < held.size(); ++b) {
    int64_t all = rows[b + 1] - rows[b], count = limits.empty() ? all : limits[b];
    HSTU_CHECK(count >= 0 && count <= all, kInvalidArgument, op, ": counts[", b, "] = ", count, ", sequence ", b, " has ", all, " rows");
    int64_t begin = append ? held[b] : 0, end = begin + count, pages = (end + size - 1) / size;
    HSTU_CHECK(held[b] >= 0, kInvalidArgument, op, ": kv_lengths[", b, "] = ", held[b], " is negative");
    HSTU_CHECK(append || count <= held[b], kInvalidArgument, op, ": ", count, " rows of sequence ", b, " are asked for, kv_lengths has ", held[b]);
    if (count == 0) continue;
    HSTU_CHECK(offsets[b] >= 0 && offsets[b] <= offsets[b + 1] && offsets[b + 1] <= listed, kInvalidArgument, op, ": page_offsets[", b, "] = ",
               offsets[b], " and page_offsets[", b + 1, "] = ", offsets[b + 1], " are no range of the ", listed, " entries of page_table");
    HSTU_CHECK(pages <= offsets[b + 1] - offsets[b], kInvalidArgument, op, ": sequence ", b, " has ", offsets[b + 1] - offsets[b],
               " pages, but ", end, " tokens take ", pages, " of ", size, " slots");
    for (int64_t entry = offsets[b] + begin / size; entry < offsets[b] + pages; ++entry) {
      HSTU_CHECK(table[entry] >= 0 && table[entry] < kv_pages.shape[0], kInvalidArgument, op, ": page_table[", entry, "] = ", table[entry],
                 " of sequence ", b, " is outside 0..", kv_pages.shape[0] - 1);
      if (append) written.emplace_back(table[entry], b);
    }
  }
  std::sort(written.begin(), written.end());
  auto twice = std::adjacent_find(written.begin(), written.end(), [](const auto& x, const auto& y) { return x.first == y.first; });
  HSTU_CHECK(twice == written.end(), kInvalidArgument, op, ": page ", twice->first, " would be written twice, by sequences ", twice->second,
             " and ", (twice + 1)->second);
}

}  // namespace hstu::cuda
