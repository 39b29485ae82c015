#include <algorithm>
#include <utility>
#include <vector>

#include "../ops.h"
#include "kv_pages.h"

namespace hstu::cpu {

void kv_append(TensorList kv_pages, TensorList k, TensorList v, const Tensor& seq_offsets, const Tensor& page_table,
               const Tensor& page_offsets, const Tensor& kv_lengths, const Tensor* counts, Stream) {
  size_t layers = kv_pages.items.size();
  HSTU_CHECK(k.items.size() == layers && v.items.size() == layers, kInvalidArgument, "kv_append: pages of ", layers, " layers, K of ",
             k.items.size(), ", V of ", v.items.size());
  if (layers == 0) return;
  const int64_t* rows = check_offsets("kv_append", "seq_offsets", seq_offsets, k.items[0].shape[0]);
  const int32_t *held = kv_lengths.as<int32_t>(), *limits = data_or_null<int32_t>(counts);
  auto count = [&](int64_t b) { return limits ? limits[b] : rows[b + 1] - rows[b]; };
  KvPages first("kv_append", kv_pages.items[0], page_table, page_offsets);
  int64_t batch = seq_offsets.size() - 1;
  std::vector<std::pair<int32_t, int64_t>> written;  // page, sequence
  for (int64_t b = 0; b < batch; ++b) {
    HSTU_CHECK(held[b] >= 0, kInvalidArgument, "kv_append: kv_lengths[", b, "] = ", held[b], " is negative");
    HSTU_CHECK(count(b) >= 0 && count(b) <= rows[b + 1] - rows[b], kInvalidArgument, "kv_append: counts[", b, "] = ", count(b),
               ", sequence ", b, " has ", rows[b + 1] - rows[b], " rows");
    int64_t end = held[b] + count(b);
    first.check(b, held[b], end);
    for (int64_t p = held[b] / first.size; held[b] < end && p < first.pages_of(end); ++p) written.emplace_back(first.page(b, p), b);
  }
  std::sort(written.begin(), written.end());
  auto twice = std::adjacent_find(written.begin(), written.end(), [](const auto& x, const auto& y) { return x.first == y.first; });
  HSTU_CHECK(twice == written.end(), kInvalidArgument, "kv_append: page ", twice->first, " would be written twice, by sequences ",
             twice->second, " and ", (twice + 1)->second);
  int64_t key = row_bytes(k.items[0], 2), value = row_bytes(v.items[0], 2);
  for (size_t layer = 0; layer < layers; ++layer) {
    KvPages pages("kv_append", kv_pages.items[layer], page_table, page_offsets);
    const char *keys = k.items[layer].as<char>(), *values = v.items[layer].as<char>();
    parallel_jagged(rows, batch, row_grain(pages.heads * (key + value)), [&](int64_t b, int64_t begin, int64_t end) {
      for (int64_t t = begin; t < std::min(end, rows[b] + count(b)); ++t) {
        int64_t position = held[b] + t - rows[b];
        pages.copy(pages.slot(b, position, 0), pages.head_bytes, keys + t * pages.heads * key, key, key);
        pages.copy(pages.slot(b, position, 1), pages.head_bytes, values + t * pages.heads * value, value, value);
      }
    });
  }
}

}  // namespace hstu::cpu
